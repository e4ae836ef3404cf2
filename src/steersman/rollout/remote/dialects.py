"""How a call is put to each kind of server: our engine takes a whole batch in a request, vLLM a prompt."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from steersman.model.served_tokenizer import require_same_tokens, tokenize_request
from steersman.rollout.remote.replies import Reply, SampleRequest, replies
from steersman.rollout.remote.wire import NotServedError, Server, ServerGoneError, StartedWith
from steersman.rollout.sampling import Sampling
from steersman.types import SteersmanError

Requests = Mapping[int, SampleRequest]
Answers = dict[int, list[Reply]]
"""Answers by the numbers of their requests."""
TOGETHER = 64
"""Requests to one server at the same time."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM keeps room for."""
TIES = 8
"""Tokens behind the top_k-th that are looked at for any as likely. In bfloat16 ties are common."""
OVERRIDDEN = ("tie_word_embeddings", "vocab_size")
"""Settings that a server needs otherwise than the model's folder may have them: tables apart, and without padding."""
NEVER = -100.0
"""What vLLM adds to the logit of an id that only pads the vocabulary of a base: its probability becomes 0."""
TRIED = "0.32.0"
"""The version of vLLM that this was tried with; older ones lack routes."""
LOGPROBS_MODE = "processed_logprobs"
"""vLLM's word for log-probabilities of the distribution that was drawn from, tempered and truncated; its own default
are those of temperature 1 over the whole vocabulary."""


@dataclass(slots=True, frozen=True)
class Requirements:
    """What a server that steersman did not start must have to sample for a policy: settings of its `model`, and the
    policy's `tokenizer` (None: not compared). Any server must tell the log-probabilities of the `logprobs` likeliest
    tokens, and take adapters of the `rank` (0: none are sent)."""

    model: Mapping[str, Any]
    tokenizer: Any = None
    logprobs: int = 0
    rank: int = 0


@dataclass(slots=True, frozen=True)
class ServerLimits:
    """What a server can take: `window` tokens of a prompt and its answer together (None: it does not say), and `most`
    samples of a prompt in one request. It draws from `rows` ids, those that pad its vocabulary too (0: from the
    policy's alone)."""

    window: int | None = None
    most: int = sys.maxsize
    rows: int = 0


@dataclass(slots=True, frozen=True)
class Call:
    """What all prompts of a call share.

    `ends` are the ids that end a response, `skip` whether special tokens are left out where stop strings are looked
    for, `vocabulary` how many ids there are, `adapter` the name of the adapters that are to be added, if any, `most`
    how many samples of a prompt the server takes in one request, `rows` how many ids it draws from where they are
    more than `vocabulary`.
    """

    sampling: Sampling
    seed: tuple[int, ...]
    ends: tuple[int, ...]
    vocabulary: int
    skip: bool
    support: bool
    adapter: str = ""
    most: int = sys.maxsize
    rows: int = 0


class Dialect(Protocol):
    """How one kind of server is asked."""

    def complete(self, server: Server, asked: Requests, call: Call, done: Answers) -> None:
        """Puts the answers into `done` as they come. Raises ServerGoneError where the server is gone before all are
        there."""
        ...

    def check(self, server: Server, wanted: Requirements) -> ServerLimits:
        """What the server can take. Raises SteersmanError where it is of another kind or too old, or has not what is
        wanted."""
        ...


