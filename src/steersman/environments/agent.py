"""Agent programs as they are: each episode is one run of a program that asks the policy through OpenAI's protocol.

The program is told where to ask by the variables that OpenAI's clients read, OPENAI_BASE_URL and OPENAI_API_KEY. A
request that goes on from the last answer is the next turn of the same conversation; any other begins a conversation
of its own, trained as a segment of the episode. The episode is over when the program ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

from steersman.data.examples import Message
from steersman.environments.agent_server import AgentServer, ChatRequest
from steersman.environments.classes import FaultError
from steersman.environments.port import Answer, Episode, PayingEnvironment, Reply
from steersman.environments.text import clean_text, reward_of
from steersman.guards.untrusted import parse_json
from steersman.types import SteersmanError

_OUTPUT = 1 << 20
"""Bytes of a program's output that are kept."""


class AgentEnvironment(PayingEnvironment):
    """Runs `command` once per episode; `pays` says that its last line of output is `{"reward": NUMBER}`.
    A request brings its own tools.

    The program reads the row from its standard input, as one JSON object: the row's columns, `prompt` (its turns) and
    `seed`. Raises SteersmanError for a program that is not there.
    """

    def __init__(self, command: Sequence[str], *, pays: bool, time_limit: float, longest: int) -> None:
        if shutil.which(command[0]) is None:
            raise SteersmanError(f"environment.agent: there is no program {command[0]!r}")
        self.command, self._pays, self.time_limit, self.longest = list(command), pays, time_limit, longest
        self._server: AgentServer | None = None
        self._lock = threading.Lock()

    @property
    def pays(self) -> bool:
        return self._pays

    def describe(self) -> str:
        return f"the program {' '.join(self.command)}"

    def open(self) -> Episode:
        with self._lock:
            if self._server is None:
                self._server = AgentServer()
        return AgentEpisode(self, self._server)


class AgentEpisode:
    """One run of the program."""

    def __init__(self, environment: AgentEnvironment, server: AgentServer) -> None:
        self.environment, self.server, self.key = environment, server, secrets.token_hex(16)
        self.line: queue.SimpleQueue[ChatRequest | None] = queue.SimpleQueue()
        self.process: subprocess.Popen[bytes] | None = None
        self.request: ChatRequest | None = None
        self.output, self.errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115 (until `close`)

    def begin(self, messages: list[Message], row: dict[str, Any], seed: int) -> list[Message]:
        given = json.dumps({**row, "prompt": messages, "seed": seed}, default=str).encode()
        self.server.lines[self.key] = self.line
        self.process = subprocess.Popen(
            self.environment.command, stdin=subprocess.PIPE, stdout=self.output, stderr=self.errors,
            start_new_session=True, env=os.environ | {
                "OPENAI_BASE_URL": self.server.url, "OPENAI_API_KEY": self.key, "NO_PROXY": "127.0.0.1",
            },
        )  # fmt: skip
        threading.Thread(target=self._feed, args=(given,), name="agent's row", daemon=True).start()
        self.request = self._next()
        if self.request is None:
            raise FaultError(f"the program ended without a request{self._errors()}")
        return self._shown(self.request)

    def step(self, reply: Reply) -> Answer:
        before = self.request
        assert before is not None
        before.answer(reply)
        after = self.request = self._next()
        if after is None:
            return Answer(reward=self._reward(), done=True)
        held = [*before.messages, before.as_message()]
        if after.tools == before.tools and len(after.messages) > len(held) and after.messages[: len(held)] == held:
            return Answer([self._cut(m) for m in after.messages[len(held) :]])
        return Answer(self._shown(after), new_conversation=True)

    def close(self) -> None:
        self.server.lines.pop(self.key, None)
        if self.request is not None:
            self.request.answer(None)
        while not self.line.empty():
            if (waiting := self.line.get()) is not None:
                waiting.answer(None)
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.output.close()
        self.errors.close()

    def _feed(self, given: bytes) -> None:
        """Gives the program its row, and tells when it has ended."""
        assert self.process is not None
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(given + b"\n")
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()
        self.line.put(None)

    def _next(self) -> ChatRequest | None:
        """The program's next request; None where it has ended well."""
        limit, start = self.environment.time_limit, time.monotonic()
        try:
            asked = self.line.get(timeout=limit)
        except queue.Empty:
            raise FaultError(f"the program asked nothing for {time.monotonic() - start:.3g} s") from None
        if asked is not None:
            return asked
        assert self.process is not None
        code = self.process.wait()
        if code != 0:
            raise FaultError(f"the program ended with exit code {code}{self._errors()}")
        return None

    def _shown(self, asked: ChatRequest) -> list[Message]:
        messages = [self._cut(m) for m in asked.messages]
        return [{**messages[0], "tools": asked.tools}, *messages[1:]] if asked.tools else messages

    def _cut(self, message: Message) -> Message:
        return {**message, "content": clean_text(message["content"], self.environment.longest)}

    def _errors(self) -> str:
        self.errors.seek(max(0, self.errors.seek(0, os.SEEK_END) - 2000))
        text = self.errors.read().decode("utf-8", "replace").strip()
        return f": {clean_text(text[-300:], 300)}" if text else ""

    def _reward(self) -> float:
        if not self.environment.pays:
            return 0.0
        self.output.seek(max(0, self.output.seek(0, os.SEEK_END) - _OUTPUT))
        lines = self.output.read().decode("utf-8", "replace").strip().splitlines()
        try:
            return reward_of(parse_json(lines[-1], "reward")["reward"], "the program")
        except (IndexError, KeyError, TypeError) as error:
            raise FaultError('the program\'s last line of output is not {"reward": NUMBER}') from error
        except ValueError as error:
            raise FaultError(f"the program's reward: {error}") from error
