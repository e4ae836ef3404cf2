"""Requests to a server that samples: sent again where that can help, and told by name where it can not.

The routes are vLLM's own: /inference/v1/generate (token ids in, token ids out), /pause and /resume,
/start_weight_update, /update_weights, /finish_weight_update and /weight_info, /v1/load_lora_adapter and
/v1/unload_lora_adapter. The engine in another process (`serve.py`) answers the same ones.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx2

from steersman.guards import retry
from steersman.guards.reply import read_body
from steersman.guards.terminal import printable
from steersman.types import SteersmanError

LARGEST_REPLY = 1 << 30
"""Bytes; what is longer is no reply."""
PASSING = retry.AGAIN - {500}
"""Statuses that may be others a little later. 500 is no such: an engine fails at the same batch again."""
TRIES = 5
"""How often a request is sent before a server is given up that can not be reached or is busy."""
LONGEST_PAUSE = 60.0
"""Seconds between two tries at most, whatever Retry-After says."""
ACTIVE = "update is already active"
"""What vLLM says where an update is begun and another was never finished."""
KEPT_OPEN = 2.0
"""Seconds for which an idle connection is used again: vLLM closes its own after 5, and what is sent just then is
lost."""


ENGINE_KEY, VLLM_KEY = "STEERSMAN_ENGINE_KEY", "VLLM_API_KEY"
"""Environment variables with the key that requests to our engine, and to vLLM, bear."""


class ServerGoneError(SteersmanError):
    """The server can not be reached, fell silent or lost the weights: one that steersman started is started again."""


class NotServedError(SteersmanError):
    """The server knows no model or adapters of the name, or sees no folder, that it was asked for."""


class BadReplyError(SteersmanError):
    """The server answered, and the answer can not be right."""


class PassingTroubleError(Exception):
    """A request failed with what may be over a little later: `failure` is raised where it is not. `untaken` says that
    the server has not begun with it."""

    def __init__(self, failure: SteersmanError, *, untaken: bool, response: httpx2.Response | None = None) -> None:
        super().__init__(str(failure))
        self.failure, self.untaken, self.response = failure, untaken, response


@dataclass(slots=True, frozen=True)
class StartedWith:
    """Settings of a vLLM server: `most` sequences decoded at a time, those of its `model` that are numbers, which
    log-probabilities it tells (`logprobs_mode`), of how many tokens at most (`max_logprobs`; -1: of all), and the
    largest rank of adapters that it takes (`max_lora_rank`; 0: it takes none)."""

    most: int
    model: dict[str, Any]
    logprobs_mode: str
    max_logprobs: int
    max_lora_rank: int


class Server:
    """One server by its address. Every call has a time limit, and says in its error which server did not answer.

    Every request bears the `key` of the server, if it has one.

    A request whose line was lost, or that the server was too busy for, is sent again, `TRIES` times in all with
    pauses as `retry.pause` says. One that steersman started (`restartable`) is asked again only while it is healthy.
    Raises ServerGoneError where it can not be reached, does not answer in time, or fails and is not healthy any
    more, NotServedError where it does not know what it is asked for, SteersmanError where it refuses otherwise.
    """

    def __init__(self, url: str, timeout: float, *, restartable: bool = False, key: str = "") -> None:
        self.url, self.timeout, self.restartable = url.rstrip("/"), timeout, restartable
        # As many connections as there are callers: a request that waits for one would count as a server that is
        # silent. A proxy of the environment's would stand between two processes of one machine.
        limits = httpx2.Limits(max_connections=None, keepalive_expiry=KEPT_OPEN)
        self.key, headers = key, {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx2.Client(timeout=timeout, trust_env=False, limits=limits, headers=headers)
        # For /health: a server may close the connection of a request that failed, and what is sent over it just then
        # is lost, however well the server is.
        once = httpx2.Limits(max_keepalive_connections=0)
        self._fresh = httpx2.Client(timeout=2.0, trust_env=False, limits=once, headers=headers)

    def close(self) -> None:
        self._client.close()
        self._fresh.close()

    def get(self, path: str) -> Any:
        """What the route answers, read as JSON."""
        return self._read(path, self._ask("GET", path, None, True))

    def post(self, path: str, body: Any = None) -> Any:
        """What the route answers, read as JSON. Sent twice it must do what it does sent once."""
        return self._read(path, self._ask("POST", path, body, True))

    def post_once(self, path: str, body: Any = None) -> None:
        """For what must not be done twice: it is sent again only where the server has not begun with it."""
        self._ask("POST", path, body, False)

    def healthy(self) -> bool:
        """Whether it says within two seconds, over a connection of its own, that it can work."""
        try:
            return self._fresh.get(f"{self.url}/health").status_code == 200
        except (httpx2.HTTPError, RuntimeError):  # RuntimeError: closed, see `_send`
            return False

    def weights(self) -> str:
        """The name under which its weights were loaded."""
        found = self.get("/weight_info")
        return str(found.get("weight_version", "")) if isinstance(found, dict) else ""

    def load(self, path: str, name: str) -> None:
        """Has the server read its weights from a file that it can see, and calls them `name`."""
        self._begin_update()
        self.post_once("/update_weights", {"update_info": {"path": path}})
        self.post_once("/finish_weight_update", {"weight_version": name})
        self.post("/reset_prefix_cache")

    def _begin_update(self) -> None:
        """Begins an update. One that nobody finished, as a run that is killed leaves it, is finished before, with
        weights of no name; until then the server would refuse any other."""
        try:
            self.post_once("/start_weight_update")
        except SteersmanError as error:
            if ACTIVE not in str(error):
                raise
            self.post_once("/finish_weight_update", {"weight_version": ""})
            self.post_once("/start_weight_update")

    def load_adapter(self, folder: str, name: str) -> None:
        """Has the server read adapters from a folder that it can see, to be added to its weights for requests that
        ask for `name`."""
        try:
            self.post_once("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})
        except NotServedError as error:
            raise SteersmanError(f"{error}; name a folder that the server sees too in rollout.folder") from error
        self.post("/reset_prefix_cache")

    def unload_adapter(self, name: str) -> None:
        """Has the server forget the adapters; nothing happens where it does not know them."""
        with suppress(NotServedError):
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name}, True)

    def models(self) -> list[str]:
        """The names that requests can ask for: the model's own and those of adapters."""
        return [str(one.get("id")) for one in self._served()]

    def window(self) -> int | None:
        """How many tokens a prompt and its answer may have together, where the server says."""
        told = [one.get("max_model_len") for one in self._served()]
        return min((length for length in told if type(length) is int), default=None)

    def settings(self) -> StartedWith:
        """What vLLM was started with, as steersman's extension tells."""
        try:
            found = self.post("/collective_rpc", {"method": "steersman_settings"})
        except ServerGoneError:
            raise
        except SteersmanError as error:
            raise SteersmanError(
                f"{error}; start it with --worker-extension-cls steersman_vllm.Worker, and this steersman's folder "
                "rollout/remote/extension on its PYTHONPATH"
            ) from error
        try:
            first = found["results"][0]
            return StartedWith(
                int(first["max_num_seqs"]), dict(first["model"]), str(first["logprobs_mode"]),
                int(first["max_logprobs"]), int(first["max_lora_rank"]),
            )  # fmt: skip
        except (LookupError, TypeError, ValueError) as error:
            raise BadReplyError(
                self.message(
                    f"it does not tell what it was started with: {shortened(found)}. Its extension may be of another "
                    "steersman: start it again with this one's folder rollout/remote/extension on its PYTHONPATH"
                )
            ) from error

    def tokenized(self, request: dict[str, Any]) -> Any:
        """What its tokenizer makes of a request to /tokenize; None where it has no such route or refuses."""
        try:
            return self.post("/tokenize", request)
        except ServerGoneError:
            raise
        except SteersmanError:
            return None

    def _served(self) -> list[dict[str, Any]]:
        found = self.get("/v1/models")
        served = found.get("data") if isinstance(found, dict) else None
        if not isinstance(served, list):
            raise BadReplyError(self.message(f"no list of the models that it serves: {shortened(found)}"))
        return [one for one in served if isinstance(one, dict)]

    def digests(self, path: str) -> dict[str, dict[str, str]]:
        """What the server holds: {"file": {name: digest}, "live": {name: digest}}."""
        found = self.post("/collective_rpc", {"method": "steersman_digests", "args": [path]})
        try:
            first = found["results"][0]
            return {kind: dict(first[kind]) for kind in ("file", "live")}
        except (LookupError, TypeError, ValueError) as error:
            raise BadReplyError(self.message(f"no digests of its weights: {shortened(found)}")) from error

    def pause(self) -> None:
        """Cuts what is under way, which comes back as far as it is, and begins nothing until `resume`."""
        self.post("/pause?mode=abort")

    def resume(self) -> None:
        self.post("/resume")

    def message(self, what: str) -> str:
        """An error's text, with the server's address."""
        return f"rollout server {printable(self.url)}: {what}"

    def _ask(self, method: str, path: str, body: Any, repeatable: bool) -> bytes:
        """The body of the route's answer, asked for again where that can help."""
        attempt = 0
        while True:
            try:
                return self._send(method, path, body)
            except PassingTroubleError as trouble:
                attempt += 1
                given_up = attempt == TRIES or (self.restartable and not self.healthy())
                if given_up or not (repeatable or trouble.untaken):
                    raise trouble.failure from trouble
                time.sleep(retry.pause(attempt - 1, LONGEST_PAUSE, trouble.response))

    def _send(self, method: str, path: str, body: Any) -> bytes:
        """The body of the answer to one request. Raises PassingTroubleError for what may be over a little later."""
        try:
            response, raw = self._exchange(method, path, body)
        except httpx2.TimeoutException as error:
            raise ServerGoneError(
                self.message(f"it took {path} and gave no answer within {self.timeout:g} seconds (rollout.timeout)")
            ) from error
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise SteersmanError(self.message(f"no address that can be asked ({error}); see rollout.url")) from error
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            untaken = isinstance(error, httpx2.ConnectError)
            told = "it can not be reached" if untaken else f"the line to it was lost before it answered {path}"
            lost = ServerGoneError(self.message(f"{told} ({type(error).__name__}: {error})"))
            raise PassingTroubleError(lost, untaken=untaken) from error
        except RuntimeError as error:  # the library's word for a client that another thread has closed
            raise ServerGoneError(self.message("it was ended")) from error
        status = response.status_code
        if status in PASSING:
            raise PassingTroubleError(
                self._refusal(path, status, raw), untaken=status in retry.NOT_TAKEN, response=response
            )
        if status != 200:
            raise self._refusal(path, status, raw)
        if len(raw) > LARGEST_REPLY:
            raise BadReplyError(self.message(f"a reply to {path} of more than {LARGEST_REPLY >> 20} MiB"))
        return raw

    def _refusal(self, path: str, status: int, raw: bytes) -> SteersmanError:
        """What an answer of another status than 200 means."""
        said = _words(raw)
        if status == 404 and said is None:
            return SteersmanError(
                self.message(
                    f"it has no route {path.split('?')[0]}. vLLM 0.32 or newer has it, started with the environment "
                    "variable VLLM_SERVER_DEV_MODE=1 (for adapters also VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and "
                    "--enable-lora); docs/how-to/vllm.md has the whole command"
                )
            )
        told = self.message(f"status {status} of {path}: {said or shortened(raw.decode(errors='replace'))}")
        if status == 404:
            return NotServedError(told)
        if status in (401, 403):
            return SteersmanError(
                f"{told}; put the server's key into the environment variable {ENGINE_KEY} (of vLLM: {VLLM_KEY})"
            )
        # vLLM's front answers for a while after the process behind it, which has the model, was killed
        return ServerGoneError(told) if status >= 500 and not self.healthy() else SteersmanError(told)

    def _exchange(self, method: str, path: str, body: Any) -> tuple[httpx2.Response, bytes]:
        """The response and its body, which is cut right behind LARGEST_REPLY bytes; the limit is one of the whole
        exchange."""
        until = time.monotonic() + self.timeout
        with self._client.stream(method, self.url + path, json=body) as response:
            return response, read_body(response, LARGEST_REPLY, until)

    def _read(self, path: str, raw: bytes) -> Any:
        if not raw.strip():
            return None
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise BadReplyError(
                self.message(f"the reply to {path} is no JSON: {shortened(raw.decode(errors='replace'))}")
            ) from error


def _words(raw: bytes) -> str | None:
    """What vLLM says in the object `error` of a refusal; None for any other body, such as that of a route that is
    not there."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    error = found.get("error") if isinstance(found, dict) else None
    return shortened(error.get("message")).rstrip(".") if isinstance(error, dict) else None


def shortened(value: Any) -> str:
    """What a server said, short and harmless."""
    return printable(str(value))[:300]
