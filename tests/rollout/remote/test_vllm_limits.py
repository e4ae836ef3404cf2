"""What vLLM refuses, or does otherwise than our engine: asked for in a way that it takes, or refused beforehand."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from remote_kit import make_policy
from test_told_logp import vllm

from steersman.recipe.sections import RolloutConfig
from steersman.rollout import Sampling
from steersman.rollout.remote import ServerSettings, open_vllm
from steersman.rollout.remote.dialects import Call, Promptwise
from steersman.rollout.remote.replies import SampleRequest
from steersman.rollout.remote.wire import Server
from steersman.types import Prompt, SteersmanError

MOST = 4
"""The server's max_num_seqs."""


class Refusing:
    """vLLM's route for samples with its refusals; sample i of a request is the token that its seed plus i names, as
    often as the request asks for."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        outer = self

        class Routes(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status, value = outer.generate(body["sampling_params"])
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Routes)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.server = Server(f"http://127.0.0.1:{self.http.server_port}", 5.0)

    def generate(self, params: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.asked.append(params)
        n, tokens = params["n"], params["max_tokens"]
        if n > MOST or (n > 1 and params["temperature"] == 0):
            return 400, {"error": {"message": f"n is {n}"}}
        ids = [[3 + (params["seed"] + i) % 30] * tokens for i in range(n)]
        content = [[{"token_id": one, "logprob": -1.0} for one in row] for row in ids]
        return 200, {
            "choices": [
                {"index": i, "token_ids": ids[i], "finish_reason": "length", "logprobs": {"content": content[i]}}
                for i in range(n)
            ]
        }

    def close(self) -> None:
        self.server.close()
        self.http.shutdown()


@pytest.fixture
def refusing():
    server = Refusing()
    yield server
    server.close()


def complete(refusing: Refusing, sampling: Sampling, counts: tuple[int, ...]) -> dict[int, list[list[int]]]:
    call = Call(sampling, (7,), (2,), 35, False, False, most=MOST)
    asked = {i: SampleRequest([3, 4], (i, 0), n, sampling.max_new_tokens, 0) for i, n in enumerate(counts)}
    done: dict[int, Any] = {}
    Promptwise("policy").complete(refusing.server, asked, call, done)
    return {place: [reply.ids for reply in found] for place, found in done.items()}


def test_more_samples_than_a_server_takes_at_once_are_those_of_one_request(refusing):
    found = complete(refusing, Sampling(2), (11, 3, 4))
    assert [len(found[i]) for i in range(3)] == [11, 3, 4]
    assert sorted(params["n"] for params in refusing.asked) == [3, 3, 4, 4, 4]
    steps = [(b[0] - a[0]) % 30 for a, b in zip(found[0], found[0][1:], strict=False)]
    assert steps == [1] * 10  # seed, seed + 1, ... over the ends of requests


def test_greedy_samples_are_asked_for_once(refusing):
    found = complete(refusing, Sampling(2).as_greedy(), (3, 9))
    assert [params["n"] for params in refusing.asked] == [1, 1]
    assert [len(found[0]), len(found[1])] == [3, 9]
    assert all(ids == rows[0] for rows in found.values() for ids in rows)


def test_a_refusal_of_one_part_is_told(refusing):
    call = Call(Sampling(2), (7,), (2,), 35, False, False, most=5)
    with pytest.raises(SteersmanError, match=r"status 400 of .*n is 5"):
        Promptwise("policy").complete(refusing.server, {0: SampleRequest([3], (0, 0), 7, 2, 0)}, call, {})


def test_a_temperature_that_vllm_refuses_is_refused_with_the_recipe():
    assert RolloutConfig(engine="vllm", temperature=2.0).temperature == 2
    assert RolloutConfig(engine="process", temperature=3.0).temperature == 3
    with pytest.raises(ValueError, match=r"temperature is 2\.5, and vLLM takes none above 2; lower it"):
        RolloutConfig(engine="vllm", temperature=2.5)


@pytest.mark.parametrize(("rows", "padding"), [(35, 0), (48, 13)])
def test_the_tokenizer_s_own_end_is_withheld_beside_the_recipe_s(rows, padding):
    """vLLM samples neither before min_tokens; the loss renormalises over what is left."""
    policy = make_policy(vocab=rows)
    assert policy.tokenizer.eos_token_id == 2
    stub = vllm(policy)
    generator = open_vllm(policy, ServerSettings((5,), 4, urls=(stub.url,), timeout=5.0))
    one = _answered(generator, ids=[7, 7, 7])
    support = generator._support(one, Sampling(3, min_new_tokens=2))
    assert support is not None
    banned = [sorted((~ids).tolist()) for ids in support]
    rest = list(range(35, 35 + padding))
    assert banned == [[2, 5, *rest], [2, 5, *rest], rest]
    generator.close()


def _answered(generator, ids):
    from steersman.rollout.remote.generator import PendingResponse

    return PendingResponse(Prompt([3, 4], "", index=0), 0, 0, ids=ids, logp=torch.zeros(len(ids)).tolist())
