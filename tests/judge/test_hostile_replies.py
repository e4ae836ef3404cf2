"""What a judge's endpoint may send: replies that take for ever, are too long, or hold what must not be kept."""

from __future__ import annotations

import json
import socketserver
import threading
import time
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_server import serving

from steersman.judge import Judge, JudgeConfig
from steersman.judge.cache import ReplyCache
from steersman.judge.endpoint import LARGEST_REPLY
from steersman.judge.prompts import grade, verdict
from steersman.types import SteersmanError

ATOMS = [" ", "[", "[[", "[[ ", "]", "*", "answer", ":", "A", "9", "\n", "\ud800", "\x1b[2J", "-", "."]


@settings(max_examples=100, deadline=None)
@given(
    st.builds(
        lambda atom, n, other, m, end: atom * n + other * m + end,
        st.sampled_from(ATOMS),
        st.integers(0, 20_000),
        st.sampled_from(ATOMS),
        st.integers(0, 2_000),
        st.sampled_from(["", "x", "]]", "A]]"]),
    )
)
def test_every_reply_is_read_soon(reply):
    start = time.process_time()
    assert verdict(reply) in (None, 0.0, 0.5, 1.0)
    found = grade(reply, 1, 10)
    assert found is None or 1 <= found <= 10
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("reply", "share"),
    [
        ("answer" + " " * 1000 + "A", 1.0), (" " * 1000 + "x", None), ("Verdict :\n\n ** B **.", 0.0),
        ("[[" + " " * 5000 + "A" + " " * 5000 + "]]", 1.0), ("[[A]] or [[not a verdict at all]]", 1.0),
        ("[[ tie ]]", 0.5), ("[[A]]\nno, [[B]]", 0.0), ("A" * 1000, None), ("[[A]] is better than [[B]]", None),
        ("[[A]] or [[B]]?\nA. [[a]] and [[A]]", 1.0), ("[[**A**]]", 1.0), ("[[ __B__ ]]", 0.0), ("**[[A]]**", 1.0),
        ("## Verdict\n\n**A**", 1.0), ("**Verdict:** B", 0.0), ("a_b", None), ("[[**]]", None),
    ],
)  # fmt: skip
def test_verdicts_among_spaces(reply, share):
    assert verdict(reply) == share


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("[[4/10]]", None), ("[[4/5]]", 4.0), ("[[4 / 5]]", 4.0), ("[[4/]]", 4.0), ("[[4/nan]]", None),
        ("[[**4**]]", 4.0), ("[[4]] of [[5]]", None), ("Grade: **4**", 4.0), ("[[4/5/5]]", None), ("[[6]]", None),
    ],
)  # fmt: skip
def test_grades_and_their_scale(reply, found):
    assert grade(reply, 1, 5) == found


ITEM = [("Say hi.", "hello there friend", "hi")]


def judge_at(url, tmp_path, *, endpoint=None, **extra) -> Judge:
    how = {"url": url, "model": "m", "retries": 0, "timeout": 5.0, "max_wait": 0.02, "key_env": "A_KEY"}
    section = {"endpoint": how | (endpoint or {}), **extra}
    return Judge(JudgeConfig.model_validate(section), tmp_path / "judge.jsonl")


def completion(text, **usage):
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}], "usage": usage})


@contextmanager
def dripping(head: bytes):
    """A server that answers every connection with `head` at once and then a byte every 50 ms, for ever."""
    over = threading.Event()

    class Drip(socketserver.BaseRequestHandler):
        def handle(self):
            try:
                self.request.recv(65536)
                self.request.sendall(head)
                while not over.wait(0.05):
                    self.request.sendall(b"x")
            except OSError:
                pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Drip) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            over.set()
            server.shutdown()


