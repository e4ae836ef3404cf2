"""A real server on a free port, asked by the official client."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from letter_models import letters, save_mini

from steersman.cli import main
from steersman.data import DataConfig, layout
from steersman.model import load_policy
from steersman.rollout import Engine, Sampling
from steersman.rollout.live import Live
from steersman.types import Prompt

openai = pytest.importorskip("openai", reason="needs the openai client")
uvicorn = pytest.importorskip("uvicorn", reason="needs steersman[people]")
from steersman.people.serve.app import Served, Server  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_mini(tmp_path_factory.mktemp("serve"), context=256)
    tokenizer = letters()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory, folder):
    """The same model with other weights."""
    place = save_mini(tmp_path_factory.mktemp("other"), seed=1, context=256)
    load_policy(folder, trainable=False, device="cpu").tokenizer.save_pretrained(place)
    return place


def served_from(path) -> Served:
    policy = load_policy(path, trainable=False, device="cpu")
    live = Live(Engine(policy.model, policy.tokenizer), rows=4, longest=100, new_tokens=100, queue=40)
    return Served(live, layout(policy, DataConfig(path="serve")))


@pytest.fixture(scope="module")
def url(folder):
    served = Server({"mini": served_from(folder)}, load=served_from, keys=("right-key",), hosts=("127.0.0.1",))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(served.app(), host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
    for one in served.models.values():
        one.live.close()


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


def test_refusals_have_openais_shape(client, url):
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(model="mini", prompt="a", echo=True)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="mini", prompt="a", temperature="hot")
    with pytest.raises(openai.BadRequestError, match="at most 100"):
        client.completions.create(model="mini", prompt="a" * 101, max_tokens=4)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
    for body in (b"{", b"\xff", b"[" * 100_000, b'{"model": "mini", "prompt": "\\ud800"}', b"3"):
        request = urllib.request.Request(
            f"{url}/v1/completions", body, {"Authorization": "Bearer right-key"}, method="POST"
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert caught.value.code == 400
        assert "message" in json.load(caught.value)["error"]


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
