"""Answers of a server that samples, looked at before they are believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steersman.guards.untrusted import is_number
from steersman.rollout.remote.wire import BadReplyError, Server, shortened

UNREACHED = -9000.0
"""vLLM writes -9999 for a log-probability that is minus infinity or NaN."""
ROUNDING = 1e-3
"""A log-probability may be so far above 0."""
_LARGEST = 1 << 31
"""No id, place or version of weights is so large."""


@dataclass(slots=True, frozen=True)
class SampleRequest:
    """One prompt to be answered `n` times.

    `key` is what names its random stream besides the call's seed: the prompt's index and which of its occurrences
    this is; for an answer that goes on after a cut also which answer, and how often it was cut.
    """

    ids: list[int]
    key: tuple[int, ...]
    n: int
    max_new_tokens: int
    min_new_tokens: int


@dataclass(slots=True)
class Reply:
    """One answer as far as it came: `finish` is "stop", "length", or "abort" where the server was told to cut it.

    `version` has the weights' version of each token, None where the server does not say.
    """

    ids: list[int]
    logp: list[float]
    finish: str
    version: list[int] | None
    support: list[Tensor] | None = None


def replies(
    server: Server, found: Any, asked: Sequence[SampleRequest], vocabulary: int, *, support: bool = False
) -> list[Reply]:
    """The choices of a reply in order: those of the first prompt first; with the tokens that were allowed, where
    `support` is asked for.

    Raises BadReplyError where there are too few or too many, where one comes twice, and for what `_reply` refuses.
    """
    choices = found.get("choices") if isinstance(found, dict) else None
    wanted = sum(one.n for one in asked)
    if not isinstance(choices, list):
        raise BadReplyError(server.message(f"a reply without answers: {shortened(found)}"))
    if len(choices) != wanted:
        raise BadReplyError(server.message(f"{len(choices)} answers where {wanted} were asked for"))
    placed: dict[int, Any] = {}
    for choice in choices:
        index = choice.get("index") if isinstance(choice, dict) else None
        if type(index) is not int or not 0 <= index < wanted or index in placed:
            raise BadReplyError(
                server.message(f"an answer has the number {shortened(index)}; each of 0 to {wanted - 1} comes once")
            )
        placed[index] = choice
    owners = [one for one in asked for _ in range(one.n)]
    return [_reply(server, placed[i], owner, vocabulary, support) for i, owner in enumerate(owners)]


def _reply(server: Server, choice: dict[str, Any], asked: SampleRequest, vocabulary: int, support: bool) -> Reply:
    """One choice. Raises BadReplyError for ids that are none of the vocabulary, more tokens than were asked for, or
    fewer where nothing but their number ended it, log-probabilities that are missing, not finite or above 0, allowed
    tokens that are not listed for each token, and parts of other types than vLLM's."""
    ids, finish = choice.get("token_ids"), choice.get("finish_reason")
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocabulary for i in ids):
        raise BadReplyError(
            server.message(
                f"an answer with ids outside the vocabulary of {vocabulary}: {shortened(ids)}; another model's?"
            )
        )
    if len(ids) > asked.max_new_tokens:
        raise BadReplyError(
            server.message(f"an answer of {len(ids)} tokens where {asked.max_new_tokens} were the most")
        )
    if finish == "length" and 0 < len(ids) < asked.max_new_tokens:
        raise BadReplyError(
            server.message(
                f"an answer was cut after {len(ids)} of the {asked.max_new_tokens} tokens that it may have: with its "
                f"prompt of {len(asked.ids)} it filled the server's own window. Give the server a larger "
                "--max-model-len (rollout.arguments, where steersman starts it), or lower rollout.max_new_tokens"
            )
        )
    if finish not in ("stop", "length", "abort") or (not ids and finish != "abort"):
        raise BadReplyError(server.message(f"an answer of {len(ids)} tokens that ended with {shortened(finish)}"))
    try:
        told = choice.get("logprobs")
        if not isinstance(told, dict | None):
            raise ValueError(f"logprobs that are no object: {shortened(told)}")
        content = _objects((told or {}).get("content"), "logprobs.content")
        logp = _logp(content, len(ids))
        kept = _support(choice, content, ids) if support else None
        return Reply(ids, logp, finish, _versions(choice, len(ids)), kept)
    except ValueError as error:
        raise BadReplyError(server.message(f"an answer with {error}")) from error


def _logp(content: list[dict[str, Any]], count: int) -> list[float]:
    """The log-probability of each token. Raises ValueError if there are too few or too many, or one is not a
    log-probability."""
    logp: list[Any] = [one.get("logprob") for one in content]
    wrong = [x for x in logp if not is_number(x) or not UNREACHED < x <= ROUNDING]
    if len(logp) != count or wrong:
        raise ValueError(
            f"{len(logp)} log-probabilities for {count} tokens, or one that is not a log-probability "
            f"({shortened(wrong[0] if wrong else len(logp))}): its weights may hold NaN"
        )
    return [float(x) for x in logp]


def _versions(choice: dict[str, Any], count: int) -> list[int] | None:
    """The version of each token, from spans of names such as "run-17:3"; None where they are not told. Raises
    ValueError for what are no spans."""
    out = [-1] * count
    for span in _objects(choice.get("weight_versions"), "weight_versions"):
        number = str(span.get("version", "")).rpartition(":")[2]
        if not number.isascii() or not number.isdigit() or int(number[:20]) >= _LARGEST:
            return None
        start, end = _ids([span.get("start", 0), span.get("end", 0)], "weight_versions")
        out[start:end] = [int(number)] * len(out[start:end])
    return out if out and min(out) >= 0 else None


def _support(choice: dict[str, Any], content: list[dict[str, Any]], ids: list[int]) -> list[Tensor]:
    """The ids that were allowed at each token: told, or those of the likeliest that have a probability. Raises
    ValueError where they are not listed for each token."""
    told = choice.get("sampling_mask")
    if told is not None:
        if not isinstance(told, list) or len(told) != len(ids):
            raise ValueError(
                f"{len(ids)} tokens whose sampling_mask does not list those allowed at each: {shortened(told)}"
            )
        return [torch.tensor(_ids(allowed, "sampling_mask"), dtype=torch.long) for allowed in told]
    kept = []
    for i, one in zip(ids, content, strict=True):
        likeliest = _objects(one.get("top_logprobs"), "top_logprobs")
        if not likeliest or not all(is_number(top.get("logprob")) for top in likeliest):
            raise ValueError(f"neither a sampling_mask nor the log-probabilities of the likeliest: {shortened(one)}")
        reached = [top.get("token_id") for top in likeliest if top["logprob"] > UNREACHED]
        kept.append(torch.tensor(sorted({*_ids(reached, "top_logprobs"), i}), dtype=torch.long))
    return kept


def _objects(value: Any, name: str) -> list[dict[str, Any]]:
    """A list of JSON objects, empty where it is not told. Raises ValueError for anything else."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ValueError(f"{name} that is no list of objects: {shortened(value)}")
    return value


def _ids(value: Any, name: str) -> list[int]:
    """A list of numbers that may be ids. Raises ValueError for anything else."""
    if not isinstance(value, list) or not all(type(i) is int and abs(i) < _LARGEST for i in value):
        raise ValueError(f"{name} that has other numbers than ids: {shortened(value)}")
    return value
