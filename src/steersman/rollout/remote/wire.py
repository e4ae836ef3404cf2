"""Requests to a server that samples, and replies that are looked at before they are believed.

The routes are vLLM's own: /inference/v1/generate (token ids in, token ids out), /pause and /resume,
/start_weight_update, /update_weights, /finish_weight_update and /weight_info, /v1/load_lora_adapter and
/v1/unload_lora_adapter. The engine in another process (`serve.py`) answers the same ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import torch
from torch import Tensor

from steersman.guards.reply import read_body
from steersman.guards.terminal import printable
from steersman.types import SteersmanError

LARGEST_REPLY = 1 << 30
"""Bytes; what is longer is no reply."""
UNREACHED = -9000.0
"""vLLM writes -9999 for a log-probability that is minus infinity or NaN."""
ROUNDING = 1e-3
"""A log-probability may be so far above 0."""
_LARGEST = 1 << 31
"""No id, place or version of weights is so large."""


class ServerGoneError(SteersmanError):
    """The server can not be reached, or fell silent: one that steersman started is started again."""


class BadReplyError(SteersmanError):
    """The server answered, and the answer can not be right."""


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


class Server:
    """One server by its address. Every call has a time limit, and says in its error which server did not answer.

    Raises ServerGoneError where it can not be reached, does not answer in time, or fails and is not healthy any more,
    SteersmanError where it refuses.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        # a proxy of the environment's would stand between two processes of one machine
        self._client = httpx2.Client(timeout=timeout, trust_env=False)

    def close(self) -> None:
        self._client.close()

    def get(self, path: str, timeout: float | None = None) -> Any:
        """What the route answers, read as JSON."""
        return self._ask("GET", path, None, timeout)

    def post(self, path: str, body: Any = None, timeout: float | None = None, *, text: bool = False) -> Any:
        """What the route answers, read as JSON, or nothing where it answers in words (`text`)."""
        return self._ask("POST", path, body, timeout, text)

    def healthy(self) -> bool:
        """Whether it says within two seconds that it can work."""
        try:
            return self._client.get(f"{self.url}/health", timeout=2.0).status_code == 200
        except httpx2.HTTPError:
            return False

    def weights(self) -> str:
        """The name under which its weights were loaded."""
        found = self.get("/weight_info")
        return str(found.get("weight_version", "")) if isinstance(found, dict) else ""

    def load(self, path: str, name: str) -> None:
        """Has the server read its weights from a file that it can see, and calls them `name`."""
        self.post("/start_weight_update")
        self.post("/update_weights", {"update_info": {"path": path}})
        self.post("/finish_weight_update", {"weight_version": name})
        self.post("/reset_prefix_cache")

    def load_adapter(self, folder: str, name: str) -> None:
        """Has the server read adapters from a folder that it can see, to be added to its weights for requests that
        ask for `name`."""
        self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder}, text=True)
        self.post("/reset_prefix_cache")

    def unload_adapter(self, name: str) -> None:
        self.post("/v1/unload_lora_adapter", {"lora_name": name}, text=True)

    def models(self) -> list[str]:
        """The names that requests can ask for: the model's own and those of adapters."""
        found = self.get("/v1/models")
        served = found.get("data") if isinstance(found, dict) else None
        if not isinstance(served, list):
            raise BadReplyError(self.message(f"no list of the models that it serves: {_cut(found)}"))
        return [str(one.get("id")) for one in served if isinstance(one, dict)]

    def digests(self, path: str) -> dict[str, dict[str, str]]:
        """What the server holds: {"file": {name: digest}, "live": {name: digest}}."""
        found = self.post("/collective_rpc", {"method": "steersman_digests", "args": [path]})
        try:
            first = found["results"][0]
            return {kind: dict(first[kind]) for kind in ("file", "live")}
        except (LookupError, TypeError, ValueError) as error:
            raise BadReplyError(self.message(f"no digests of its weights: {_cut(found)}")) from error

    def pause(self) -> None:
        """Cuts what is under way, which comes back as far as it is, and begins nothing until `resume`."""
        self.post("/pause?mode=abort")

    def resume(self) -> None:
        self.post("/resume")

    def message(self, what: str) -> str:
        """An error's text, with the server's address."""
        return f"rollout server {printable(self.url)}: {what}"

    def _ask(self, method: str, path: str, body: Any, timeout: float | None, text: bool = False) -> Any:
        limit = self.timeout if timeout is None else timeout
        try:
            status, raw = self._exchange(method, path, body, limit)
        except httpx2.TimeoutException as error:
            raise ServerGoneError(
                self.message(f"it took {path} and gave no answer within {limit:g} seconds (rollout.timeout)")
            ) from error
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise SteersmanError(self.message(f"no address that can be asked ({error}); see rollout.url")) from error
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise ServerGoneError(self.message(f"it can not be reached ({type(error).__name__}: {error})")) from error
        if status == 404:
            raise SteersmanError(
                self.message(
                    f"it has no route {path.split('?')[0]}. vLLM 0.32 or newer has it, started with the environment "
                    "variable VLLM_SERVER_DEV_MODE=1 (for adapters also VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and "
                    "--enable-lora); docs/how-to/vllm.md has the whole command"
                )
            )
        if status != 200:
            told = self.message(f"status {status} of {path}: {_cut(raw.decode(errors='replace'))}")
            # vLLM's front answers for a while after the process behind it, which has the model, was killed
            gone = status >= 500 and not self.healthy()
            raise ServerGoneError(told) if gone else SteersmanError(told)
        if len(raw) > LARGEST_REPLY:
            raise BadReplyError(self.message(f"a reply to {path} of more than {LARGEST_REPLY >> 20} MiB"))
        return None if text else self._read(path, raw)

    def _exchange(self, method: str, path: str, body: Any, limit: float) -> tuple[int, bytes]:
        """Status and body, which is cut right behind LARGEST_REPLY bytes; the limit is one of the whole exchange."""
        until = time.monotonic() + limit
        with self._client.stream(method, self.url + path, json=body, timeout=limit) as response:
            return response.status_code, read_body(response, LARGEST_REPLY, until)

    def _read(self, path: str, raw: bytes) -> Any:
        if not raw.strip():
            return None
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise BadReplyError(
                self.message(f"the reply to {path} is no JSON: {_cut(raw.decode(errors='replace'))}")
            ) from error


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
        raise BadReplyError(server.message(f"a reply without answers: {_cut(found)}"))
    if len(choices) != wanted:
        raise BadReplyError(server.message(f"{len(choices)} answers where {wanted} were asked for"))
    placed: dict[int, Any] = {}
    for choice in choices:
        index = choice.get("index") if isinstance(choice, dict) else None
        if type(index) is not int or not 0 <= index < wanted or index in placed:
            raise BadReplyError(
                server.message(f"an answer has the number {_cut(index)}; each of 0 to {wanted - 1} comes once")
            )
        placed[index] = choice
    owners = [one for one in asked for _ in range(one.n)]
    return [_reply(server, placed[i], owner, vocabulary, support) for i, owner in enumerate(owners)]


