"""Krippendorff's alpha and Cohen's kappa against worked examples and their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from steersman.statistics.agreement import alpha, cohen_kappa

# Krippendorff 2011, section C: four observers, twelve units, 0 for missing.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
]
RATED = [(str(u), float(v)) for row in OBSERVERS for u, v in enumerate(row) if v]


@pytest.mark.parametrize(("metric", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_the_published_example(metric, published):
    got = alpha(RATED, metric)
    assert round(got.value, 3) == published
    assert got.low < got.value < got.high
    assert got.n == 11


def by_definition(rated: list[tuple[str, float]]) -> float:
    """1 - D_o / D_e, with every pair counted by itself (interval)."""
    units: dict[str, list[float]] = {}
    for unit, value in rated:
        units.setdefault(unit, []).append(value)
    units = {u: v for u, v in units.items() if len(v) > 1}
    everything = [v for got in units.values() for v in got]
    observed = sum(
        (a - b) ** 2 / (len(got) - 1) for got in units.values() for i, a in enumerate(got) for b in got[:i]
    ) / len(everything)
    pairs = [(a - b) ** 2 for i, a in enumerate(everything) for b in everything[:i]]
    return 1 - observed / (sum(pairs) / (len(everything) - 1) / len(everything))


def test_random_ratings_by_the_definition():
    rng = np.random.default_rng(3)
    rated = [(str(u), float(rng.integers(1, 6))) for u in range(30) for _ in range(rng.integers(1, 5))]
    assert alpha(rated, "interval").value == pytest.approx(by_definition(rated), abs=1e-12)


def test_where_nothing_can_be_said():
    assert math.isnan(alpha([]).value)
    assert math.isnan(alpha([("a", 1.0), ("b", 2.0)]).value)
    assert math.isnan(alpha([("a", 1.0), ("a", 1.0)]).value)
    assert alpha([("a", 1.0), ("a", 1.0), ("b", 2.0), ("b", 2.0)]).value == 1.0


@pytest.mark.parametrize(("n", "low"), [(2, 0.025**0.5), (10, 0.025**0.1), (200, 0.025**0.005)])
def test_units_that_all_agree_may_have_left_out_one_that_does_not(n, low):
    found = alpha([(str(u), float(u % 2)) for u in range(n) for _ in range(3)])
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(low)


def test_units_that_all_disagree_do_not_make_it_certain():
    found = alpha([(str(u), float(r)) for u in range(10) for r in range(2)])
    assert -1 < found.low <= found.value < found.high - 0.5


def test_kappa_by_the_textbook():
    """50 units: both yes 20, both no 15, 5 and 10 apart; p_o 0.7, p_e 0.5, kappa 0.4."""
    first = np.array([1.0] * 20 + [1.0] * 5 + [0.0] * 10 + [0.0] * 15)
    second = np.array([1.0] * 20 + [0.0] * 5 + [1.0] * 10 + [0.0] * 15)
    assert cohen_kappa(first, second) == pytest.approx(0.4, abs=1e-12)
    words = [["no", "yes"][int(x)] for x in first], [["no", "yes"][int(x)] for x in second]
    assert cohen_kappa(*words) == pytest.approx(0.4, abs=1e-12)
    assert cohen_kappa(list("aabb"), list("aabb")) == 1
    assert cohen_kappa(list("aabb"), list("abab")) == 0
    assert math.isnan(cohen_kappa(list("aaa"), list("aaa")))  # chance alone would agree as well
    assert math.isnan(cohen_kappa([], []))
