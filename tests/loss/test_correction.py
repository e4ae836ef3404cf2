"""Corrections for another policy's samples, against their definitions in plain numbers."""

from __future__ import annotations

from math import log

import pytest
import torch

from steersman.loss.correction import Correction, effective_sample_size

RATIO = [[1.5, 0.4, 3.0], [0.9, 1.1]]
"""Products: 1.8 and 0.99; geometric means 1.216 and 0.995."""
MASK = torch.tensor([[True, True, True], [True, True, False]])
OLD = torch.tensor([[log(x) for x in row] + [50.0] * (3 - len(row)) for row in RATIO], dtype=torch.float64)
ZERO = torch.zeros_like(OLD)


def k3(row: list[float]) -> float:
    return sum(x - 1 - log(x) for x in row) / len(row)


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        (Correction("none"), [[1, 1, 1], [1, 1]]),
        (Correction("decoupled"), RATIO),
        (Correction("token_truncated", 1.2), [[1.2, 0.4, 1.2], [0.9, 1.1]]),
        (Correction("token_masked", 2.0, 0.5), [[1.5, 0, 0], [0.9, 1.1]]),
        (Correction("sequence_truncated", 1.5), [[1.5] * 3, [0.99] * 2]),
        (Correction("sequence_masked", 1.5), [[0] * 3, [0.99] * 2]),
        (Correction("sequence_masked", 2.0), [[1.8] * 3, [0.99] * 2]),
        (Correction("geometric_masked", 1.2, 0.5), [[0] * 3, RATIO[1]]),
        (Correction("geometric_masked", 1.22, 0.999), [RATIO[0], [0] * 2]),
        (Correction("k3_masked", k3(RATIO[0]) - 1e-9), [[0] * 3, RATIO[1]]),
        (Correction("k3_masked", k3(RATIO[0]) + 1e-9), RATIO),
    ],
)
def test_each_weight_is_its_definition(correction, expected):
    found = correction.weight(OLD.clone().requires_grad_(), ZERO, MASK)
    assert not found.requires_grad
    for b, row in enumerate(expected):
        assert found[b, : len(row)].tolist() == pytest.approx(row, abs=1e-12)
    assert found[1, 2] == 1, "what stands under a False mask reaches no weight"


def test_the_share_that_a_bound_changes():
    assert float(Correction("token_truncated", 1.2).bound(OLD, ZERO, MASK)) == pytest.approx(2 / 5)
    assert float(Correction("sequence_masked", 1.5).bound(OLD, ZERO, MASK)) == pytest.approx(3 / 5)
    assert float(Correction("decoupled").bound(OLD, ZERO, MASK)) == 0
    assert float(Correction("none").bound(OLD, ZERO, MASK)) == 0


def test_effective_sample_size():
    weight = torch.tensor([[1.0, 3.0, 0.0], [2.0, 2.0, 9.0]])
    assert float(effective_sample_size(weight, MASK)) == pytest.approx(8**2 / (5 * (1 + 9 + 0 + 4 + 4)))
    assert float(effective_sample_size(torch.ones(2, 3), MASK)) == pytest.approx(1)
    assert float(effective_sample_size(torch.zeros(2, 3), MASK)) == 0
