"""`steersman verify --devices N`: shares of the exact gradient that add up to one process's."""

from __future__ import annotations

import pytest
import torch

from steersman.algorithms import ALGORITHMS
from steersman.distributed import micro
from steersman.distributed.ranks import Ranks
from steersman.tabular import oracle
from steersman.verify.gradient import expected
from steersman.verify.ranks import EQUAL, OnRanks, on_ranks
from steersman.verify.run import VerifyRecipe


def share(name: str, rank: int, monkeypatch) -> torch.Tensor:
    """What one of two ranks finds before anything is added up."""

    class Lonely(Ranks):
        def sum(self, tensor, what=""):
            return tensor

    for module in (oracle, micro):
        monkeypatch.setattr(module, "ranks", lambda: Lonely(rank, 2))
    found = expected(ALGORITHMS[name]())[0]
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("name", ["grpo", "reinforce"])
def test_the_shares_of_two_ranks_add_up_and_neither_is_all(name, monkeypatch):
    whole, parts = expected(ALGORITHMS[name]())[0], [share(name, rank, monkeypatch) for rank in (0, 1)]
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-13)
    assert all((part - whole).abs().max() > 0.01 * whole.abs().max() for part in parts)


def test_a_gradient_that_is_another_is_no_pass():
    assert OnRanks("x", 1e-12, 1e-12).holds
    assert not OnRanks("x", 1e-8, 1e-12).holds
    assert not OnRanks("x", 1e-12, 1e-8).holds


@pytest.mark.slow
def test_two_ranks_find_the_gradients_of_one_process():
    rows = on_ranks(VerifyRecipe(devices=2, only="ppo,grpo,nlpo"), ["ppo", "grpo", "nlpo"])
    assert [row.name for row in rows] == ["ppo", "grpo", "nlpo"]
    assert all(row.holds for row in rows), rows
    assert max(row.shipped for row in rows) < EQUAL
