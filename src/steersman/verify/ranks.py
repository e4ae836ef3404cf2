"""The exact gradients on several ranks: each takes its share of all batches, and the sum is one process's."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steersman.algorithms import ALGORITHMS
from steersman.config.sections import Section
from steersman.distributed.parallel import ParallelConfig
from steersman.tabular.oracle import relative_deviation
from steersman.verify.gradient import expected

EQUAL = 1e-9
"""Largest difference from one process's gradient, in parts of its largest number, in float64."""


@dataclass(frozen=True, slots=True)
class OnRanks:
    """How far a method's gradient on several ranks is from one process's, as shipped and in the core."""

    name: str
    shipped: float
    core: float

    @property
    def holds(self) -> bool:
        return self.shipped <= EQUAL and self.core <= EQUAL


def is_rank(devices: int) -> bool:
    """Whether this process is one of the ranks that were started to compute a share."""
    return not _launch().must_start(devices)


def on_this_rank(names: Sequence[str]) -> dict[str, Any]:
    """What a rank does: its share of every gradient; gives all of them, added up."""
    with _launch().as_rank(ParallelConfig()):
        return {name: [x.tolist() for x in expected(ALGORITHMS[name]())] for name in names}


def on_ranks(recipe: Section, names: Sequence[str]) -> list[OnRanks]:
    """Starts the recipe's `devices` ranks, and holds each method's gradients against this process's own."""
    if not names:
        return []
    found = _launch().start("verify", recipe, recipe.devices, resume=False)  # type: ignore[attr-defined]
    rows = []
    for name in names:
        alone = expected(ALGORITHMS[name]())
        summed = [torch.tensor(x, dtype=torch.float64) for x in found[name]]
        rows.append(OnRanks(name, *(relative_deviation(x, y) for x, y in zip(summed, alone, strict=True))))
    return rows


def _launch() -> Any:
    """Loaded where it is used: torch's launcher takes a while."""
    return importlib.import_module("steersman.distributed.launch")
