"""A teacher behind an OpenAI-compatible /completions: its likeliest tokens at every position of a given text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from steersman.distill.recipe import TeacherEndpoint
from steersman.distill.teacher import Answer, Reading, TokenTeacher
from steersman.distributed.ranks import ranks
from steersman.judge.endpoint import Caller, RefusedError
from steersman.model.served_tokenizer import require_same_tokens, tokenize_request
from steersman.ops.divergence import TeacherTopK
from steersman.types import SteersmanError

AnswerKey: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...]]"
"""Ids of a prompt and of a response."""
TopK: TypeAlias = "tuple[list[list[int]], list[list[float]], list[float]]"
"""Per response token: the ids that were listed, likeliest first, their log-probabilities, and the token's own."""
MIN_LOGP = -1e4
"""The least log-probability that is taken over; JSON has none for minus infinity."""


class TopLogprobs(Caller[AnswerKey, TopK]):
    """Asks for the log-probabilities of a text that is given as token ids, and makes one token that nobody reads.

    `prompt_logprobs` is vLLM's: `choices[0].prompt_logprobs[i]` maps ids (as text) to {logprob, rank,
    decoded_token}, the i-th token's own always among them. `echo` is the older protocol's: `logprobs.top_logprobs[i]`
    maps tokens to numbers, and vLLM's `return_tokens_as_token_ids` names them token_id:N, without which ids can not
    be told for certain.
    """

    who, path, expected_form = "teacher", "/completions", "completion with the log-probabilities of its prompt"

    def __init__(self, config: TeacherEndpoint) -> None:
        super().__init__(config)
        self.top_k, self.echo = config.top_k, config.form == "echo"

    def body(self, question: AnswerKey) -> dict[str, Any]:
        body: dict[str, Any] = {"prompt": [*question[0], *question[1]], "max_tokens": 1, "temperature": 0}
        if self.echo:
            return {**body, "echo": True, "logprobs": self.top_k, "return_tokens_as_token_ids": True}
        return {**body, "prompt_logprobs": self.top_k}

    def read(self, raw: bytes, question: AnswerKey) -> TopK | None:
        try:
            choice = json.loads(raw)["choices"][0]
            rows = _echoed(choice["logprobs"]) if self.echo else _prompted(choice["prompt_logprobs"])
            prompt, response = question
            rows = rows[len(prompt) : len(prompt) + len(response)]
            if len(rows) != len(response):
                return None
            told = [self._best(row, token) for row, token in zip(rows, response, strict=True)]
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            return None
        return [ids for ids, _, _ in told], [logp for _, logp, _ in told], [own for _, _, own in told]

    def _best(self, row: dict[int, float], token: int) -> tuple[list[int], list[float], float]:
        best = sorted(row.items(), key=lambda pair: -pair[1])[: self.top_k]
        if len(best) < self.top_k:
            raise SteersmanError(
                self._message(
                    f"it lists {len(best)} tokens and teacher.endpoint.top_k is {self.top_k}; lower top_k, or raise "
                    "the server's limit (vLLM: --max-logprobs)"
                )
            )
        return [i for i, _ in best], [max(p, MIN_LOGP) for _, p in best], max(row[token], MIN_LOGP)


def _prompted(told: list[dict[str, dict[str, Any]] | None]) -> list[dict[int, float]]:
    return [{int(i): _number(entry["logprob"]) for i, entry in (row or {}).items()} for row in told]


def _echoed(told: dict[str, Any]) -> list[dict[int, float]]:
    rows = []
    own = zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True)
    for token, logp, top in own:
        row = {} if top is None else {_id(name): _number(p) for name, p in top.items()}
        rows.append(row if logp is None else {**row, _id(token): _number(logp)})
    return rows


def _id(name: str) -> int:
    head, _, number = name.partition("token_id:")
    if head or not number.isdecimal():
        raise SteersmanError(
            f"teacher: the server names tokens by their text ({name[:20]!r}), which does not tell their ids; use one "
            "that knows return_tokens_as_token_ids, or teacher.endpoint.form: prompt_logprobs"
        )
    return int(number)


def _number(x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, int | float) or math.isnan(x) or x > 1e-3:
        raise ValueError("no log-probability")
    return float(min(x, 0.0))


