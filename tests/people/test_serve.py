"""A real server on a free port, asked by the official client."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import torch
from letter_models import save_chat_mini, save_mini

from steersman.cli import main
from steersman.model import load_policy
from steersman.rollout import Engine, Sampling
from steersman.rollout.text import Texts
from steersman.types import Prompt, SteersmanError

openai = pytest.importorskip("openai", reason="needs the openai client")
pytest.importorskip("uvicorn", reason="needs steersman[people]")
from serve_kit import running, served_from  # noqa: E402
from starlette.applications import Starlette  # noqa: E402
from starlette.responses import JSONResponse, StreamingResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402

from steersman.people.serve.app import Server  # noqa: E402
from steersman.people.serve.assignment import Assignment  # noqa: E402
from steersman.people.serve.backend import Backend, BackendSection  # noqa: E402
from steersman.people.serve.growing_text import SettledText  # noqa: E402
from steersman.people.serving import ServedModel as ServedModel  # noqa: E402
from steersman.people.serving import Serving, read_serving  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_mini(tmp_path_factory.mktemp("serve"), context=256)


@pytest.fixture(scope="module")
def other(tmp_path_factory, folder):
    """The same model with other weights."""
    place = save_mini(tmp_path_factory.mktemp("other"), seed=1, context=256)
    load_policy(folder, trainable=False, device="cpu").tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def url(folder):
    models, keys = {"mini": served_from(folder)}, {"keys": ("right-key", "guest"), "admin_keys": ("right-key",)}
    with running(Server(models, load=served_from, hosts=("127.0.0.1",), **keys)) as address:
        yield address


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="right-key", max_retries=0)


def expected(folder, text: str, sampling: Sampling, seed: int) -> str:
    policy = load_policy(folder, trainable=False, device="cpu")
    ids = policy.tokenizer.encode(text, add_special_tokens=False)
    return Engine(policy.model, policy.tokenizer).generate([Prompt(ids, text)], sampling, seed=seed)[0].text


def test_the_chat_template_is_used_and_streams_equal_whole_answers(client, folder):
    ask = {"model": "mini", "messages": [{"role": "user", "content": "hm"}], "max_tokens": 30, "seed": 5}
    whole = client.chat.completions.create(**ask)
    assert whole.choices[0].message.content == expected(folder, "u hm\na ", Sampling(30), 5)
    assert whole.usage.prompt_tokens == len("u hm\na ")
    streamed = "".join(c.choices[0].delta.content or "" for c in client.chat.completions.create(**ask, stream=True))
    assert streamed == whole.choices[0].message.content


@pytest.mark.parametrize("length", [1, 2])
def test_no_stop_string_is_ever_in_a_stream(client, monkeypatch, length):
    """Also where the stream is read while the engine looks whether the token that it appended ends the answer."""
    ask = {"model": "mini", "prompt": "look at", "max_tokens": 30, "n": 2, "logprobs": 0}
    said = {seed: client.completions.create(**ask, seed=seed).choices[0].text for seed in range(16)}
    stops = {seed: text[-length:] for seed, text in said.items() if len(text) > 4}
    assert len(stops) > 3

    def looks_slowly(self, prompt, ids, look=Texts.stopped):
        found = look(self, prompt, ids)
        time.sleep(0.02)
        return found

    monkeypatch.setattr(Texts, "stopped", looks_slowly)
    for seed, stop in stops.items():
        asked = ask | {"seed": seed, "stop": stop}
        whole = client.completions.create(**asked).choices
        texts, tokens = ["", ""], [[], []]
        for chunk in client.completions.create(**asked, stream=True):
            one = chunk.choices[0]
            texts[one.index] += one.text
            tokens[one.index] += one.logprobs.tokens
        assert texts == [one.text for one in whole]
        assert tokens == [one.logprobs.tokens for one in whole]
        assert not any(stop in text for text in texts)


def test_sixteen_streams_at_once_are_each_as_if_alone(client, folder):
    def one(seed: int) -> str:
        stream = client.completions.create(
            model="mini", prompt="look at", max_tokens=20 + seed, seed=seed, temperature=seed % 2, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(one, range(16)))
    assert got == [expected(folder, "look at", Sampling(20 + s, temperature=s % 2), s) for s in range(16)]


def test_a_model_is_swapped_and_no_request_is_dropped(client, url, folder, other):
    def one(seed: int) -> str:
        return client.completions.create(model="mini", prompt="oh", max_tokens=60, seed=seed).choices[0].text

    def swap(path) -> None:
        body = json.dumps({"path": str(path)}).encode()
        headers = {"Authorization": "Bearer right-key", "Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{url}/admin/models/mini", body, headers, method="POST"))

    olds, news = ([expected(place, "oh", Sampling(60), s) for s in range(24)] for place in (folder, other))
    with ThreadPoolExecutor(24) as pool:
        under_way = [pool.submit(one, s) for s in range(24)]
        swap(other)
        got = [future.result() for future in under_way]
    assert all(text in (old, new) for text, old, new in zip(got, olds, news, strict=True))
    assert [one(s) for s in range(3)] == news[:3]
    swap(folder)
    assert one(0) == olds[0]


def test_only_its_own_names_and_routes_are_answered(client, url):
    request = urllib.request.Request(f"{url}/v1/models", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    with pytest.raises(openai.NotFoundError, match="there is no POST /v1/embeddings"):
        client.embeddings.create(model="mini", input="a")
    plain, right = "text/plain", "application/json"
    for body, kind in ((b"{}", right), (b'{"path": "/no/such/folder"}', right), (b"[", right), (b"{}", plain)):
        headers = {"Authorization": "Bearer right-key", "Content-Type": kind}
        asked = urllib.request.Request(f"{url}/admin/models/mini", body, headers, method="POST")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(asked)
    guest = {"Authorization": "Bearer guest", "Content-Type": right}
    with pytest.raises(urllib.error.HTTPError, match="403"):  # who may ask may not exchange models
        urllib.request.urlopen(urllib.request.Request(f"{url}/admin/models/mini", b"{}", guest, method="POST"))


def test_refusals_have_openais_shape(client, url):
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(model="mini", prompt="a", echo=True)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="mini", prompt="a", temperature="hot")
    for cold in (1e-39, 0.009):
        with pytest.raises(openai.BadRequestError, match=r"temperature: .*any other is at least 0\.01"):
            client.completions.create(model="mini", prompt="a", temperature=cold)
    with pytest.raises(openai.BadRequestError, match="n is 45; this server takes at most 44 answers"):
        client.completions.create(model="mini", prompt="a", n=45)
    with pytest.raises(openai.BadRequestError, match="prompt: Field required"):
        client.completions.create(model="mini", prompt=None)
    with pytest.raises(openai.BadRequestError, match="at most 100"):
        client.completions.create(model="mini", prompt="a" * 101, max_tokens=4)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
    spent = {"model": "mini", "prompt": "a", "max_tokens": 1}
    for kind in ("text/plain", "application/x-www-form-urlencoded"):  # what a web page may send anywhere, unasked
        headers = {"Authorization": "Bearer right-key", "Content-Type": kind}
        asked = urllib.request.Request(f"{url}/v1/completions", json.dumps(spent).encode(), headers, method="POST")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(asked)
    for body in (b"{", b"\xff", b"[" * 100_000, b'{"model": "mini", "prompt": "\\ud800"}', b"3"):
        request = urllib.request.Request(
            f"{url}/v1/completions",
            body,
            {"Authorization": "Bearer right-key", "Content-Type": "application/json"},
            method="POST",
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert caught.value.code == 400
        assert "message" in json.load(caught.value)["error"]


def test_null_means_what_leaving_a_field_out_means(client):
    sampling = dict.fromkeys(["max_tokens", "temperature", "top_p", "n", "stop", "seed"])
    others = dict.fromkeys(["stream", "stream_options", "logprobs", "user"])
    nulls = {**sampling, **others, "extra_body": dict.fromkeys(["top_k", "min_p"])}
    assert len(client.completions.create(model="mini", prompt="a", **nulls).choices) == 1
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(model="mini", prompt="a", extra_body={"echo": None})


def test_an_open_address_without_keys_is_refused(folder, capsys):
    assert main(["serve", str(folder), "--serve.host", "0.0.0.0"]) == 2
    assert "--serve.token_file" in " ".join(capsys.readouterr().err.split())


def test_a_client_that_leaves_makes_room(client, url):
    """Four rows are taken by long answers; when their clients leave, nothing is decoded any more."""

    def decoding() -> int:
        request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": "Bearer right-key"})
        lines = urllib.request.urlopen(request).read().decode().splitlines()
        return int(next(line for line in lines if line.startswith("steersman_decoding")).split()[-1])

    for seed in range(20):
        stream = client.completions.create(model="mini", prompt="a", max_tokens=100, n=8, seed=seed, stream=True)
        next(iter(stream))
        stream.close()
    end = time.monotonic() + 20
    while decoding():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert client.completions.create(model="mini", prompt="a", max_tokens=2).choices


def exact_logp(folder, prompt: str, text: str) -> list[float]:
    """Log-probability of each letter under the whole model, by a forward pass of transformers."""
    policy = load_policy(folder, trainable=False, device="cpu")
    ids = policy.tokenizer.encode(prompt + text, add_special_tokens=False)
    logp = policy.model(torch.tensor([ids])).logits.double().log_softmax(-1)[0]
    first = len(ids) - len(text)
    return [float(logp[i - 1, ids[i]]) for i in range(first, len(ids))]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_the_models_own(client, folder, stream):
    """Whatever the temperature: what is listed is the model's distribution, as transformers computes it."""
    ask = {"model": "mini", "max_tokens": 12, "seed": 3, "temperature": 0.5, "top_p": 0.9, "stream": stream}
    chat = client.chat.completions.create(
        **ask, messages=[{"role": "user", "content": "hm"}], logprobs=True, top_logprobs=2
    )
    choices = [c.choices[0] for c in chat] if stream else [chat.choices[0]]
    listed = [entry for c in choices if c.logprobs for entry in c.logprobs.content]
    text = "".join(entry.token for entry in listed)
    said = "".join((c.delta.content or "") if stream else c.message.content for c in choices)
    assert text == said
    assert [e.logprob for e in listed] == pytest.approx(exact_logp(folder, "u hm\na ", text), abs=1e-4)
    assert all(len(e.top_logprobs) == 2 and e.bytes == list(e.token.encode()) for e in listed)
    assert all(e.top_logprobs[0].logprob >= max(e.logprob, e.top_logprobs[1].logprob) for e in listed)
    plain = client.completions.create(**ask, prompt="look at", logprobs=1)
    parts = [c.choices[0] for c in plain] if stream else [plain.choices[0]]
    tokens = [token for c in parts if c.logprobs for token in c.logprobs.tokens]
    offsets = [offset for c in parts if c.logprobs for offset in c.logprobs.text_offset]
    told = [x for c in parts if c.logprobs for x in c.logprobs.token_logprobs]
    assert "".join(tokens) == "".join(c.text for c in parts)
    assert offsets == list(range(len(tokens)))
    assert told == pytest.approx(exact_logp(folder, "look at", "".join(tokens)), abs=1e-4)
    nothing = client.completions.create(**ask | {"stream": False}, prompt="look at")
    assert nothing.choices[0].logprobs is None


