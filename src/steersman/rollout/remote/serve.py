"""Our engine in a process of its own, behind the routes of a vLLM server that `wire.py` uses.

    STEERSMAN_ENGINE_KEY=SECRET python -m steersman.rollout.remote.serve --model FOLDER --port 8000 \\
        --threads 1 --max-batch 64 --dtype float32 --device cpu

FOLDER holds a config and a tokenizer. The weights come by /update_weights before the first sample; or FOLDER holds
them too, and adapters come by /v1/load_lora_adapter. Every request has to bear the key: who has
it can replace the weights and have files read. It listens on this machine only; with `--host ADDRESS` others reach
it, and the key travels over their network as it is.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file

from steersman.guards.terminal import say
from steersman.model import Policy
from steersman.model.lora import adapter_state, load_lora, take_adapter_state
from steersman.rollout.engine import Engine
from steersman.rollout.remote.snapshot import ADAPTER, digest
from steersman.rollout.remote.wire import ENGINE_KEY
from steersman.rollout.sampling import Sampling
from steersman.types import Prompt, Sample, SteersmanError


class EngineRoutes:
    """The engine with what its routes share: one call at a time, a pause that cuts it, and the weights' name."""

    def __init__(self, make: Callable[[], Policy], max_batch: int) -> None:
        self.make, self.max_batch = make, max_batch
        self.name = self.adapter = ""
        self._begin(make())
        self._turn = threading.Lock()
        self._open = threading.Event()
        self._open.set()

    def _begin(self, policy: Policy) -> None:
        self.policy, self.engine = policy, Engine(policy.model, policy.tokenizer, max_batch=self.max_batch)

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """The samples of the batch; where a pause came, each as far as it is."""
        batch, params = body["batch"], body["sampling_params"]
        samples: list[Sample | None] = [None] * sum(one["n"] for one in batch)
        with self._turn:
            if self._open.is_set():
                samples = list(self._sample(batch, params, tuple(body["seed"]), body["support"]))
        choices = [self._choice(i, sample, params) for i, sample in enumerate(samples)]
        return {"choices": choices}

    def _sample(self, batch: list[Any], params: dict[str, Any], seed: tuple[int, ...], support: bool) -> list[Sample]:
        self.engine.end_ids = tuple(params["stop_token_ids"])
        sampling = Sampling(
            params["max_tokens"], params["temperature"], params["top_k"], params["top_p"], params["min_p"],
            params["min_tokens"], tuple(params["stop"]),
        )  # fmt: skip
        prompts = [Prompt(one["token_ids"], "", index=one["key"][0]) for one in batch]
        return self.engine.generate(
            prompts, sampling, n=batch[0]["n"], seed=seed, record_support=support, cut=lambda: not self._open.is_set()
        )

    def _choice(self, index: int, sample: Sample | None, params: dict[str, Any]) -> dict[str, Any]:
        if sample is None:
            return {"index": index, "token_ids": [], "finish_reason": "abort", "logprobs": {"content": []}}
        cut = sample.finish == "length" and len(sample.ids) < params["max_tokens"]
        choice: dict[str, Any] = {
            "index": index,
            "token_ids": sample.ids,
            "finish_reason": "abort" if cut else "length" if sample.finish == "length" else "stop",
            "weight_versions": [{"version": self.name, "start": 0, "end": len(sample.ids)}],
            "logprobs": {
                "content": [{"token_id": i, "logprob": x} for i, x in zip(sample.ids, sample.logp, strict=True)]
            },
        }
        if sample.support is not None:
            choice["sampling_mask"] = [ids.tolist() for ids in sample.support]
        return choice

    def pause(self, _: Any) -> dict[str, str]:
        """Cuts the call under way, and waits until it is out."""
        self._open.clear()
        with self._turn:
            return {"status": "paused"}

    def resume(self, _: Any) -> dict[str, str]:
        self._open.set()
        return {"status": "resumed"}

    @torch.no_grad()
    def update(self, body: dict[str, Any]) -> dict[str, str]:
        """Takes the file's tensors over; one that is missing stays as it was, and the receipt will tell."""
        with self._turn:
            if self.policy.adapters is not None:  # of a run before this one
                self._begin(self.make())
            self.policy.model.load_state_dict(load_file(body["update_info"]["path"]), strict=False)
        return {}

    @torch.no_grad()
    def load_adapter(self, body: dict[str, Any]) -> dict[str, str]:
        """Puts the folder's adapters on the model, or in the place of those that it has; a tensor that is missing
        stays as it was, and the receipt will tell."""
        folder = body["lora_path"]
        with self._turn:
            if self.policy.adapters is None:
                self.policy.register_adapters(load_lora(self.policy.model, folder, trainable=False))
                self._begin(self.policy)
            assert self.policy.adapters is not None
            take_adapter_state(self.policy.adapters, load_file(f"{folder}/{ADAPTER}"))
            self.adapter = body["lora_name"]
        return {}

    def unload_adapter(self, body: dict[str, Any]) -> dict[str, str]:
        """Forgets the name; the adapters themselves are replaced by the next ones."""
        self.adapter = "" if self.adapter == body["lora_name"] else self.adapter
        return {}

    def models(self, _: Any) -> dict[str, Any]:
        return {"data": [{"id": name} for name in ("policy", self.adapter) if name]}

    def finish(self, body: dict[str, Any]) -> dict[str, str]:
        self.name = body["weight_version"]
        return {}

    def digests(self, body: dict[str, Any]) -> dict[str, Any]:
        path = body["args"][0]
        file = {name: digest(tensor) for name, tensor in load_file(path).items()}
        state = self.policy.model.state_dict()
        if self.policy.adapters is not None:
            state = adapter_state(self.policy.adapters)
        return {"results": [{"file": file, "live": {name: digest(state[name]) for name in file if name in state}}]}

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        tokenizer = self.policy.tokenizer
        ids = tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
        return {"tokens": ids, "token_strs": tokenizer.convert_ids_to_tokens(ids)}

    def nothing(self, _: Any) -> dict[str, str]:
        return {}


