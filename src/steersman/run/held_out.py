"""Whether the numbers `held_out/...` of a run are of data that it does not train on, and what to say where they are
not: a run of prompts that holds none out looks at the last ones that it trains on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

NONE_HELD_OUT = (
    "no prompt is held out: held_out/... are numbers of prompts that are trained on too, and do not tell how the "
    "model does on new ones; data.held_out or data.held_out_files holds some out"
)


def holds_out(data: Mapping[str, Any]) -> bool:
    """Whether the section `data` of a recipe keeps rows out of training."""
    return bool(data.get("held_out") or data.get("held_out_files"))


def looks_are_trained_on(config: Mapping[str, Any], metrics: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the rows of metrics.jsonl have `held_out/...` of training data, by the recipe in config.yaml."""
    data = config.get("data")
    if not isinstance(data, Mapping) or holds_out(data):
        return False
    return any(name.startswith("held_out/") for row in metrics for name in row)
