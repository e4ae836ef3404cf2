"""Who answers in chats: a model of this process that many ask at once, and one behind a real server."""

from __future__ import annotations

import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from letter_models import save_chat_mini

pytest.importorskip("starlette", reason="needs the extra people")

from starlette.testclient import TestClient

from steersman.data import DataConfig, layout
from steersman.model import load_policy
from steersman.people.collect.answering import AnsweringModel, AnsweringSampling, open_answerer
from steersman.people.collect.app import make_app
from steersman.people.collect.verb import CollectRecipe, run
from steersman.people.collect.visit import Site
from steersman.people.store import open_store
from steersman.people.store.conversations import TurnText
from steersman.rollout import Engine, Sampling
from steersman.types import Prompt, SteersmanError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_mini(tmp_path_factory.mktemp("answering"), context=256)


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_answers_asked_for_at_once_are_each_as_if_alone(folder):
    sampling = AnsweringSampling(max_new_tokens=24)
    model = open_answerer(AnsweringModel(path=str(folder), device="cpu"), sampling)
    with ThreadPoolExecutor(12) as pool:
        told = list(pool.map(lambda i: model.answer(asked("hm" + "m" * i), "r-1"), range(12)))
    policy = load_policy(folder, trainable=False, device="cpu")
    how = Sampling(24, temperature=sampling.temperature, top_p=sampling.top_p)
    for i, said in enumerate(told):
        ids, _ = layout(policy, DataConfig(path="chat")).prompt(asked("hm" + "m" * i))
        alone = Engine(policy.model, policy.tokenizer).generate([Prompt(ids, "")], how, seed=said.sampling["seed"])
        assert said.content == alone[0].text.strip()
    assert {said.model[0] for said in told} == {folder.name}


def test_two_models_of_one_name_are_refused_before_either_is_loaded(tmp_path):
    models = {"model": AnsweringModel(path="runs/dpo/model"), "second": AnsweringModel(path="runs/kto/model/")}
    with pytest.raises(SteersmanError, match=r"both are called 'model'.*second\.name"):
        run(CollectRecipe(store=str(tmp_path / "f.db"), **models))


def test_a_conversation_longer_than_the_model_reads_is_refused(folder):
    model = open_answerer(AnsweringModel(path=str(folder), device="cpu"), AnsweringSampling())
    with pytest.raises(SteersmanError, match=r"256|context"):
        model.answer(asked("m" * 400), "r-1")
    assert model.answer(asked("m" * 200), "r-1").finish in (
        "length",
        "eos",
    )  # less than 256 new tokens fit: what fits comes


@contextmanager
def address(status: int, body: bytes, seen: list):
    """An OpenAI-compatible address that gives one reply."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append((self.path, self.headers, json.loads(self.rfile.read(int(self.headers["content-length"])))))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()


def test_a_model_behind_an_address(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret-key")
    reply = {"model": "far-2", "choices": [{"message": {"content": " 你好 "}, "finish_reason": "stop"}]}
    with address(200, json.dumps(reply).encode(), seen := []) as url:
        model = AnsweringModel(url=url, name="far", key_env="SOME_KEY")
        said = open_answerer(model, AnsweringSampling(max_new_tokens=9)).answer(asked("hello"), "r-1")
    assert (said.content, said.model, said.finish) == ("你好", ("far-2", ""), "stop")
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer secret-key"
    assert body == {
        "model": "far", "messages": asked("hello"), "max_tokens": 9, "temperature": 0.7, "top_p": 0.95,
        "user": "r-1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, b"secret-key is wrong", "status 401"),
        (200, b"[]", "no chat completion"),
        (200, b"{", "no chat completion"),
        (200, b"[" * 100_000, "no chat completion"),
        (200, b'{"choices": [{"message": {"content": [1]}}]}', "no chat completion"),
    ],
)
def test_what_goes_wrong_at_an_address_is_told_without_the_key(monkeypatch, status, body, told):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    with address(status, body, []) as url, pytest.raises(SteersmanError, match=told) as caught:
        open_answerer(AnsweringModel(url=url, name="far"), AnsweringSampling()).answer(asked("hello"), "r-1")
    assert "secret-key" not in str(caught.value)


def test_an_answer_is_kept_without_the_key_and_half_pairs(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    body = b'{"model": "secret-key", "choices": [{"message": {"content": "my secret-key \\ud83d"}}]}'
    with address(200, body, []) as url:
        said = open_answerer(AnsweringModel(url=url, name="far"), AnsweringSampling()).answer(asked("hello"), "r-1")
    assert (said.content, said.model[0]) == ("my [key] \ufffd", "[key]")


@pytest.mark.parametrize(("name", "value"), [("LARGEST_REPLY", 100), ("LONGEST_WAIT", -1.0)])
def test_a_reply_beyond_all_bounds_is_no_answer(monkeypatch, name, value):
    monkeypatch.setattr(f"steersman.people.collect.answering.{name}", value)
    body = json.dumps({"choices": [{"message": {"content": "a" * 200}}]}).encode()
    with address(200, body, []) as url, pytest.raises(SteersmanError, match="no chat completion"):
        open_answerer(AnsweringModel(url=url, name="far"), AnsweringSampling()).answer(asked("hello"), "r-1")


def test_pages_come_while_many_wait_for_a_model(tmp_path):
    """More wait for a slow model than pages are made at once, and a page still comes."""
    begun, go_on = threading.Semaphore(0), threading.Event()

    class Slow:
        def answer(self, messages, user):
            begun.release()
            assert go_on.wait(60)
            return TurnText("at last", ("slow", "1"))

    store = open_store(tmp_path / "feedback.db")
    site = Site(store, answerers=[Slow()])
    with TestClient(make_app(site), "http://127.0.0.1") as client, ThreadPoolExecutor(50) as pool:
        client.get(f"/enter/{site.key}")
        page = client.get("/chat")
        csrf = page.text.split('name="csrf" value="')[1].split('"')[0]
        chats = [client.post("/chat", data={"csrf": csrf}).url.path for _ in range(50)]
        waiting = [
            pool.submit(client.post, f"{c}/say", data={"csrf": csrf, "key": str(uuid.uuid4()), "text": "hello"})
            for c in chats
        ]
        for _ in chats:
            assert begun.acquire(timeout=60)
        assert client.get("/").status_code == 200
        go_on.set()
        assert all("at last" in one.result().text for one in waiting)
    store.close()
