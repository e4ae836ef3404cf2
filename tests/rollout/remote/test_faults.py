"""What servers can do wrong: each is told by name, and nothing of it is learned from."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest
import torch
from remote_kit import asked, make_policy

from steersman.distributed.join import free_port
from steersman.guards import retry
from steersman.rollout import Engine, Sampling
from steersman.rollout.remote import ServerSettings, open_process, open_vllm
from steersman.rollout.remote.dialects import Batchwise, Call, Promptwise
from steersman.rollout.remote.launch import ServerProcess
from steersman.rollout.remote.replies import SampleRequest, replies
from steersman.rollout.remote.serve import EngineRoutes, Handler, routes
from steersman.rollout.remote.wire import ENGINE_KEY, BadReplyError, Server, ServerGoneError
from steersman.types import SteersmanError

ASKED = [SampleRequest([3, 4], (0, 0), 2, 4, 0)]
CALL = Call(Sampling(4), (0,), (2,), 35, True, False)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)


def choice(index: int, ids=(5, 6), logp=(-1.0, -2.0), finish: str = "stop") -> dict:
    content = [{"token_id": i, "logprob": x} for i, x in zip(ids, logp, strict=False)]
    return {"index": index, "token_ids": list(ids), "finish_reason": finish, "logprobs": {"content": content}}


def read(*choices, support=False):
    found = json.loads(json.dumps({"choices": list(choices)}))  # as it comes over the wire, NaN too
    return replies(Server("http://127.0.0.1:1", 1.0), found, ASKED, 35, support=support)


def test_answers_out_of_order_are_put_in_order():
    first, second = read(choice(1, (7,), (-0.5,)), choice(0))
    assert first.ids == [5, 6]
    assert second.ids == [7]
    assert second.logp == [-0.5]


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ([choice(0)], "1 answers where 2 were asked for"),
        ([choice(0), choice(0)], "each of 0 to 1 comes once"),
        ([choice(0), choice(2)], "each of 0 to 1 comes once"),
        ([choice(0), choice(1, (5, 35))], "ids outside the vocabulary of 35"),
        ([choice(0), choice(1, (5, -1))], "ids outside the vocabulary of 35"),
        ([choice(0), choice(1, logp=(-1.0, math.nan))], "weights may hold NaN"),
        ([choice(0), choice(1, logp=(-1.0, -9999.0))], "weights may hold NaN"),
        ([choice(0), choice(1, logp=(-1.0, 0.5))], "log-probabilities for 2 tokens"),
        ([choice(0), choice(1, logp=(-1.0,))], "1 log-probabilities for 2 tokens"),
        ([choice(0), choice(1, (5,) * 5, (-1.0,) * 5)], "5 tokens where 4 were the most"),
        ([choice(0), choice(1, (), ())], "0 tokens that ended with stop"),
        ([choice(0), choice(1, finish="length")], "cut after 2 of the 4 tokens that it may have.*--max-model-len"),
        ([choice(0), choice(1, finish="error\x1b[2J")], "ended with error"),
    ],
)
def test_a_reply_that_can_not_be_right_is_refused(choices, said):
    with pytest.raises(BadReplyError, match=said) as caught:
        read(*choices)
    assert "\x1b" not in str(caught.value)


PARTS = {
    "logprobs, a list": ({"logprobs": [1]}, "logprobs that are no object"),
    "logprobs, a text": ({"logprobs": "none"}, "logprobs that are no object"),
    "content, a number": ({"logprobs": {"content": 5}}, "logprobs.content that is no list of objects"),
    "content, an object": ({"logprobs": {"content": {"a": 1}}}, "logprobs.content that is no list of objects"),
    "content, numbers": ({"logprobs": {"content": [-1.0, -2.0]}}, "logprobs.content that is no list of objects"),
    "no logprobs": ({"logprobs": None}, "0 log-probabilities for 2 tokens"),
    "logprob, true or false": (
        {"logprobs": {"content": [{"logprob": False}, {"logprob": -1.0}]}}, "log-probabilities for 2 tokens"
    ),
    "versions, texts": ({"weight_versions": ["run:1"]}, "weight_versions that is no list of objects"),
    "versions, a number": ({"weight_versions": 3}, "weight_versions that is no list of objects"),
    "span, texts": (
        {"weight_versions": [{"version": "r:1", "start": "0", "end": "2"}]}, "weight_versions that has other numbers"
    ),
    "number, true or false": ({"index": True}, "an answer has the number True"),
    "finish, a list": ({"finish_reason": []}, "ended with"),
    "mask, too short": ({"sampling_mask": [[5]]}, "2 tokens whose sampling_mask does not list those allowed at each"),
    "mask, empty": ({"sampling_mask": []}, "2 tokens whose sampling_mask does not list"),
    "mask, a number": ({"sampling_mask": 5}, "2 tokens whose sampling_mask does not list"),
    "mask, of texts": ({"sampling_mask": [["a"], [6]]}, "sampling_mask that has other numbers than ids"),
    "mask, of numbers": ({"sampling_mask": [5, 6]}, "sampling_mask that has other numbers than ids"),
    "mask, of halves": ({"sampling_mask": [[5.5], [6]]}, "sampling_mask that has other numbers than ids"),
    "mask, beyond any id": ({"sampling_mask": [[10**30], [6]]}, "sampling_mask that has other numbers than ids"),
    "no likeliest": ({"sampling_mask": None}, "neither a sampling_mask nor the log-probabilities of the likeliest"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), PARTS.values(), ids=PARTS)
def test_a_reply_with_parts_of_other_types_is_refused(change, said):
    with pytest.raises(BadReplyError, match=said):
        read(
            choice(0) | {"sampling_mask": [[5], [6]]},
            choice(1) | {"sampling_mask": [[5], [6]]} | change,
            support=True,
        )


@pytest.mark.parametrize(
    ("likeliest", "said"),
    [
        ([{"token_id": "5", "logprob": -1.0}], "top_logprobs that has other numbers than ids"),
        ([{"token_id": 5}], "the log-probabilities of the likeliest"),
        ([{"token_id": 5, "logprob": "-1"}], "the log-probabilities of the likeliest"),
        ([{"logprob": -1.0}], "top_logprobs that has other numbers than ids"),
        ([5], "top_logprobs that is no list of objects"),
        ({"5": -1.0}, "top_logprobs that is no list of objects"),
        ([], "the log-probabilities of the likeliest"),
    ],
)
def test_likeliest_tokens_of_other_types_are_refused(likeliest, said):
    two = choice(1)
    two["logprobs"]["content"][1]["top_logprobs"] = likeliest
    two["logprobs"]["content"][0]["top_logprobs"] = [{"token_id": 5, "logprob": -1.0}]
    with pytest.raises(BadReplyError, match=said):
        read(choice(0) | {"sampling_mask": [[5], [6]]}, two, support=True)


def test_allowed_tokens_are_those_told_or_the_likeliest_that_can_be_reached():
    two = choice(1) | {"weight_versions": [{"version": "run-1:3", "start": 0, "end": 2}]}
    likeliest = [{"token_id": 9, "logprob": -1.0}, {"token_id": 8, "logprob": -9999.0}]
    for one in two["logprobs"]["content"]:
        one["top_logprobs"] = likeliest
    told, listed = read(choice(0) | {"sampling_mask": [[5, 7], [-4, -9]]}, two, support=True)
    assert [ids.tolist() for ids in told.support] == [[5, 7], [-4, -9]]
    assert [ids.tolist() for ids in listed.support] == [[5, 9], [6, 9]]
    assert told.version is None
    assert listed.version == [3, 3]


@pytest.mark.parametrize("name", ["", "run", "run:x", "run:\u00b2", "run:" + "9" * 5000])
def test_a_version_that_is_no_number_is_not_told(name):
    changed = choice(1) | {"weight_versions": [{"version": name, "start": 0, "end": 2}]}
    assert read(choice(0), changed)[1].version is None


class Stub:
    """A server of fixed answers by route, or the status that it fails with, alone or with a body; a route that is not
    there is a 404."""

    def __init__(self, **answers) -> None:
        table = {"/" + name.replace("__", "/"): value for name, value in answers.items()}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.rfile.read(int(self.headers.get("content-length") or 0))
                value = table.get(self.path.split("?")[0])
                value = value() if callable(value) else value
                status, value = value if isinstance(value, tuple) else (200, value)
                if value is None or isinstance(value, int):
                    status = value or 404
                body = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def opened(kind, stub: Stub, **extra):
    return kind(
        make_policy(), ServerSettings(**{"ends": (2,), "max_batch": 4, "urls": (stub.url,), "timeout": 0.5, **extra})
    )


@pytest.mark.parametrize(
    ("kind", "answers", "said"),
    [
        (open_vllm, {"version": {"version": "0.11.0"}}, "vLLM 0.11.0; its routes for training came with 0.32.0"),
        (open_vllm, {"version": {"version": "0.32.0"}, "v1__models": {"data": [{"id": "other"}]}},
         "it serves other, not policy"),
        (open_vllm, {"version": {"version": "0.32.0"}, "v1__models": {"data": 5}}, "no list of the models"),
        (open_vllm, {"version": {"version": "0.\u00b2"}}, "its routes for training came with 0.32.0"),
        (open_vllm, {"version": {"version": "0.32.0"}, "v1__models": {"data": [{"id": "policy"}]}},
         "no route /weight_info.*VLLM_SERVER_DEV_MODE"),
        (open_process, {"version": {"version": "0.32.0"}}, "no engine of steersman"),
        (open_process, {"version": b"<html>"}, "is no JSON"),
        (open_process, {}, "no route /version"),
        (open_process, {"version": lambda: time.sleep(2)}, "took /version and gave no answer within 0.5 seconds"),
    ],
)  # fmt: skip
def test_a_server_of_another_kind_is_named(kind, answers, said):
    with pytest.raises(SteersmanError, match=said):
        opened(kind, Stub(**answers))


@pytest.mark.parametrize(("health", "is_gone"), [(503, True), ({}, False)])
def test_a_server_whose_engine_is_gone_is_as_good_as_dead(health, is_gone):
    """vLLM's front outlives the process with the model by some seconds, in which it answers 500."""
    stub = Stub(inference__v1__generate=500, health=health)
    with pytest.raises(SteersmanError, match="status 500 of /inference/v1/generate") as caught:
        Server(stub.url, 5.0).post("/inference/v1/generate")
    assert isinstance(caught.value, ServerGoneError) is is_gone


