"""A real model behind a real HTTP server that answers as vLLM does, beside the same model in this process."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from letter_models import LETTERS, letters, save_mini
from train_kit import merge

from steersman.distill import run as verb
from steersman.distill.endpoint import EndpointTeacher
from steersman.distill.recipe import DistillRecipe, TeacherEndpoint
from steersman.distill.teacher import Answer
from steersman.model import load_policy
from steersman.types import SteersmanError


def prompt_logprobs(model, ids: list[int], k: int) -> list[dict[int, float] | None]:
    """What vLLM tells: nothing of the first token, then the k likeliest at each position and the token's own."""
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    out: list[dict[int, float] | None] = [None]
    for t in range(1, len(ids)):
        best = logp[t - 1].topk(k)
        row = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        out.append({ids[t]: float(logp[t - 1, ids[t]])} | row)
    return out


def vllm(model, body: dict) -> dict:
    ids = body["prompt"]
    if body.get("echo"):
        rows = prompt_logprobs(model, ids, body["logprobs"])
        named = [None if r is None else {f"token_id:{i}": p for i, p in r.items()} for r in rows]
        own = [None if r is None else r[i] for i, r in zip(ids, rows, strict=True)]
        told = {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": own, "top_logprobs": named}
        return {"choices": [{"text": "", "logprobs": told}]}
    rows = prompt_logprobs(model, ids, body["prompt_logprobs"])
    entries = [
        None if r is None else {str(i): {"logprob": p, "rank": 1, "decoded_token": "x"} for i, p in r.items()}
        for r in rows
    ]
    return {"choices": [{"text": "", "prompt_logprobs": entries}]}


@contextmanager
def serving(answer, tokenize=None):
    """`answer(body)` is what a request gets, and `tokenize(body)` one to /tokenize; without it there is no such
    route."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append((self.path, body))
            told = tokenize if self.path == "/tokenize" else answer
            raw = b"" if told is None else json.dumps(told(body)).encode()
            self.send_response(404 if told is None else 200)
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return load_policy(str(save_mini(tmp_path_factory.mktemp("served"), 1)), trainable=False)


ANSWERS = [
    Answer([5], [6, 7, 2], [True] * 3, [5, 9], 0),
    Answer([5, 6, 7], [8], [True], [4, 5, 6, 7], 1),
]


def teacher(url, form="prompt_logprobs", k=4, vocabulary=35, **extra):
    config = TeacherEndpoint.model_validate(
        {"url": url, "model": "m", "top_k": k, "form": form, "retries": 0} | extra
    )
    return EndpointTeacher(config, vocabulary, torch.device("cpu"))


@pytest.mark.parametrize("form", ["prompt_logprobs", "echo"])
def test_it_tells_what_the_model_itself_says_of_the_teachers_prompt(policy, form):
    with serving(lambda body: vllm(policy.model, body)) as (url, seen):
        asked = teacher(url, form)
        asked.prepare(ANSWERS)
        told = asked.read(ANSWERS, logp=True, temperature=1.0)
        asked.prepare(ANSWERS)
        assert [path for path, _ in seen] == ["/v1/completions"] * 2
        asked.forget(ANSWERS)
        asked.prepare(ANSWERS[:1])
        assert len(seen) == 3
    rows = []
    for answer in ANSWERS:
        with torch.no_grad():
            logits = policy.model(torch.tensor([answer.teacher_prompt + answer.response])).logits[0]
        rows.append(torch.log_softmax(logits, -1)[len(answer.teacher_prompt) - 1 : -1])
    expected = torch.cat(rows)
    best = expected.topk(4)
    assert torch.equal(told.teacher.ids, best.indices)
    torch.testing.assert_close(told.teacher.logp, best.values)
    own = torch.tensor([i for a in ANSWERS for i in a.response])
    torch.testing.assert_close(told.logp, expected.gather(1, own[:, None])[:, 0])


@pytest.mark.parametrize("name", ["reverse_kl", "minillm"])
def test_distilling_from_all_tokens_of_a_server_is_distilling_from_the_model(settings, policy, tmp_path, name):
    local = verb.run(DistillRecipe.model_validate(merge(settings, {"loss.name": name})))
    with serving(lambda body: vllm(policy.model, body)) as (url, _):
        values = merge(settings, {"loss.name": name, "run.dir": str(tmp_path / "served")})
        values["teacher"] = {"endpoint": {"url": url, "model": "m", "top_k": 34}}
        served = verb.run(DistillRecipe.model_validate(values))
    assert served["teacher_kl_before"] == pytest.approx(local["teacher_kl_before"], rel=1e-3)
    assert served["teacher_kl_after"] == pytest.approx(local["teacher_kl_after"], rel=0.05)


@pytest.mark.parametrize(
    ("answer", "form", "said"),
    [
        (lambda body: {"choices": [{"prompt_logprobs": [None]}]}, "prompt_logprobs", "no completion with the log"),
        (lambda body: {"choices": [{"text": "hello"}]}, "prompt_logprobs", "no completion with the log"),
        (lambda body: [], "prompt_logprobs", "no completion with the log"),
        (lambda body: _uniform(body, value=0.5), "prompt_logprobs", "no completion with the log"),
        (lambda body: _uniform(body, value="-1"), "prompt_logprobs", "no completion with the log"),
        (lambda body: _uniform(body, value=10**400), "prompt_logprobs", "no completion with the log"),
        (lambda body: _uniform(body, value=-(10**400)), "prompt_logprobs", "no completion with the log"),
        (lambda body: _shifted(_uniform(body), -38), "prompt_logprobs", "lists token id -"),
        (lambda body: _uniform(body, count=2), "prompt_logprobs", "lists 2 tokens and teacher.endpoint.top_k is 4"),
        (lambda body: _uniform(body, count=40), "prompt_logprobs", "different families"),
        (lambda body: _words(body), "echo", "names tokens by their text"),
    ],
)
def test_replies_that_say_something_else_are_refused(answer, form, said):
    with serving(answer) as (url, _), pytest.raises(SteersmanError, match=said):
        teacher(url, form).prepare(ANSWERS[1:])


def _uniform(body, count=35, value=-3.0):
    """The same `count` tokens at every position, those of higher ids likelier, and the text's own."""
    each = {str(i): value + i / 100 if isinstance(value, float) else value for i in range(40 - count, 40)}
    rows = [{str(token): -9.0, **each} for token in body["prompt"][1:]] if count > 2 else [{"8": -1.0, "9": -2.0}] * 4
    told = [None, *({i: {"logprob": p} for i, p in row.items()} for row in rows)]
    return {"choices": [{"prompt_logprobs": told}]}


def _shifted(reply, by):
    """The reply with tokens of other ids beside its own."""
    for row in filter(None, reply["choices"][0]["prompt_logprobs"]):
        row |= {str(int(i) + by): {"logprob": -0.5} for i in list(row)[-4:]}
    return reply


def _words(body):
    n = len(body["prompt"])
    top = [None, *([{"a": -1.0}] * (n - 1))]
    told = {"tokens": ["a"] * n, "token_logprobs": [None, *([-1.0] * (n - 1))], "top_logprobs": top}
    return {"choices": [{"logprobs": told}]}


def test_the_whole_vocabulary_is_as_much_as_can_be_listed(policy):
    """With every token listed nothing is left over, and nothing divides by it."""
    with serving(lambda body: vllm(policy.model, body)) as (url, _):
        asked = teacher(url, k=35)
        asked.prepare(ANSWERS)
        told = asked.read(ANSWERS, logp=False, temperature=1.0)
    assert float(told.teacher.rest.max()) < 1e-5


def tokenized(tokenizer, **more):
    """What vLLM's /tokenize tells with this tokenizer."""

    def told(body):
        ids = tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
        return {"tokens": ids, "token_strs": tokenizer.convert_ids_to_tokens(ids), "count": len(ids), **more}

    return told


def test_a_teacher_of_another_tokenizer_is_refused_before_there_is_a_run(settings, policy, tmp_path):
    """It has as many ids as the student, so that none lies outside; some are other letters."""
    other = letters(vocabulary=[*LETTERS[:3], *LETTERS[:2:-1]])
    with serving(lambda body: vllm(policy.model, body), tokenized(other)) as (url, seen):
        said = rf"teacher {url}/completions: it has another tokenizer: id \d+ is .* in the model that is trained"
        with pytest.raises(SteersmanError, match=said):
            verb.run(served_by(settings, url))
    assert [path for path, _ in seen] == ["/tokenize"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("has_route", [True, False])
def test_a_teacher_s_tokenizer_is_compared_where_it_can_be(settings, policy, tmp_path, capsys, has_route):
    route = tokenized(policy.tokenizer, max_model_len=64) if has_route else None
    with serving(lambda body: vllm(policy.model, body), route) as (url, seen):
        verb.run(served_by(settings, url, **{"train.max_steps": 1}))
    assert ("it has no /tokenize, so its tokenizer could not be compared" in capsys.readouterr().err) != has_route
    assert [path for path, _ in seen][:2] == ["/tokenize", "/v1/completions"]
    assert seen[0][1]["model"] == "m"


@pytest.mark.parametrize(
    ("answer", "window", "said"),
    [
        (
            lambda model, body: vllm(model, body),
            12,
            r"its window \(--max-model-len\) is 12 tokens, .* may have \d\d,",
        ),
        (
            lambda model, body: vllm(model, {**body, "prompt_logprobs": 2}),
            64,
            "lists [23] tokens and teacher.endpoint",
        ),
        (lambda model, body: {"choices": []}, 64, "no completion with the log-probabilities"),
    ],
)
def test_what_a_teacher_can_not_do_is_told_before_there_is_a_run(settings, policy, tmp_path, answer, window, said):
    route = tokenized(policy.tokenizer, max_model_len=window)
    with (
        serving(lambda body: answer(policy.model, body), route) as (url, _),
        pytest.raises(SteersmanError, match=said),
    ):
        verb.run(served_by(settings, url))
    assert not (tmp_path / "run").exists()


def served_by(settings, url, **more):
    values = merge(settings, more)
    values["teacher"] = {"endpoint": {"url": url, "model": "m", "top_k": 8, "retries": 0}}
    return DistillRecipe.model_validate(values)
