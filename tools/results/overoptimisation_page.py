"""The table of docs/results/overoptimisation.md: gold at equal KL, and at the end, of the runs of `overoptimisation.py`."""

from __future__ import annotations

ARMS = ("plain", "ensemble", "kl budget", "early stop", "refreshed", "diversity", "bottleneck")
TASKS = ("happy", "polite", "arena")


def write_page(out, docs, seeds):
    raise NotImplementedError
