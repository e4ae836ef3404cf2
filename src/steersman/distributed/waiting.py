"""What each rank notes before it waits for the others, so that one that waits in vain can say who is missing.

Every collective has a time limit. A rank that waits in vain says in which call, and where the others were last.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from steersman.types import SteersmanError

PATIENCE = 5.0
"""Seconds that a rank which waited in vain gives the others to say that they did too."""


class WaitedInVainError(SteersmanError):
    """A collective did not come about, so the ranks no longer reach each other: there is nobody to agree with."""


class MissingRankError(WaitedInVainError):
    """Another rank did not come to it: that has died, or hangs."""


class NoStore:
    """The store of a process that is alone: nobody reads it."""

    def set(self, key: str, value: str) -> None:
        return None


@dataclass(slots=True, frozen=True)
class Other:
    """Where another rank was last: in its call `calls`, which it named `where`; None where it can not be asked."""

    rank: int
    calls: int | None = None
    where: str = ""
    waits: bool = False

    def told(self, here: int) -> str:
        """In words, beside a rank that is in call `here`."""
        if self.calls is None:
            return f"rank {self.rank} can no longer be asked"
        how = ", behind" if self.calls < here else ""
        how += "" if self.waits else ", and is not waiting"
        return f"rank {self.rank} was last in call {self.calls} ({self.where}){how}"


@dataclass(slots=True)
class Waits:
    """The calls of rank `rank` of `world` that wait for other ranks, as noted in the `store` that all can read.

    `where` keeps the calls of one process group apart from those of another.
    """

    rank: int
    world: int
    store: Any
    where: str = "at"
    calls: int = field(default=0, init=False)

    @contextmanager
    def call(self, what: str) -> Iterator[None]:
        """Around one collective: noted where the others can read it, so that a time-out can name who is missing.
        Errors that no other rank is to blame for pass."""
        self.calls += 1
        with self._blamed(f"{what} failed"):
            self.store.set(self._place(self.rank), f"{self.calls} {what}")
            yield

    @contextmanager
    def layers(self) -> Iterator[None]:
        """Around calls that torch makes by itself: names the missing rank where the weights or gradients of a layer
        in pieces, which it gathers and adds up, did not come in time. Other errors pass."""
        with self._blamed("pieces of a layer did not come"):
            yield

    @contextmanager
    def _blamed(self, said: str) -> Iterator[None]:
        """Raises MissingRankError where ranks no longer reach each other and one of them is missing,
        WaitedInVainError with the cause where all wait in vain in the same call."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
                raise
            head = f"rank {self.rank} of {self.world}: {said}"
            others = self.others()
            if all(other.calls == self.calls and other.waits for other in others):
                raise WaitedInVainError(f"{head} on every rank, so none is missing; the cause: {error}") from error
            told = "; ".join(other.told(self.calls) for other in others)
            raise MissingRankError(
                f"{head}. This is call {self.calls}; {told}. A rank that is not waiting has died or hangs"
            ) from error

    def ends_alike(self, how: str) -> bool:
        """Whether every rank, after an error, comes here within a few seconds of the others, after as many calls and
        with the same `how`: then all get True, and may make further calls together. Otherwise all get False.

        It is no collective, since a rank that has no error may be waiting in one. Asked once in a run.
        """
        if self.world == 1:
            return True
        mine, places = f"{self.calls} {how}", [f"{self._place(rank)}/ends" for rank in range(self.world)]
        try:
            self.store.set(places[self.rank], mine)
            alike = self._all_say(places, mine)
            # The first to answer answers for all.
            return self.store.compare_set(f"steersman/{self.where}/alike", "", str(alike)) == b"True"
        except Exception:  # the store went with its rank
            return False

    def _all_say(self, places: list[str], what: str) -> bool:
        try:
            self.store.wait(places, timedelta(seconds=PATIENCE))
        except RuntimeError:  # a rank did not come
            return False
        return all(self.store.get(place).decode() == what for place in places)

    def others(self) -> list[Other]:
        """Where every other rank was last, and whether it waits in vain as this one did, as far as the store can
        still be asked."""
        found = []
        with suppress(Exception):
            self.store.set(f"{self._place(self.rank)}/waits", "")
        for rank in range(self.world):
            if rank == self.rank:
                continue
            try:
                self.store.set_timeout(timedelta(seconds=2))
                number, _, where = self.store.get(self._place(rank)).decode().partition(" ")
            except Exception:
                found.append(Other(rank))
                continue
            try:
                self.store.wait([f"{self._place(rank)}/waits"], timedelta(seconds=PATIENCE))
                waits = True
            except Exception:
                waits = False
            found.append(Other(rank, int(number), where, waits))
        return found

    def _place(self, rank: int) -> str:
        return f"steersman/{self.where}/{rank}"