class CountingTexts:
    """Bytes as tokens, a character of several bytes showing only when it is whole; counts what it decodes."""

    stop = ("end",)

    def __init__(self):
        self.decoded = 0

    def response(self, prompt, ids):
        self.decoded += len(ids)
        return bytes(ids).decode(errors="replace")


def test_a_stream_decodes_each_token_a_few_times_however_long_it_is():
    texts, ids, shown = CountingTexts(), [], ""
    settled, whole = SettledText(texts, [1, 2]), "你好 world, the e" * 200
    for byte in whole.encode():
        ids.append(byte)
        text = settled.after(ids)
        assert text.startswith(shown)
        assert "\ufffd" not in text
        shown = text
    assert shown == whole[:-1]  # its last letter may begin the stop string
    assert texts.decoded <= 3 * len(ids)


def test_text_ends_before_its_first_whole_stop_string():
    settled = SettledText(CountingTexts(), [1, 2])
    assert settled.after(list(b"at the ")) == "at the "
    assert settled.after(list(b"at the end of the end")) == "at the "


def test_one_client_asks_at_most_so_often(folder):
    with running(Server({"mini": served_from(folder)}, load=served_from, keys=("a", "b"), rate=3)) as address:
        one, two = (openai.OpenAI(base_url=f"{address}/v1", api_key=k, max_retries=0) for k in "ab")
        for _ in range(3):
            one.models.list()
        with pytest.raises(openai.RateLimitError, match="3 requests in 60 seconds"):
            one.completions.create(model="mini", prompt="a", max_tokens=1)
        assert two.completions.create(model="mini", prompt="a", max_tokens=1).choices
        bare = urllib.request.Request(f"{address}/v1/models", headers={"Authorization": "a"})
        with pytest.raises(urllib.error.HTTPError, match="429"):  # the same key, without the word Bearer
            urllib.request.urlopen(bare)


