"""Episodes recorded, and played again without their environment.

A record is a file of JSON lines: what an environment said to the replies that it had been given so far, under the
episode's seed. Played again, the same replies under that seed get the same answers, though the tool is slow, costs
money or answers otherwise today; replies that the record does not hold are a fault, as `environment.on_fault` says.
Episodes of one seed that say the same are one: the first is kept.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steersman.data.examples import Message
from steersman.environments.classes import FaultError
from steersman.environments.port import Answer, Environment, EnvironmentAround, Episode, Reply
from steersman.jsonl import append_jsonl, parse_jsonl
from steersman.types import SteersmanError


class RecordedEnvironment(EnvironmentAround):
    """`inner`, with a record at `path`: written beside it, or, with `replay`, read in its place.

    Raises SteersmanError for a record that is not there or has a broken line.
    """

    def __init__(self, inner: Environment, path: str, *, replay: bool) -> None:
        super().__init__(inner)
        self.path, self.replay = Path(path), replay
        self.records = _read(self.path) if replay else {}

    def describe(self) -> str:
        return f"{self.inner.describe()}, {'from' if self.replay else 'recorded in'} {self.path}"

    def open(self) -> Episode:
        return ReplayedEpisode(self) if self.replay else RecordedEpisode(self, self.inner.open())

    def write(self, key: str, told: Any) -> None:
        """Adds a line, at once and whole."""
        append_jsonl(self.path, {"key": key, "told": told})


class RecordedEpisode:
    """An episode that is written down as it is played."""

    def __init__(self, environment: RecordedEnvironment, inner: Episode) -> None:
        self.environment, self.inner, self.key = environment, inner, ""

    def begin(self, messages: list[Message], row: dict[str, Any], seed: int) -> list[Message]:
        self.key = _key(str(seed), "")
        begun = self.inner.begin(messages, row, seed)
        self.environment.write(self.key, begun)
        return begun

    def step(self, reply: Reply) -> Answer:
        self.key = _key(self.key, reply.text)
        answer = self.inner.step(reply)
        self.environment.write(self.key, asdict(answer))
        return answer

    def close(self) -> None:
        self.inner.close()


class ReplayedEpisode:
    """An episode as it stands in the record."""

    def __init__(self, environment: RecordedEnvironment) -> None:
        self.environment, self.key = environment, ""

    def begin(self, messages: list[Message], row: dict[str, Any], seed: int) -> list[Message]:
        self.key = _key(str(seed), "")
        return self._told()

    def step(self, reply: Reply) -> Answer:
        self.key = _key(self.key, reply.text)
        return Answer(**self._told())

    def close(self) -> None:
        """Nothing is open."""

    def _told(self) -> Any:
        if self.key not in self.environment.records:
            raise FaultError(f"{self.environment.path} holds no such episode: the replies differ from those recorded")
        return self.environment.records[self.key]


def _key(before: str, said: str) -> str:
    """A name for a seed and everything that was said under it."""
    return hashlib.sha256(json.dumps([before, said]).encode()).hexdigest()[:32]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SteersmanError(f"environment.record: {path}: there is no such file; record it first, without replay")
    told: dict[str, Any] = {}
    try:
        for place, row in parse_jsonl(path):
            if not isinstance(row, dict) or not {"key", "told"} <= row.keys():
                raise SteersmanError(f"{place}: no object with `key` and `told`")
            told.setdefault(row["key"], row["told"])
    except SteersmanError as error:
        raise SteersmanError(f"environment.record: {error}; remove the line") from error
    return told
