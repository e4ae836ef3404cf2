"""What a candidate must show before anybody meets it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import Field, model_validator

from steersman.config.sections import Section
from steersman.statistics.estimates import Estimate


class Gate(Section):
    """Bounds of one metric."""

    at_least: float | None = Field(default=None, description="lowest value that passes")
    at_most: float | None = Field(default=None, description="highest value that passes")
    sure: bool = Field(
        default=False, description="the whole 95% interval must lie inside the bounds, not the estimate alone"
    )

    @model_validator(mode="after")
    def _bounds(self) -> Gate:
        if self.at_least is None and self.at_most is None:
            raise ValueError("a gate without at_least and at_most lets everything through; give one of them")
        return self


def standard_gates() -> dict[str, Gate]:
    """People's held-out judgements are met better than by chance, and the text did not collapse or swell."""
    return {
        "human/accuracy": Gate(at_least=0.5, sure=True),
        "length": Gate(at_least=0.5, at_most=1.6),
        "distinct": Gate(at_least=0.8),
        "perplexity": Gate(at_most=1.5),
        "ended": Gate(at_least=0.7),
    }


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate's outcome and why."""

    metric: str
    passed: bool
    reason: str


def check(gates: Mapping[str, Gate], metrics: Mapping[str, Estimate]) -> list[GateResult]:
    """Every gate's outcome. A metric that was not measured, or is no number, does not pass."""
    return [_one(name, gate, metrics.get(name)) for name, gate in gates.items()]


def _one(name: str, gate: Gate, found: Estimate | None) -> GateResult:
    if found is None or not math.isfinite(found.value):
        return GateResult(name, False, "it could not be measured")
    if gate.at_least is not None and not (found.low > gate.at_least if gate.sure else found.value >= gate.at_least):
        what = "its lower bound is not above" if gate.sure else "it is below"
        return GateResult(name, False, f"{found}: {what} {gate.at_least:g}")
    if gate.at_most is not None and not (found.high < gate.at_most if gate.sure else found.value <= gate.at_most):
        what = "its upper bound is not below" if gate.sure else "it is above"
        return GateResult(name, False, f"{found}: {what} {gate.at_most:g}")
    return GateResult(name, True, f"{found}")