def _reply(server: Server, choice: dict[str, Any], asked: SampleRequest, vocabulary: int, support: bool) -> Reply:
    """One choice. Raises BadReplyError for ids that are none of the vocabulary, more tokens than were asked for,
    log-probabilities that are missing, not finite or above 0, allowed tokens that are not listed for each token, and
    parts of other types than vLLM's."""
    ids, finish = choice.get("token_ids"), choice.get("finish_reason")
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocabulary for i in ids):
        raise BadReplyError(
            server.message(
                f"an answer with ids outside the vocabulary of {vocabulary}: {_cut(ids)}; another model's?"
            )
        )
    if len(ids) > asked.max_new_tokens:
        raise BadReplyError(
            server.message(f"an answer of {len(ids)} tokens where {asked.max_new_tokens} were the most")
        )
    if finish not in ("stop", "length", "abort") or (not ids and finish != "abort"):
        raise BadReplyError(server.message(f"an answer of {len(ids)} tokens that ended with {_cut(finish)}"))
    try:
        told = choice.get("logprobs")
        if not isinstance(told, dict | None):
            raise ValueError(f"logprobs that are no object: {_cut(told)}")
        content = _objects((told or {}).get("content"), "logprobs.content")
        logp = _logp(content, len(ids))
        kept = _support(choice, content, ids) if support else None
        return Reply(ids, logp, finish, _versions(choice, len(ids)), kept)
    except ValueError as error:
        raise BadReplyError(server.message(f"an answer with {error}")) from error


def _logp(content: list[dict[str, Any]], count: int) -> list[float]:
    """The log-probability of each token. Raises ValueError for another number of them, and for what is none."""
    logp: list[Any] = [one.get("logprob") for one in content]
    wrong = [x for x in logp if not _is_number(x) or not UNREACHED < x <= ROUNDING]
    if len(logp) != count or wrong:
        raise ValueError(
            f"{len(logp)} log-probabilities for {count} tokens, or one that is none "
            f"({_cut(wrong[0] if wrong else len(logp))}): its weights may hold NaN"
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
                f"{len(ids)} tokens whose sampling_mask does not list those allowed at each: {_cut(told)}"
            )
        return [torch.tensor(_ids(allowed, "sampling_mask"), dtype=torch.long) for allowed in told]
    kept = []
    for i, one in zip(ids, content, strict=True):
        likeliest = _objects(one.get("top_logprobs"), "top_logprobs")
        if not likeliest or not all(_is_number(top.get("logprob")) for top in likeliest):
            raise ValueError(f"neither a sampling_mask nor the log-probabilities of the likeliest: {_cut(one)}")
        reached = [top.get("token_id") for top in likeliest if top["logprob"] > UNREACHED]
        kept.append(torch.tensor(sorted({*_ids(reached, "top_logprobs"), i}), dtype=torch.long))
    return kept


def _objects(value: Any, name: str) -> list[dict[str, Any]]:
    """A list of JSON objects, empty where it is not told. Raises ValueError for anything else."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ValueError(f"{name} that is no list of objects: {_cut(value)}")
    return value


def _ids(value: Any, name: str) -> list[int]:
    """A list of numbers that may be ids. Raises ValueError for anything else."""
    if not isinstance(value, list) or not all(type(i) is int and abs(i) < _LARGEST for i in value):
        raise ValueError(f"{name} that has other numbers than ids: {_cut(value)}")
    return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _cut(value: Any) -> str:
    """What a server said, short and harmless."""
    return printable(str(value))[:300]
