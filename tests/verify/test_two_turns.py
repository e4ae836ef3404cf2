"""Episodes of two turns with a world between them: unbiased methods stay unbiased; a leak is seen."""

from __future__ import annotations

import pytest
import torch

from steersman.advantage.by_turn import by_turn
from steersman.algorithms import ALGORITHMS
from steersman.tabular.oracle import exact_gradient, groups
from steersman.tabular.two_turns import TwoTurns
from steersman.types import Trajectory
from steersman.verify.two_turns import check_turns


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_method_without_its_named_biases_is_exact(name):
    found = check_turns(ALGORITHMS[name]())
    assert found.core < 1e-8
    assert (found.shipped < 1e-8) == (not ALGORITHMS[name].bias)


def test_the_exact_gradient_is_that_of_a_game_written_out():
    """J = sum over a1, o, a2 of their probabilities times what is paid, transcribed without the language."""
    game = TwoTurns(beta=0.0, seed=5)
    own = torch.randn(game.next_state.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own.requires_grad_()
    p, world = torch.softmax(own, -1), torch.softmax(game.world, -1)
    states = {tokens: s for s, (_, tokens) in enumerate(game.states)}
    total = torch.zeros((), dtype=torch.float64)
    for a in range(3):
        first = p[states[()], a]
        total = total + first * game.step_reward[states[()], a]
        for o in range(3) if a else ():
            then = first * world[states[(a,)], o]
            total = total + then * game.step_reward[states[(a,)], o]
            for b in range(3) if o else ():
                total = total + then * p[states[(a, o)], b] * game.step_reward[states[(a, o)], b]
    (mine,) = torch.autograd.grad(total, own)
    found = exact_gradient(game, lambda: game.logits(own), [own])
    torch.testing.assert_close(found, mine.flatten())
    assert mine[states[(1,)]].abs().max() == 0  # nothing flows into what the world says


@pytest.mark.parametrize("leak", ["mask", "pay", "end"])
def test_a_leak_is_seen(monkeypatch, leak):
    own = TwoTurns.trajectory

    def leaking(self, logits, rows=None, **settings):
        traj = own(self, logits, rows, **settings)
        length = self.length if rows is None else self.length[rows]
        if leak == "mask":
            traj.mask[:, 1] = length > 1
        elif leak == "pay":
            traj.reward[:, 0] *= 0.5
        else:
            traj.discount[:, 0] = 1.0
        return traj

    monkeypatch.setattr(TwoTurns, "trajectory", leaking)
    assert check_turns(ALGORITHMS["a2c"]()).core > 1e-3


def test_batches_add_up_to_one():
    game = TwoTurns()
    logits = game.logits(torch.zeros(game.next_state.shape, dtype=torch.float64))
    assert float(groups(game, logits, 2)[1].sum()) == pytest.approx(1, abs=1e-12)


def test_baselines_per_turn_are_another_estimator_of_the_same_gradient():
    """Leave-one-out per turn by hand: two episodes, one of which ends after its first turn."""
    mask = torch.tensor([[True, False, True], [True, False, False], [True, True, False]])
    reward = torch.tensor([[1.0, 0.0, 4.0], [2.0, 0.0, 0.0], [0.0, 6.0, 0.0]])
    turn = torch.tensor([[0, 1, 1], [0, 1, 1], [0, 0, 1]])
    discount = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    traj = Trajectory(mask, reward, discount, reward * 0, group=torch.tensor([3, 3, 3]), turn=turn)
    found = by_turn(ALGORITHMS["rloo"]().advantage, traj).adv
    # first turns earn 5, 2 and 6; the second turn is the first episode's alone: beside it a sibling that earned 0
    assert found.tolist() == [[1.0, 0.0, 4.0], [-3.5, 0.0, 0.0], [2.5, 2.5, 0.0]]
    traj.turn = None
    assert by_turn(ALGORITHMS["rloo"]().advantage, traj).adv[0].tolist() == [1.0, 0.0, 1.0]


def test_a_baseline_that_knows_its_own_turn_is_seen(monkeypatch):
    from steersman.advantage import by_turn as module

    monkeypatch.setattr(module, "_stand_ins", lambda *_: (torch.zeros(0, dtype=torch.long),) * 2)
    assert check_turns(ALGORITHMS["rloo"]()).core > 1e-3  # turns without a sibling would teach nothing
