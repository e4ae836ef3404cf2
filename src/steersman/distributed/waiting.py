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


class MissingRankError(SteersmanError):
    """Another rank did not come to a collective: it has died, or hangs."""


class NoStore:
    """The store of a process that is alone: nobody reads it."""

    def set(self, key: str, value: str) -> None:
        return None


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
        """Around one collective: noted where the others can read it, so that a time-out can name who is missing."""
        self.calls += 1
        self.store.set(self._place(self.rank), f"{self.calls} {what}")
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise MissingRankError(f"rank {self.rank} of {self.world}: {what} failed. {self.missing()}") from error

    @contextmanager
    def layers(self) -> Iterator[None]:
        """Around calls that torch makes by itself: names the missing rank where the weights or gradients of a layer
        in pieces, which it gathers and adds up, did not come in time. Other errors pass."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise MissingRankError(
                f"rank {self.rank} of {self.world}: pieces of a layer did not come. {self.missing()}"
            ) from error

    def missing(self) -> str:
        """Where every other rank was last, and whether it waits in vain as this one did, as far as the store can
        still be asked."""
        told = []
        with suppress(Exception):
            self.store.set(f"{self._place(self.rank)}/waits", "")
        for rank in range(self.world):
            if rank == self.rank:
                continue
            try:
                self.store.set_timeout(timedelta(seconds=2))
                number, _, where = self.store.get(self._place(rank)).decode().partition(" ")
            except Exception:
                told.append(f"rank {rank} can no longer be asked")
                continue
            how = ", behind" if int(number) < self.calls else ""
            try:
                self.store.wait([f"{self._place(rank)}/waits"], timedelta(seconds=PATIENCE))
            except Exception:
                how += ", and is not waiting"
            told.append(f"rank {rank} was last in call {number} ({where}){how}")
        return f"This is call {self.calls}; {'; '.join(told)}. A rank that is not waiting has died or hangs"

    def _place(self, rank: int) -> str:
        return f"steersman/{self.where}/{rank}"
