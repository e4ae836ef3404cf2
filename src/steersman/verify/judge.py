"""What a verified method's numbers must be."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

from steersman.tabular.preference_check import FixedPoint
from steersman.verify.gradient import GradientCheck
from steersman.verify.identities import Identity

EXACT = 1e-8
REACHED = 0.95


@dataclass(slots=True)
class Method:
    """One method's row: deviations of its gradient, over single answers and over an episode of two turns, and one way
    per seed (see `training.Way`)."""

    name: str
    title: str
    paper: str
    bias: str
    fixed_point: str
    gradient: GradientCheck
    turns: GradientCheck
    way: list[float]
    way_allowed: list[float]
    way_core: list[float]
    seconds: float

    @property
    def limited(self) -> bool:
        """A mask keeps it from some answers, so that the best it can reach is not J*."""
        return any(abs(a - b) > 1e-6 for a, b in zip(self.way, self.way_allowed, strict=True))


def failures(methods: list[Method], offline: list[FixedPoint], exact: list[Identity]) -> list[str]:
    """Everything that should hold and does not, in words; empty when all is well."""
    found = [line for method in methods for line in _of_method(method)]
    found += [f"{row.name}: {row.deviation:.1e} away from: {row.statement}" for row in offline if not row.holds]
    return found + [f"{x.name} {x.statement}: off by {x.deviation:.1e}" for x in exact if not x.deviation < EXACT]


def _of_method(method: Method) -> list[str]:
    found, check = [], method.gradient
    if not check.core < EXACT:
        found.append(f"{method.name}: its gradient without its named biases deviates by {check.core:.1e}")
    if not method.turns.core < EXACT:
        found.append(
            f"{method.name}: over two turns, without its named biases, it deviates by {method.turns.core:.1e}"
        )
    if not method.bias and not method.turns.shipped < EXACT:
        found.append(f"{method.name}: names no bias, and over two turns deviates by {method.turns.shipped:.1e}")
    if not method.bias and not check.shipped < EXACT:
        found.append(f"{method.name}: names no bias, and its gradient deviates by {check.shipped:.1e}")
    if method.bias and check.shipped < EXACT:
        found.append(f"{method.name}: names a bias ({method.bias}), and its gradient is exact")
    # a method with a fixed point of its own goes there as shipped, and to J* without its biases
    for what, ways in [("", method.way_core or method.way), (" that its mask allows", method.way_allowed)]:
        if (method.limited or not what) and not min(ways) >= REACHED:
            found.append(f"{method.name}: {min(ways):.1%} of the way to the optimum{what}, mean {mean(ways):.1%}")
    return found