class Batchwise:
    """Our engine in another process: all prompts in one request, so that they are decoded together as they would be
    in this one, by the same random streams: the samples are the same bits."""

    def complete(self, server: Server, asked: Requests, call: Call, done: Answers) -> None:
        alike: dict[tuple[int, int, int], list[int]] = {}
        for place, one in asked.items():  # answers that go on after a cut have different lengths before them
            alike.setdefault((one.n, one.max_new_tokens, one.min_new_tokens), []).append(place)
        for places in alike.values():
            done |= zip(places, self._together(server, [asked[i] for i in places], call), strict=True)

    def _together(self, server: Server, asked: Sequence[SampleRequest], call: Call) -> list[list[Reply]]:
        body = {
            "batch": [{"token_ids": one.ids, "key": one.key, "n": one.n} for one in asked],
            "seed": call.seed if len(asked[0].key) == 2 else (*call.seed, asked[0].key[-1], asked[0].max_new_tokens),
            "sampling_params": _params(call, asked),
            "support": call.support,
        }
        found = replies(
            server, server.post("/inference/v1/generate", body), asked, call.vocabulary, support=call.support
        )
        return [found[i * one.n : (i + 1) * one.n] for i, one in enumerate(asked)]

    def check(self, server: Server, wanted: Requirements) -> ServerLimits:
        told = server.get("/version")
        if not isinstance(told, dict) or "steersman" not in told:
            raise SteersmanError(server.message("it is no engine of steersman; for vLLM set rollout.engine: vllm"))
        _compare_tokenizers(server, wanted, {})
        return ServerLimits(server.window())