@pytest.mark.parametrize(
    "head",
    [b"HTTP/1.1 200 OK\r\nx-slow: ", b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n"],
    ids=["head", "body"],
)
def test_a_server_that_drips_does_not_hold_the_run(tmp_path, head):
    start = time.perf_counter()
    with dripping(head) as url, pytest.raises(SteersmanError, match=r"no reply within 0\.4 seconds, after 1 tries"):
        judge_at(url, tmp_path, endpoint={"timeout": 0.4}).compare(ITEM)
    assert time.perf_counter() - start < 4


def test_a_reply_without_end_is_cut(tmp_path):
    with serving(lambda n, text: completion("x" * (LARGEST_REPLY + 1))) as server:
        with pytest.raises(SteersmanError, match="a reply of more than 8 MiB"):
            judge_at(server.url, tmp_path, endpoint={"timeout": 30.0}).compare(ITEM)
        assert not (tmp_path / "judge.jsonl").exists()


@pytest.mark.parametrize("raw", ["[" * 100_000, "9" * 5000, '{"choices": [{"message": {"content": 5}}]}', "null"])
def test_what_is_no_chat_completion_is_told_so(tmp_path, raw):
    told = pytest.raises(SteersmanError, match="no chat completion")
    with serving(lambda n, text: (200, {}, raw)) as server, told:
        judge_at(server.url, tmp_path).compare(ITEM)


def test_half_a_surrogate_pair_is_replaced_and_kept(tmp_path):
    item = [("Say \udfff.", "hello there friend", "hi")]
    with serving(lambda n, text: (200, {}, '{"choices": [{"message": {"content": "\\ud800 [[A]]"}}]}')) as server:
        first = judge_at(server.url, tmp_path).compare(item)
        assert judge_at(server.url, tmp_path).compare(item) == first
        assert len(server.seen) == 2, "the second judge had both replies from the file"
        assert "\ufffd" in server.seen[0]
    kept = ReplyCache(tmp_path / "judge.jsonl")
    assert [r["text"] for r in kept.replies.values()] == ["\ufffd [[A]]"] * 2


@pytest.mark.parametrize("told", [-(10**9), 0, 10**12, 10**400, True, 1.5, "7", None, [1], {}])
def test_a_count_that_can_not_be_does_not_move_the_budget(tmp_path, told):
    with serving(lambda n, text: completion("[[A]] " + "word " * 94, total_tokens=told)) as server:
        judge = judge_at(server.url, tmp_path)
        judge.compare(ITEM)
        words = sum(len(t.split()) for t in server.seen) + 2 * 95
    assert judge.spent["tokens"] == pytest.approx(1.3 * words, abs=1)
    again = judge_at("http://127.0.0.1:9/v1", tmp_path)
    assert again.spent == judge.spent


def test_what_can_not_be_in_an_older_file_is_passed_over(tmp_path):
    counts = [5, -(10**9), 10**12, "x", None, True]
    rows = [{"key": str(i), "reply": {"text": "[[A]]", "tokens": t}} for i, t in enumerate(counts)]
    replies = [{}, {"text": None}, {"logp": "A"}, {"logp": {}}, {"logp": {"A": "x"}}, {"text": "", "logp": None}]
    rows += [{"key": f"reply {i}", "reply": r} for i, r in enumerate(replies)]
    (tmp_path / "judge.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "[" * 100_000 + "\n")
    assert judge_at("http://127.0.0.1:9/v1", tmp_path).spent == {"calls": 1, "tokens": 5}


SECRET = "sk-1234567890abcdef"


@pytest.mark.parametrize("status", [200, 400, 401])
@pytest.mark.parametrize("before", [0, 110, 195])
def test_a_key_that_is_echoed_is_neither_told_nor_kept(tmp_path, monkeypatch, status, before):
    monkeypatch.setenv("A_KEY", SECRET + "\n")
    with serving(lambda n, text: (status, {}, "y" * before + f"you sent Bearer {SECRET}")) as server:
        with pytest.raises(SteersmanError) as told:
            judge_at(server.url, tmp_path).compare(ITEM)
        assert server.headers_seen[0]["authorization"] == f"Bearer {SECRET}"
    assert SECRET[:6] not in str(told.value)
    with serving(lambda n, text: completion(f"[[A]] for {SECRET}")) as server:
        judge_at(server.url, tmp_path).compare(ITEM)
    assert "[key]" in (tmp_path / "judge.jsonl").read_text()
    assert SECRET not in (tmp_path / "judge.jsonl").read_text()


def test_a_key_that_can_not_be_sent_is_not_told(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-12345\n67890")
    with pytest.raises(SteersmanError, match="environment variable A_KEY holds characters") as told:
        judge_at("http://127.0.0.1:9/v1", tmp_path).compare(ITEM)
    assert "12345" not in str(told.value)


@pytest.mark.parametrize("wait", ["nan", "-1", "inf", "Wed, 21 Oct 99999999999 07:28:00 GMT", "soon"])
def test_a_pause_that_can_not_be_is_the_usual_one(tmp_path, wait):
    with serving(lambda n, text: (429, {"retry-after": wait}, "") if n == 0 else completion("[[A]]")) as server:
        start = time.perf_counter()
        judge_at(server.url, tmp_path, endpoint={"retries": 2, "concurrency": 1}).compare(ITEM)
    assert time.perf_counter() - start < 2


def test_a_file_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with serving(lambda n, text: completion("[[A]]")) as server:
        judge = judge_at(server.url, tmp_path, cache=str(tmp_path / "file" / "judge.jsonl"))
        with pytest.raises(SteersmanError, match=r"judge\.jsonl: it can not be written"):
            judge.compare(ITEM)
