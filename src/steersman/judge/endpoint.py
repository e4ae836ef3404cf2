"""Questions to an OpenAI-compatible server, several at a time and again where that can help; a judge's chat."""

from __future__ import annotations

import asyncio
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import httpx2

from steersman.data.examples import Content, user
from steersman.guards import retry
from steersman.guards.reply import without_key
from steersman.guards.untrusted import without_half_pairs
from steersman.judge.cache import MOST_TOKENS, Reply, UnansweredError
from steersman.judge.config import AddressConfig, EndpointConfig
from steersman.types import SteersmanError

Q = TypeVar("Q")
R = TypeVar("R")
Lose = Callable[[int, UnansweredError], SteersmanError | None]

CUT = ("length", "content_filter")
"""Values of finish_reason that say that a reply was ended for its writer."""
LARGEST_REPLY = 8 << 20
"""Bytes of one reply, unpacked; what is longer is no reply."""


OF_THE_QUESTION = (400, 413, 422)
"""Statuses that refuse one question (its words, its length); another may well be answered."""
OF_THE_SERVER = (429, 503, 529)
"""Statuses of a server that takes no question at the time, whichever it is."""


class RefusedError(SteersmanError):
    """The server answered by a status that says that it does not do what it was asked for."""


class RefusedQuestionError(RefusedError, UnansweredError):
    """The server refused this question."""

    refused = True


def end_the_run(_index: int, error: UnansweredError) -> SteersmanError | None:
    """What becomes of a question without a reply where a caller does not say: the error ends the asking."""
    return error