class Promptwise:
    """vLLM: a request for each prompt, with a seed of its own, many at a time; vLLM itself decodes them together.

    A prompt with more samples than the server takes in one request is sent in several. vLLM gives sample i of a
    request the request's seed plus i, so the samples are those of a single request. It refuses several samples of a
    greedy request, which would all be the same: one is asked for, and repeated.

    `model` is the name that it serves the policy under.
    """

    def __init__(self, model: str) -> None:
        self.model = model

    def complete(self, server: Server, asked: Requests, call: Call, done: Answers) -> None:
        model, never = call.adapter or self.model, dict.fromkeys(range(call.vocabulary, call.rows), NEVER)
        once = {place: replace(ask, n=1) if call.sampling.greedy else ask for place, ask in asked.items()}
        parts = [(place, first) for place, ask in once.items() for first in range(0, ask.n, call.most)]
        gone: list[ServerGoneError] = []

        def one(part: tuple[int, int]) -> list[Reply]:
            place, first = part
            ask = replace(once[place], n=min(call.most, once[place].n - first))
            params = {**_params(call, [ask]), "n": ask.n, "seed": seed_of(call.seed, ask.key) + first}
            if never:
                params["logit_bias"] = never
            body = {"model": model, "token_ids": ask.ids, "sampling_params": params}
            try:
                found = server.post("/inference/v1/generate", body)
            except ServerGoneError as error:
                gone.append(error)
                return []
            except NotServedError as error:
                gone.append(ServerGoneError(f"{error}; it was started anew, and has lost the run's weights"))
                return []
            return replies(server, found, [ask], call.vocabulary, support=call.support)

        answers: Answers = {place: [] for place in asked}
        with ThreadPoolExecutor(min(TOGETHER, len(parts))) as pool:
            for (place, _), found in zip(parts, pool.map(one, parts), strict=True):
                answers[place] += found
        whole = {place: found for place, found in answers.items() if len(found) == once[place].n}
        done |= {place: found * (asked[place].n // len(found)) for place, found in whole.items()}
        if gone:
            raise gone[0]

    def check(self, server: Server, wanted: Requirements) -> ServerLimits:
        told = server.get("/version")
        version = str(told.get("version", "")) if isinstance(told, dict) else ""
        if numbers(version) < numbers(TRIED):
            raise SteersmanError(
                server.message(
                    f"vLLM {version or 'of an unknown version'}; its routes for training came with {TRIED}, which "
                    "the extra steersman[vllm] names"
                )
            )
        names = server.models()
        if self.model not in names:
            raise SteersmanError(
                server.message(f"it serves {', '.join(names) or 'nothing'}, not {self.model}: start it "
                            f"with --served-model-name {self.model}")
            )  # fmt: skip
        server.weights()
        started = server.settings()
        _require_model(server, wanted.model, started.model)
        _require_logprobs(server, wanted.logprobs, started)
        _require_rank(server, wanted.rank, started.max_lora_rank)
        _compare_tokenizers(server, wanted, {"model": self.model})
        return ServerLimits(server.window(), started.most, int(started.model.get("vocab_size", 0)))


def _require_model(server: Server, model: Mapping[str, Any], held: Mapping[str, Any]) -> None:
    others = [
        f"{key} is {held[key]} there, and must be {value}"
        for key, value in model.items()
        if held.get(key, value) != value
    ]
    if others:
        overrides = {key: model[key] for key in OVERRIDDEN if key in model}
        beside = f" and --hf-overrides '{json.dumps(overrides)}'" if overrides else ""
        raise SteersmanError(
            server.message(
                f"its model is not the policy's: {'; '.join(others)}. Start it with the policy's own folder "
                f"(--model){beside}; docs/how-to/vllm.md has the whole command"
            )
        )


def _require_logprobs(server: Server, wanted: int, started: StartedWith) -> None:
    if started.logprobs_mode != LOGPROBS_MODE:
        raise SteersmanError(
            server.message(
                f"it tells {started.logprobs_mode}, which are not the log-probabilities of the distribution that "
                f"tokens are drawn from; start it with --logprobs-mode {LOGPROBS_MODE} (where steersman starts it, "
                "leave that option out of rollout.arguments)"
            )
        )
    if -1 < started.max_logprobs < wanted:
        raise SteersmanError(
            server.message(
                f"it tells the log-probabilities of {started.max_logprobs} tokens at most, and rollout.top_k needs "
                f"{wanted}; start it with --max-logprobs {wanted} or more, or lower rollout.top_k"
            )
        )


def _require_rank(server: Server, rank: int, most: int) -> None:
    if rank > most:
        taken = f"adapters up to rank {most}" if most else "no adapters"
        raise SteersmanError(
            server.message(
                f"it takes {taken}, and the policy's have rank {rank}; start it with --enable-lora --max-lora-rank "
                f"{served_rank(rank)} (where steersman starts it, leave these options out of rollout.arguments), or "
                "lower model.lora.r"
            )
        )


def served_rank(rank: int) -> int:
    """The smallest rank that vLLM keeps room for and that is enough. Raises SteersmanError where none is."""
    for served in LORA_RANKS:
        if served >= rank:
            return served
    raise SteersmanError(
        f"rollout.sync adapter: vLLM takes adapters up to rank {LORA_RANKS[-1]}, and the policy's have rank {rank}; "
        "lower model.lora.r, or use sync: weights"
    )


def _compare_tokenizers(server: Server, wanted: Requirements, model: Mapping[str, str]) -> None:
    if wanted.tokenizer is not None:
        request = tokenize_request(wanted.tokenizer)
        told = server.tokenized({**model, **request})
        mend = "Start it with the policy's own tokenizer (vLLM: --tokenizer)"
        require_same_tokens(wanted.tokenizer, request, told, server.message, mend=mend)


def _params(call: Call, asked: Sequence[SampleRequest]) -> dict[str, Any]:
    """The call in vLLM's words. Ends are told by id: what the server takes for an end of its own does not count."""
    sampling = call.sampling
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "max_tokens": max(one.max_new_tokens for one in asked),
        "min_tokens": max(one.min_new_tokens for one in asked),
        "stop": list(sampling.stop),
        "stop_token_ids": list(call.ends),
        "ignore_eos": True,
        "logprobs": min(likeliest(sampling.top_k), call.vocabulary) if call.support else 0,
        "detokenize": bool(sampling.stop),
        "skip_special_tokens": call.skip,
    }


def likeliest(top_k: int) -> int:
    """Of how many tokens a call asks the log-probabilities: any as likely as the `top_k`-th can be sampled too."""
    return top_k + TIES


def seed_of(seed: Sequence[int], key: Sequence[int]) -> int:
    """A seed below 2^62 for vLLM that depends on both and on nothing else."""
    name = repr((tuple(seed), tuple(key))).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 2


def numbers(version: str) -> list[int]:
    parts = version.split("+")[0].split(".")[:3]
    return [int("".join(c for c in part if c in "0123456789")[:9] or 0) for part in parts]