def routes(desk: EngineRoutes) -> dict[str, Any]:
    return {
        "/health": desk.nothing,
        "/version": lambda _: {"steersman": True},
        "/weight_info": lambda _: {"weight_version": desk.name},
        "/inference/v1/generate": desk.generate,
        "/tokenize": desk.tokenize,
        "/pause": desk.pause,
        "/resume": desk.resume,
        "/start_weight_update": desk.nothing,
        "/update_weights": desk.update,
        "/finish_weight_update": desk.finish,
        "/reset_prefix_cache": desk.nothing,
        "/v1/models": desk.models,
        "/v1/load_lora_adapter": desk.load_adapter,
        "/v1/unload_lora_adapter": desk.unload_adapter,
        "/collective_rpc": desk.digests,
    }


READ = ("/health", "/version", "/weight_info", "/v1/models")
"""What GET is for: a web page can have it sent without asking anybody, so it must change nothing."""
HERE = ("127.0.0.1", "localhost", "[::1]")


class Handler(BaseHTTPRequestHandler):
    """Reads a request, answers it by its route, and says in the reply what went wrong.

    Requests have to bear the `key`, and to call the server by one of the `names` (none: by any), so that neither
    another user of the machine nor a web page that is open on it is obeyed.
    """

    protocol_version = "HTTP/1.1"
    table: dict[str, Any]
    key = ""
    names: Sequence[str] = ()

    def do_GET(self) -> None:
        if self._may_ask():
            if urlsplit(self.path).path in READ:
                self._answer(None)
            else:
                self._send(405, {"error": f"GET is for {', '.join(READ)}; ask by POST"})

    def do_POST(self) -> None:
        if not self._may_ask():
            return
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        self._answer(json.loads(raw) if raw.strip() else None)

    def _may_ask(self) -> bool:
        """Whether a request is one of ours. Another is refused, and its body is not read."""
        given = self.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self.names and self.headers.get("host") not in self.names:
            refusal = (400, "the server is not called by this name")
        elif not hmac.compare_digest(given.encode(errors="replace"), self.key.encode()):
            refusal = (401, "a request bears the key as Authorization: Bearer KEY")
        else:
            return True
        self.close_connection = True
        self._send(refusal[0], {"error": refusal[1]})
        return False

    def _answer(self, body: Any) -> None:
        route = self.table.get(urlsplit(self.path).path)
        if route is None:
            self._send(404, {"error": "no such route"})
            return
        try:
            self._send(200, route(body))
        except SteersmanError as error:
            self._send(400, {"error": str(error)})
        except (MemoryError, RuntimeError, OSError, KeyError, TypeError, ValueError) as error:
            say(f"{type(error).__name__}: {error}")
            self._send(500, {"error": f"{type(error).__name__}: {error}"})

    def _send(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        if self.close_connection:
            self.send_header("connection", "close")  # or the client would send its next request over it
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def fresh(folder: str, dtype: str, device: str) -> Policy:
    """The model of the folder, with any weights where it holds none."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    if (file := Path(folder) / "model.safetensors").exists():
        model.load_state_dict(load_file(file), strict=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return Policy(model.eval().to(device), tokenizer).requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "dtype", "device"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("port", "threads", "max-batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    given = parser.parse_args()
    Handler.key = os.environ.get(ENGINE_KEY, "").strip()
    Handler.names = [f"{name}:{given.port}" for name in HERE] if given.host in HERE else []
    if not Handler.key:
        parser.error(f"set the environment variable {ENGINE_KEY} to a secret, here and where the run is started")
    torch.set_num_threads(given.threads)
    server = ThreadingHTTPServer((given.host, given.port), Handler)  # first, so that a port in use is told at once
    Handler.table = routes(EngineRoutes(lambda: fresh(given.model, given.dtype, given.device), given.max_batch))
    server.serve_forever()


if __name__ == "__main__":
    main()