def test_users_meet_the_model_that_the_wheel_gives_them(folder, other, tmp_path):
    file = tmp_path / "serving.json"
    with pytest.raises(SteersmanError, match="there is no such file; `steersman wheel` writes it"):
        Assignment(str(file), lambda one: served_from(one.path, one.name), lambda served: served.live.close())
    old, new = ServedModel("turn-00", str(folder)), ServedModel("turn-01", str(other), share=0.5)
    Serving(1, old, new, "salt").write(file)
    assignment = Assignment(
        str(file), lambda one: served_from(one.path, one.name), lambda served: served.live.close()
    )
    served = Server({}, load=served_from, alias="current", assignment=assignment)
    with running(served) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        def answers(user):
            more = {"user": user} if user else {}
            got = client.completions.create(model="current", prompt="oh", max_tokens=20, seed=1, **more)
            return got.model, got.choices[0].text

        assert [m.id for m in client.models.list()] == ["current"]
        met = {f"r-{i}": answers(f"r-{i}") for i in range(12)}
        assert {name for name, _ in met.values()} == {"turn-00", "turn-01"}
        for user, (name, text) in met.items():
            assert name == read_serving(file).arm(user).name
            assert text == expected(folder if name == "turn-00" else other, "oh", Sampling(20), 1)
            assert answers(user) == (name, text)
        assert answers(None)[0] == "turn-00"
        Serving(1, new, None, "salt").write(file)  # promoted while requests go on
        assert {answers(user)[0] for user in met} == {"turn-01"}
        file.write_text("{")  # half a file changes nothing
        assert answers("r-1")[0] == "turn-01"


