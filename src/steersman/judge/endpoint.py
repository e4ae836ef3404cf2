"""A judge behind an OpenAI-compatible /chat/completions."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from steersman.judge.cache import Reply
from steersman.judge.config import EndpointConfig
from steersman.types import SteersmanError

AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""Answers that may be different a little later."""
FIRST_PAUSE = 0.5


class Endpoint:
    """Asks over HTTP, several requests at a time, and tries again where that can help.

    After a time-out, a lost connection or a status in AGAIN it pauses and asks again, up to `retries` times: as
    long as Retry-After says, else `0.5 * 2^try` seconds, shortened by up to half at random so that many clients
    do not return together; never longer than `max_wait`. Other statuses are told at once.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        self.url = config.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.tries_again = 0
        self._given_up = threading.Event()

    def ask(self, texts: Sequence[str], keep: Callable[[int, Reply], None], may_ask: Callable[[], bool]) -> None:
        """Asks every text and gives each reply to `keep` as it comes; stops early where `may_ask` is False.

        Raises SteersmanError where a request fails for good; replies that were under way then are kept first.
        """
        self._given_up.clear()
        key = os.environ.get(self.config.key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        waiting, failure = list(range(len(texts)))[::-1], None
        with (
            httpx2.Client(timeout=self.config.timeout, headers=headers) as client,
            ThreadPoolExecutor(self.config.concurrency) as pool,
        ):
            running: dict[Future[Reply], int] = {}
            try:
                while running or (waiting and failure is None):
                    while waiting and failure is None and len(running) < self.config.concurrency and may_ask():
                        index = waiting.pop()
                        running[pool.submit(self._one, client, texts[index])] = index
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        index, error = running.pop(future), future.exception()
                        if error is None:
                            keep(index, future.result())
                        else:
                            failure = failure or error
                            self._given_up.set()
            finally:
                self._given_up.set()
        if failure is not None:
            raise failure

    def _one(self, client: httpx2.Client, text: str) -> Reply:
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
            **self.config.extra,
        }
        trouble = ""
        for attempt in range(self.config.retries + 1):
            pause = min(FIRST_PAUSE * 2**attempt, self.config.max_wait) * random.uniform(0.5, 1.0)
            try:
                response = client.post(self.url, json=body)
            except httpx2.TimeoutException:
                trouble = f"no reply within {self.config.timeout:g} seconds"
            except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
                raise SteersmanError(f"judge {self.url}: no address that can be asked ({error})") from error
            except (httpx2.TransportError, httpx2.DecodingError) as error:
                trouble = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    reply = _reply(response, text)
                    if reply is not None:
                        return reply
                    trouble = f"a reply that is no chat completion: {response.text[:120]!r}"
                elif response.status_code in AGAIN:
                    trouble = f"status {response.status_code}"
                    pause = min(_retry_after(response) or pause, self.config.max_wait)
                else:
                    raise SteersmanError(self._refused(response))
            if attempt < self.config.retries:
                self.tries_again += 1
                if self._given_up.wait(pause):
                    break
        raise SteersmanError(f"judge {self.url}: {trouble}, after {self.config.retries + 1} tries")

    def _refused(self, response: httpx2.Response) -> str:
        hint = ""
        if response.status_code in (401, 403):
            hint = f"; put the key into the environment variable {self.config.key_env}"
        if response.status_code == 404:
            hint = "; is the address right up to its version (.../v1), and the model's name?"
        return f"judge {self.url}: status {response.status_code}: {response.text[:200]!r}{hint}"


def _reply(response: httpx2.Response, text: str) -> Reply | None:
    """Text and tokens of a chat completion (a word of English is about 1.3 tokens where it does not say)."""
    try:
        body = response.json()
        said = body["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return None
    if not isinstance(said, str | None):
        return None
    usage = body.get("usage")
    told = usage.get("total_tokens") if isinstance(usage, dict) else None
    said = said or ""
    tokens = told if isinstance(told, int) else round(1.3 * (len(text.split()) + len(said.split())))
    return {"text": said, "tokens": tokens}


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds that the server asks to wait, as a number or a date; None where it does not say."""
    told = response.headers.get("retry-after", "")
    try:
        return max(float(told), 0.0)
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(told)
    except ValueError:
        return None
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max((until - datetime.now(UTC)).total_seconds(), 0.0)