def test_health_is_asked_over_a_connection_of_its_own():
    """uvicorn closes the connection of a request that raised, with whatever was sent over it by then."""

    class Closing(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        failed = False

        def do_POST(self):
            if self.failed:
                self.close_connection = True
                return
            status = 200 if self.path == "/health" else 500
            self.failed = status == 500
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Closing)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    server = Server(f"http://127.0.0.1:{http.server_port}", 5.0)
    with pytest.raises(SteersmanError, match="status 500 of /start_weight_update") as caught:
        server.post_once("/start_weight_update")
    assert not isinstance(caught.value, ServerGoneError)
    server.close()
    http.shutdown()


def test_an_update_that_a_killed_run_left_is_finished_before_the_next():
    active, done = [True], []

    def start():
        if active:
            return 500, {"error": {"message": "start_weight_update called while a weight update is already active."}}
        active.append(True)
        return {}

    stub = Stub(
        start_weight_update=start, update_weights=lambda: done.append(list(active)) or {}, health={},
        finish_weight_update=lambda: active.clear() or {}, reset_prefix_cache={},
    )  # fmt: skip
    server = Server(stub.url, 5.0)
    server.load("/dev/shm/x", "ab12:3")
    assert done == [[True]]
    assert not active
    server.close()


class NoMemory:
    """An engine whose allocation fails, as torch reports it."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def generate(self, *_, **__):
        raise self.error


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")]
)
def test_a_server_out_of_memory_says_so_and_goes_on(error):
    """Our server's own routes over HTTP; the next call is answered again."""
    desk = EngineRoutes(make_policy, 4)
    engine, desk.engine = desk.engine, NoMemory(error)  # type: ignore[assignment]
    table = routes(desk)
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Routes", (Handler,), {"table": table}))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    server = Server(f"http://127.0.0.1:{http.server_port}", 20.0)
    done = {}
    ask = lambda: Batchwise().complete(server, dict(enumerate(ASKED)), CALL, done)  # noqa: E731
    with pytest.raises(SteersmanError, match=rf"status 500 of /inference/v1/generate.*{str(error)[:10]}"):
        ask()
    desk.engine = engine
    ask()
    assert len(done[0]) == 2
    server.close()
    http.shutdown()