class Caller(ABC, Generic[Q, R]):
    """Asks over HTTP, several requests at a time, and tries again where that can help.

    After a time-out, a lost connection or a status in `retry.AGAIN` it pauses as `retry.pause` says, never longer
    than `max_wait`, and asks again, up to `retries` times. Other statuses are told at once.

    A kind of question gives its `path`, the `body` of a request, and what `read` makes of a reply; `who` is the
    section of the recipe, for errors.
    """

    who: str
    path: str
    expected_form: str

    def __init__(self, config: AddressConfig) -> None:
        self.config = config
        self.url = config.url.rstrip("/").removesuffix(self.path) + self.path
        self.retried = 0

    @abstractmethod
    def body(self, question: Q) -> dict[str, Any]:
        """The request, without its model and the recipe's further fields."""

    @abstractmethod
    def read(self, raw: bytes, question: Q) -> R | None:
        """What a reply says; None where it is not what was asked for."""

    def ask(
        self,
        questions: Sequence[Q],
        keep: Callable[[int, R], None],
        may_ask: Callable[[], bool],
        lose: Lose = end_the_run,
    ) -> None:
        """Asks every question and gives each reply to `keep` as it comes; stops early where `may_ask` is False.

        A question that got no reply goes to `lose`, which returns the error that is to end the asking, or None.
        Raises that error, or SteersmanError where no question can be asked; replies that were under way then are
        kept first.
        """
        _run(self._ask(questions, keep, may_ask, lose))

    async def _ask(
        self, questions: Sequence[Q], keep: Callable[[int, R], None], may_ask: Callable[[], bool], lose: Lose
    ) -> None:
        waiting, given_up = list(range(len(questions)))[::-1], asyncio.Event()
        failure: Exception | None = None
        running: dict[asyncio.Task[R], int] = {}
        # as many connections as `concurrency`: the library's own limit of 100 would have requests wait unsent
        no_limit = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(
            timeout=self.config.timeout, headers=self._headers(), limits=no_limit
        ) as client:
            while running or (waiting and failure is None):
                while waiting and failure is None and len(running) < self.config.concurrency and may_ask():
                    index = waiting.pop()
                    running[asyncio.create_task(self._one(client, questions[index], given_up))] = index
                if not running:
                    return
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    index = running.pop(task)
                    try:
                        reply = task.result()
                    except UnansweredError as error:
                        failure = failure or lose(index, error)
                    except Exception as error:  # told behind the replies that are under way
                        failure = failure or error
                    else:
                        keep(index, reply)
                if failure is not None:
                    given_up.set()
        if failure is not None:
            raise failure

    async def _one(self, client: httpx2.AsyncClient, question: Q, given_up: asyncio.Event) -> R:
        trouble, of_server = "", False
        for attempt in range(self.config.retries + 1):
            response, of_server = None, False
            try:
                response, raw = await self._post(client, question)
            except httpx2.ConnectTimeout:
                trouble, of_server = f"no connection within {self.config.timeout:g} seconds", True
            except (httpx2.TimeoutException, TimeoutError):
                trouble = f"no reply within {self.config.timeout:g} seconds"
            except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
                raise SteersmanError(self._message(f"no address that can be asked ({error})")) from error
            except httpx2.ConnectError as error:
                trouble, of_server = f"{type(error).__name__}: {error}", True
            except (httpx2.TransportError, httpx2.DecodingError) as error:
                trouble = f"{type(error).__name__}: {error}"
            else:
                if len(raw) > LARGEST_REPLY:
                    trouble = f"a reply of more than {LARGEST_REPLY >> 20} MiB"
                elif response.status_code == 200:
                    reply = self.read(raw, question)
                    if reply is not None:
                        return reply
                    trouble = f"a reply that is no {self.expected_form}: {self._quoted(raw, 120)}"
                elif response.status_code in retry.AGAIN:
                    trouble, of_server = f"status {response.status_code}", response.status_code in OF_THE_SERVER
                else:
                    refusal = self._message(self._refused(response.status_code, raw))
                    if response.status_code in OF_THE_QUESTION:
                        raise RefusedQuestionError(refusal)
                    raise RefusedError(refusal)
            if attempt < self.config.retries:
                self.retried += 1
                try:
                    await asyncio.wait_for(given_up.wait(), retry.pause(attempt, self.config.max_wait, response))
                    break
                except TimeoutError:
                    pass
        told = self._message(f"{trouble}, after {self.config.retries + 1} tries")
        raise SteersmanError(told) if of_server else UnansweredError(told)

    async def _post(self, client: httpx2.AsyncClient, question: Q) -> tuple[httpx2.Response, bytes]:
        """The response and its body, cut right behind LARGEST_REPLY bytes.

        The time limit is one of the whole exchange: a server that sends a byte now and then does not extend it.
        """
        body = {"model": self.config.model, **self.body(question), **self.config.extra}
        raw = bytearray()
        async with asyncio.timeout(self.config.timeout), client.stream("POST", self.url, json=body) as response:
            async for piece in response.aiter_bytes():
                raw += piece
                if len(raw) > LARGEST_REPLY:
                    break
        return response, bytes(raw)

    def _key(self) -> str:
        return os.environ.get(self.config.key_env, "").strip()

    def _headers(self) -> dict[str, str]:
        key = self._key()
        if not key.isascii() or not key.isprintable():
            raise SteersmanError(
                f"{self.who}: the environment variable {self.config.key_env} holds characters that no key has; "
                "set it anew"
            )
        # Unpacking would make a small reply a large one.
        return {"accept-encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def _message(self, what: str) -> str:
        """An error's text, with the server's address, without its key."""
        return self._without_key(f"{self.who} {self.url}: {what}")

    def _quoted(self, raw: bytes, limit: int) -> str:
        # The key goes first, so that no cut leaves a part of it.
        return repr(self._without_key(raw.decode(errors="replace"))[:limit])

    def _without_key(self, text: str) -> str:
        return without_key(text, self._key())

    def _refused(self, status: int, raw: bytes) -> str:
        hint = ""
        if status in (401, 403):
            hint = f"; put the key into the environment variable {self.config.key_env}"
        if status == 404:
            hint = "; is the address right up to its version (.../v1), and the model's name?"
        return f"status {status}: {self._quoted(raw, 200)}{hint}"


class Endpoint(Caller[Content, Reply]):
    """A judge behind /chat/completions: a text (a user's turn) or a conversation in, a reply and what it cost out."""

    path, expected_form = "/chat/completions", "chat completion"

    def __init__(self, config: EndpointConfig, who: str) -> None:
        super().__init__(config)
        self.who = who
        self.temperature, self.max_tokens = config.temperature, config.max_tokens

    def body(self, question: Content) -> dict[str, Any]:
        turns = user(question) if isinstance(question, str) else question
        return {
            "messages": [{"role": m["role"], "content": without_half_pairs(m["content"])} for m in turns],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }

    def read(self, raw: bytes, question: Content) -> Reply | None:
        """Text and tokens of a chat completion, and whether it was cut; None where it is none."""
        try:
            body = json.loads(raw)
            choice = body["choices"][0]
            said, ended = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, RecursionError):
            return None
        if not isinstance(said, str | None):
            return None
        said = self._without_key(without_half_pairs(said or ""))
        asked = question if isinstance(question, str) else " ".join(m["content"] for m in question)
        return {"text": said, "tokens": _tokens(body.get("usage"), asked, said), "cut": ended in CUT}


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Runs to the end in a thread with an event loop of its own: the caller's thread, a notebook's, may have one.

    What interrupts the caller ends the work too.
    """
    under_way: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[None] | None]] = []

    async def main() -> None:
        under_way.append((asyncio.get_running_loop(), asyncio.current_task()))
        await work

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(asyncio.run, main())
        try:
            done.result()
        except BaseException:
            for loop, task in under_way:
                if task is not None and not done.done():
                    loop.call_soon_threadsafe(task.cancel)
            raise


def _tokens(usage: Any, text: str, said: str) -> int:
    """Tokens that the endpoint counted; where it does not say, or what can not be, 1.3 for each word.

    A count below a quarter of that, or above MOST_TOKENS, can not be: it would make the budget worth nothing.
    """
    own = round(1.3 * (len(text.split()) + len(said.split())))
    told = usage.get("total_tokens") if isinstance(usage, dict) else None
    if isinstance(told, int) and not isinstance(told, bool) and max(own / 4, 1) <= told <= MOST_TOKENS:
        return told
    return own