def test_models_are_loaded_beside_those_that_answer(folder, other, tmp_path, capsys, monkeypatch):
    """And one that can not be loaded is tried once, and told once, until the file changes."""
    file, go_on, tried = tmp_path / "serving.json", threading.Event(), []
    old, new, bad = (ServedModel(*one) for one in (("old", "old"), ("new", str(other)), ("bad", str(tmp_path))))

    def load(one: ServedModel):
        tried.append(one.name)
        if one != old:
            assert go_on.wait(60)
        return served_from(folder if one == old else one.path, one.name)

    Serving(1, old, None, "salt").write(file)
    assignment = Assignment(str(file), load, lambda served: served.live.close())
    with running(Server({}, load=served_from, alias="current", assignment=assignment)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        def answers() -> str:
            return client.completions.create(model="current", prompt="oh", max_tokens=2).model

        def until(done) -> None:
            end = time.monotonic() + 60
            while not done():
                assert time.monotonic() < end
                time.sleep(0.01)

        Serving(1, bad, None, "salt").write(file)
        assert [answers() for _ in range(3)] == ["old"] * 3  # while the other one is loaded
        go_on.set()
        until(lambda: assignment.failures)
        assert [answers() for _ in range(3)] == ["old"] * 3
        assert tried == ["old", "bad"]
        told = capsys.readouterr().err
        assert told.count("what was served before goes on") == 1
        metrics = urllib.request.urlopen(f"{address}/metrics").read().decode()
        assert "steersman_serving_failures_total 1\n" in metrics
        monkeypatch.setattr("steersman.people.serve.assignment.AGAIN", 0.0)
        Serving(1, bad, None, "salt").write(file)  # the file is written anew: it is tried, and then at every request
        until(lambda: answers() == "old" and assignment.failures >= 3)
        assert capsys.readouterr().err.count("what was served before goes on") == 1
        Serving(1, new, None, "salt").write(file)
        until(lambda: answers() == "new")


class Halting:
    """A server that sends a stream's second piece when it is told to."""

    def __init__(self):
        self.models, self.go_on = {}, threading.Event()

    def app(self):
        return Starlette(routes=[Route("/v1/completions", self.stream, methods=["POST"])])

    async def stream(self, request):
        return StreamingResponse(self.pieces(), media_type="text/event-stream")

    async def pieces(self):
        for text in ("one", "two"):
            yield f"data: {json.dumps({'choices': [{'index': 0, 'text': text}]})}\n\n"
            assert await asyncio.to_thread(self.go_on.wait, 60)
        yield "data: [DONE]\n\n"


def test_a_piece_of_a_stream_goes_on_before_the_next_one_is_there():
    far = Halting()
    with (
        running(far) as url,
        running(Server({}, load=served_from, backend=Backend(BackendSection(url=f"{url}/v1"), 60.0))) as near,
    ):
        stream = iter(
            openai.OpenAI(base_url=f"{near}/v1", api_key="x", max_retries=0).completions.create(
                model="m", prompt="a", stream=True
            )
        )
        assert next(stream).choices[0].text == "one"
        far.go_on.set()
        assert [chunk.choices[0].text for chunk in stream] == ["two"]


def test_in_front_of_another_server_streams_come_through_as_they_are(url, tmp_path, monkeypatch):
    monkeypatch.setenv("BACKEND_KEY", "right-key")
    behind = Backend(BackendSection(url=f"{url}/v1", key_env="BACKEND_KEY"), 60.0)
    with running(Server({}, load=served_from, keys=("front-key",), backend=behind)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="front-key", max_retries=0)
        assert [m.id for m in client.models.list()] == ["mini"]
        ask = {"model": "mini", "prompt": "look at", "max_tokens": 30, "seed": 2}
        whole = client.completions.create(**ask).choices[0].text
        assert "".join(c.choices[0].text for c in client.completions.create(**ask, stream=True)) == whole
        with pytest.raises(openai.NotFoundError, match="there is no model"):
            client.completions.create(model="none", prompt="a")
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="right-key", max_retries=0).models.list()
    nowhere = Backend(BackendSection(url="http://127.0.0.1:9/v1"), 5.0)
    with running(Server({}, load=served_from, backend=nowhere)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="does not answer"):
            client.completions.create(model="mini", prompt="a")