class Tokenizes(Caller[dict[str, Any], dict[str, Any]]):
    """Asks by /tokenize, a route of vLLM's beside its /v1, what the server makes of a text."""

    who, path, expected_form = "teacher", "/tokenize", "answer of /tokenize"

    def __init__(self, config: TeacherEndpoint) -> None:
        root = config.url.rstrip("/").removesuffix(TopLogprobs.path).removesuffix("/v1")
        super().__init__(config.model_copy(update={"url": root, "extra": {}}))

    def body(self, question: dict[str, Any]) -> dict[str, Any]:
        return question

    def read(self, raw: bytes, question: dict[str, Any]) -> dict[str, Any]:
        """The answer; empty where it is none, as of a server that shows a page for any route."""
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def told(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer to one question; empty where the server has no such route."""
        found: dict[str, Any] = {}
        try:
            self.ask([question], lambda _, told: found.update(told), lambda: True)
        except RefusedError:
            return {}
        return found


class EndpointTeacher(TokenTeacher):
    """A teacher behind a server; what it told of an answer is kept, so that given answers are asked about once."""

    def __init__(self, config: TeacherEndpoint, vocabulary: int, device: torch.device) -> None:
        self.caller, self.tokenizes = TopLogprobs(config), Tokenizes(config)
        self.vocabulary, self.device = vocabulary, device
        self.top_k: dict[AnswerKey, TopK] = {}

    def check(self, tokenizer: Any, longest: int) -> None:
        """Compares the tokenizers, where the server has /tokenize, and asks for what is asked for later, once."""
        ranks().from_main(lambda: self._check(tokenizer, longest), "what the teacher is")

    def _check(self, tokenizer: Any, longest: int) -> None:
        request = tokenize_request(tokenizer)
        told = self.tokenizes.told(request)
        mend = "Use a teacher of the student's family, or one at teacher.path with loss.name uld"
        require_same_tokens(tokenizer, request, told, self._message, mend=mend)
        window = told.get("max_model_len")
        if type(window) is int and longest >= window:  # it makes one token that nobody reads
            raise SteersmanError(
                self._message(
                    f"its window (--max-model-len) is {window} tokens, and a prompt with its answer may have "
                    f"{longest}, and it makes one more; start it with --max-model-len {longest + 1} or more, "
                    "or lower rollout.max_new_tokens or data.max_prompt_tokens"
                )
            )
        ids = tokenizer.encode(request["prompt"], add_special_tokens=False)
        self._asked([Answer(ids[:1], ids[1:2], [True], ids[:1], 0)])

    def _message(self, what: str) -> str:
        return f"teacher {self.caller.url}: {what}"

    def prepare(self, answers: Sequence[Answer]) -> None:
        """Asks about all answers that are new, several at a time; of several ranks, rank 0 does, for all. Raises
        SteersmanError where that fails for good, or where the server tells of ids that the student has not."""
        self.top_k |= ranks().from_main(lambda: self._asked(answers), "what the teacher says")

    def _asked(self, answers: Sequence[Answer]) -> dict[AnswerKey, TopK]:
        found: dict[AnswerKey, TopK] = {}
        new = list(dict.fromkeys(key for a in answers if (key := _key(a)) not in self.top_k))

        def keep(index: int, told: TopK) -> None:
            outside = next((i for ids in told[0] for i in ids if not 0 <= i < self.vocabulary), None)
            if outside is not None:
                raise SteersmanError(
                    self._message(
                        f"it lists token id {outside}, and the student has {self.vocabulary}; the two are of "
                        "different families"
                    )
                )
            found[new[index]] = told

        self.caller.ask(new, keep, lambda: True)
        return found

    def read(self, answers: Sequence[Answer], *, logp: bool, temperature: float) -> Reading:
        told = [self.top_k[_key(a)] for a in answers]
        ids = torch.tensor([row for ids, _, _ in told for row in ids], device=self.device)
        listed = torch.tensor([row for _, top, _ in told for row in top], device=self.device)
        own = torch.tensor([x for _, _, own in told for x in own], device=self.device)
        return Reading(TeacherTopK(ids, listed), own)

    def forget(self, answers: Sequence[Answer]) -> None:
        """Drops what was told of answers that will not come again."""
        for answer in answers:
            self.top_k.pop(_key(answer), None)

    def describe(self) -> str:
        config = self.caller.config
        return f"{config.model} at {config.url}, its {self.caller.top_k} likeliest tokens"


def _key(answer: Answer) -> AnswerKey:
    return tuple(answer.teacher_prompt), tuple(answer.response)