def dripping(head: bytes, piece: bytes) -> str:
    """The address of a server that sends the head of a reply, and then a piece every 50 ms for as long as it can."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        with listener, listener.accept()[0] as one, contextlib.suppress(OSError):
            one.recv(65536)
            one.sendall(head)
            while True:
                one.sendall(piece)
                time.sleep(0.05)

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


OPEN_END = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n"


def test_a_server_that_drips_does_not_hold_the_run():
    """Each byte comes in time; the reply never does."""
    server = Server(dripping(OPEN_END, b" "), 0.5)
    with pytest.raises(ServerGoneError, match=r"took /version and gave no answer within 0.5 seconds"):
        server.get("/version")
    server.close()


def test_a_reply_without_end_is_cut(monkeypatch):
    monkeypatch.setattr("steersman.rollout.remote.wire.LARGEST_REPLY", 1 << 20)
    server = Server(dripping(OPEN_END, b"[" * 65536), 30.0)
    with pytest.raises(BadReplyError, match="more than 1 MiB"):
        server.get("/version")
    server.close()


def test_a_server_that_is_not_there_is_named():
    wanted = ServerSettings((2,), 4, urls=(f"http://127.0.0.1:{free_port()}",), timeout=1.0)
    with pytest.raises(SteersmanError, match=r"^rollout\.url: .*it can not be reached.*Name servers"):
        open_process(make_policy(), wanted)


def test_two_runs_on_one_server_are_told_apart(running):
    policy, owner = running
    owner.update_weights(1)
    url = owner.stations[0].server.url
    one, two = (open_process(policy, ServerSettings((2,), 8, urls=(url,), timeout=60.0)) for _ in range(2))
    one.update_weights(1)
    two.update_weights(1)
    for act in (lambda: one.generate(asked(), Sampling(4)), lambda: one.update_weights(2)):
        with pytest.raises(SteersmanError, match="another run has loaded its weights"):
            act()
    one.close()
    two.close()
    owner.update_weights(2)


class Elsewhere:
    """Our server's own routes in a thread; `dead`, it ends every connection without a word, and with `troubles` it
    does so with as many requests for samples, or answers them with these statuses. `asked` has every path."""

    def __init__(self) -> None:
        self.desk, self.dead, self.troubles = EngineRoutes(make_policy, 8), False, []
        self.asked: list[str] = []
        outer = self

        class Routes(Handler):
            key = os.environ[ENGINE_KEY]

            def _answer(self, body):
                outer.asked.append(self.path)
                bad = outer.troubles.pop() if outer.troubles and "generate" in self.path else None
                if outer.dead or bad == "drop":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                elif bad is not None:
                    self._send(bad, {"error": "busy"})
                else:
                    self.table = routes(outer.desk)
                    super()._answer(body)

        http = ThreadingHTTPServer(("127.0.0.1", 0), Routes)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        self.url, self.close = f"http://127.0.0.1:{http.server_port}", http.shutdown


def test_a_server_of_an_address_that_dies_leaves_its_prompts_to_the_others(running, tmp_path, capsys):
    """Two addresses, and weights in a folder of a file system: each answers its share; one that is gone, or was
    started anew without the weights, is passed over until new weights find it there."""
    policy, owner = running
    owner.update_weights(1)
    other, sampling = Elsewhere(), Sampling(20)
    urls = (owner.stations[0].server.url, other.url)
    generator = open_process(policy, ServerSettings((2,), 8, urls=urls, timeout=60.0, folder=str(tmp_path)))
    wanted = Engine(policy.model, policy.tokenizer, eos_token_id=[2]).generate(asked(), sampling, n=2, seed=5)

    def right() -> bool:
        there = generator.generate(asked(), sampling, n=2, seed=5)
        return [s.ids for s in there] == [s.ids for s in wanted]

    assert generator.update_weights(1)["sync/servers"] == 2
    assert [path.name for path in tmp_path.glob("*/weights-*")] == ["weights-1.safetensors"]
    assert right()
    other.dead = True
    for _ in range(2):
        assert right()
        assert generator.stations[1].gone
    assert capsys.readouterr().err.count("The other servers take its prompts") == 1
    other.asked.clear()
    assert generator.update_weights(2)["sync/servers"] == 1
    assert other.asked == ["/health"]  # one that was gone already costs no update its time limit
    other.dead, other.desk = False, EngineRoutes(make_policy, 8)
    assert generator.update_weights(3)["sync/servers"] == 2
    assert right()
    other.desk = EngineRoutes(lambda: make_policy(seed=9), 8)
    assert right()
    assert generator.stations[1].gone
    assert "started anew" in capsys.readouterr().err
    generator.close()
    assert not list(tmp_path.iterdir())
    other.close()
    owner.update_weights(2)


def test_a_stop_string_at_the_least_length_ends_a_response_though_the_server_goes_on():
    """vLLM looks for stop strings from the token behind `min_tokens` on; the engine, from that token on."""
    server, sampling = Elsewhere(), Sampling(6, min_new_tokens=3, stop=tuple("aeiourst"))
    generator = open_process(make_policy(), ServerSettings((), 8, urls=(server.url,), timeout=20.0))
    told = lambda: [(s.ids, s.finish, s.text, len(s.logp)) for s in generator.generate(asked(), sampling, seed=3)]  # noqa: E731
    wanted, real = told(), server.desk.generate
    assert any(len(ids) == 3 for ids, *_ in wanted)

    def one_later(body):
        params = body["sampling_params"]
        return real(body | {"sampling_params": params | {"min_tokens": params["min_tokens"] + 1}})

    server.desk.generate = one_later
    assert told() == wanted
    generator.close()
    server.close()


@pytest.mark.parametrize("troubles", [[503], [502, 429], ["drop"], ["drop", 504, "drop", 503]])
def test_a_bad_moment_of_a_healthy_server_is_waited_out(troubles):
    server = Elsewhere()
    generator = open_process(make_policy(), ServerSettings((2,), 8, urls=(server.url,), timeout=20.0))
    generator.update_weights(0)
    wanted = [s.ids for s in generator.generate(asked(), Sampling(4), seed=3)]
    server.troubles = list(troubles)
    assert [s.ids for s in generator.generate(asked(), Sampling(4), seed=3)] == wanted
    assert not server.troubles
    generator.close()
    server.close()


def test_a_server_that_stays_busy_is_told_with_what_it_said():
    server = Elsewhere()
    generator = open_process(make_policy(), ServerSettings((2,), 8, urls=(server.url,), timeout=20.0))
    generator.update_weights(0)
    for trouble, said in (
        (503, "status 503 of .*busy"),
        ("drop", r"RemoteProtocolError.*see that it runs; the same command \(with --resume where"),
    ):
        server.troubles = [trouble] * 9
        with pytest.raises(SteersmanError, match=said):
            generator.generate(asked(), Sampling(4))
        assert len(server.troubles) == 9 - 5
    generator.close()
    server.close()


def test_a_healthy_process_is_asked_again_and_not_replaced(running, monkeypatch):
    generator = running[1]
    generator.update_weights(1)
    station, lost = generator.stations[0], []
    pid, restarts, real = station.process.pid, station.restarts, station.server._exchange

    def lossy(method, path, body):
        if not lost:
            lost.append(path)
            raise httpx2.RemoteProtocolError("Server disconnected without sending a response.")
        return real(method, path, body)

    monkeypatch.setattr(station.server, "_exchange", lossy)
    assert len(generator.generate(asked(), Sampling(4))) == 5
    assert lost == ["/inference/v1/generate"]
    assert (station.process.pid, station.restarts) == (pid, restarts)


def refused_with(words: str) -> tuple[int, dict]:
    """How vLLM says that it does not find something."""
    return 404, {"error": {"message": words, "type": "NotFoundError", "param": None, "code": 404}}


def test_adapters_that_a_server_does_not_have_any_more_are_no_missing_route():
    stub = Stub(inference__v1__generate=refused_with("The model `ab12:3` does not exist."))
    call = replace(CALL, adapter="ab12:3")
    with pytest.raises(ServerGoneError, match=r"`ab12:3` does not exist; it was started anew"):
        Promptwise("policy").complete(Server(stub.url, 5.0), dict(enumerate(ASKED)), call, {})


def test_adapters_whose_folder_a_server_can_not_see_are_told_with_the_key():
    stub = Stub(
        v1__load_lora_adapter=refused_with("No adapter found for /dev/shm/x"),
        v1__unload_lora_adapter=refused_with("The lora adapter 'ab12:2' cannot be found."),
    )
    with pytest.raises(SteersmanError, match=r"No adapter found for /dev/shm/x; .*rollout\.folder"):
        Server(stub.url, 5.0).load_adapter("/dev/shm/x", "ab12:3")
    Server(stub.url, 5.0).unload_adapter("ab12:2")  # it is not there, which is what was wanted


def test_a_folder_for_weights_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SteersmanError, match=r"rollout\.folder: .*/none: no folder can be made there"):
        open_process(
            make_policy(), ServerSettings((2,), 4, urls=("http://127.0.0.1:1",), folder=str(tmp_path / "none"))
        )


def launched(tmp_path, script: str, timeout: float = 20.0) -> ServerProcess:
    return ServerProcess(
        "toy server", lambda port: [sys.executable, "-c", script, str(port)], tmp_path / "log", timeout=timeout
    )


def test_a_server_that_dies_at_start_tells_its_first_error(tmp_path):
    script = (
        "import sys\nprint('ValueError: the root of it \\x1b[2J')\nprint('RuntimeError: what follows')\nsys.exit(3)"
    )
    one = launched(tmp_path, script)
    one.start()
    with pytest.raises(
        ServerGoneError, match=r"toy server: ended before it answered.*ValueError: the root of it"
    ) as caught:
        one.wait()
    assert "what follows" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    one.stop()


def test_a_server_that_does_not_answer_in_time_is_ended(tmp_path):
    one = launched(tmp_path, "import time; time.sleep(60)", timeout=0.5)
    one.start()
    with pytest.raises(SteersmanError, match=r"did not answer within 0\.5 seconds"):
        one.wait()
    assert not one.alive()


SERVES = """
import sys, http.server, pathlib
tries = pathlib.Path("{marker}")
if not tries.exists():
    tries.write_text("")
    sys.exit("OSError: [Errno 98] Address already in use")
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), H).serve_forever()
"""


def test_a_port_that_was_taken_meanwhile_is_left_for_another(tmp_path):
    one = launched(tmp_path, SERVES.format(marker=tmp_path / "m"))
    one.start()
    assert one.wait().healthy()
    one.stop()
    assert not one.alive()