class Busy:
    """A server behind: its completions answer once `crowd` requests are there, its chats that it is busy."""

    def __init__(self, crowd: int) -> None:
        self.models, self.crowd, self.there, self.all = {}, crowd, 0, asyncio.Event()

    def app(self) -> Starlette:
        async def wait(_):
            self.there += 1
            if self.there == self.crowd:
                self.all.set()
            await asyncio.wait_for(self.all.wait(), 30.0)
            return JSONResponse({"there": self.there})

        async def refuse(_):
            return JSONResponse({"error": "busy"}, 429, headers={"Retry-After": "30", "X-Other": "1"})

        routes = {"/v1/completions": wait, "/v1/chat/completions": refuse}
        return Starlette(routes=[Route(path, act, methods=["POST"]) for path, act in routes.items()])


def test_a_server_behind_says_when_to_ask_again_and_gets_as_many_requests_as_there_are():
    busy, crowd = Busy(110), {"model": "m", "prompt": "a"}

    async def asked(address: str) -> list[httpx2.Response]:
        async with httpx2.AsyncClient(timeout=60.0, limits=httpx2.Limits(max_connections=None)) as client:
            return await asyncio.gather(
                *(client.post(f"{address}/v1/completions", json=crowd) for _ in range(busy.crowd)),
                client.post(f"{address}/v1/chat/completions", json=crowd),
            )

    with (
        running(busy) as url,
        running(Server({}, load=served_from, backend=Backend(BackendSection(url=f"{url}/v1"), 60.0))) as near,
    ):
        *answers, refusal = asyncio.run(asked(near))
    assert [a.status_code for a in answers] == [200] * busy.crowd
    assert refusal.status_code == 429
    assert refusal.headers["retry-after"] == "30"
    assert "x-other" not in refusal.headers
