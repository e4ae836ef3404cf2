"""Baselines per turn keep what a method reads beside the return: what was paid without KL, and silent groups."""

from __future__ import annotations

from statistics import mean, stdev

import pytest
import torch

from steersman.advantage.by_turn import by_turn
from steersman.algorithms import ALGORITHMS
from steersman.environments.config import BaselinePer
from steersman.train.experience import EpisodeRules, tokens_of, trajectory
from steersman.types import Prompt, Sample, Turn

F64 = torch.float64
KL = [[1.0, -2.0, 0.5, 1.5], [0.0, 3.0, -1.0, 0.25], [-1.0, 1.0, 2.0, -0.5], [2.0, 2.0, -3.0, 1.0]]
"""log pi - log pi_ref of four tokens in four episodes of one prompt."""


def played(algorithm, paid, *, by: BaselinePer, turns: int, group=(0, 0, 0, 0), beta: float = 0.01):
    """Episodes of `turns` turns of equal length, each `paid` [episode][turn] at its end, less `beta` KL."""
    per, samples = 4 // turns, []
    for b in range(4):
        told = [Turn(k * per, (k + 1) * per, paid[b][k]) for k in range(turns)]
        samples.append(Sample(Prompt([3], "", {}, group[b]), [4, 5, 6, 7], [-1.0] * 4, "eos", turns=told))
    pay = torch.zeros(4, 4, dtype=F64)
    pay[:, per - 1 :: per] = torch.tensor(paid, dtype=F64)
    old = torch.full((4, 4), -1.0, dtype=F64)
    return trajectory(
        samples, tokens_of(samples), pay.sum(1), algorithm, beta=beta, logp_old=old,
        logp_ref=old - torch.tensor(KL, dtype=F64), per_token=pay, rules=EpisodeRules(baseline_per=by),
    )  # fmt: skip


SCORES = {
    "equal": [1.0, 1.0, 1.0, 1.0], "different": [1.0, 0.0, 1.0, 0.5], "one group silent": [1.0, 0.0, 1.0, 1.0],
}  # fmt: skip


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize(
    ("name", "settings"),
    [("grpo", {"beta": 0.01, "kl_in": "reward"}), ("dapo", {"beta": 0.01}),
     ("dapo", {"beta": 0.01, "scale": "batch"}), ("cispo", {"beta": 0.01}), ("gpg", {}), ("gpg", {"beta": 0.01}),
     ("rloo", {"beta": 0.01}), ("dr-grpo", {})],
)  # fmt: skip
def test_an_episode_of_one_turn_is_a_turn(name, settings, scores):
    algorithm = ALGORITHMS[name](**settings)
    paid = [[x] for x in SCORES[scores]]
    by_episode = played(algorithm, paid, by="episode", turns=1, group=(0, 0, 1, 1))
    apart = played(algorithm, paid, by="turn", turns=1, group=(0, 0, 1, 1))
    assert apart.turn is not None
    whole, turn = (by_turn(algorithm.advantage, traj).adv for traj in (by_episode, apart))
    torch.testing.assert_close(turn, whole)


def test_deviations_of_turns_are_those_of_what_was_paid():
    """Two turns: all earn the same in the second, so it teaches nothing, whatever its KL."""
    algorithm = ALGORITHMS["dapo"](beta=0.01)
    paid = [[1.0, 2.0], [0.0, 2.0], [0.5, 2.0], [0.0, 2.0]]
    found = by_turn(algorithm.advantage, played(algorithm, paid, by="turn", turns=2)).adv
    assert found[:, 2:].tolist() == [[0.0, 0.0]] * 4
    total = [sum(row) - 0.01 * sum(kl) for row, kl in zip(paid, KL, strict=True)]
    deviation = stdev(map(sum, paid)) + 1e-4
    for b in range(4):
        assert found[b, :2].tolist() == pytest.approx([(total[b] - mean(total)) / deviation] * 2)


def test_silent_turns_give_their_weight_to_the_others():
    """Of eight turns four are in a group without signal, so what the others teach counts twice."""
    algorithm = ALGORITHMS["gpg"]()
    paid = [[1.0, 2.0], [0.0, 2.0], [1.0, 2.0], [0.0, 2.0]]
    found = by_turn(algorithm.advantage, played(algorithm, paid, by="turn", turns=2, beta=0.0)).adv
    assert found.tolist() == [[1.0, 1.0, 0.0, 0.0], [-1.0, -1.0, 0.0, 0.0]] * 2


def test_a_stand_in_is_no_response_of_its_own():
    """One episode goes on alone and earns nothing more: of five turns the last one says nothing, so the others count
    5 / 4. The sibling that it is compared with adds no sixth."""
    algorithm = ALGORITHMS["gpg"]()
    traj = played(algorithm, [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], by="turn", turns=2, beta=0.0)
    traj.mask[1:, 2:] = False
    found = by_turn(algorithm.advantage, traj).adv
    first = [0.75 * 5 / 4, -0.25 * 5 / 4, -0.25 * 5 / 4, -0.25 * 5 / 4]
    assert found.tolist() == [[x, x, 0.0, 0.0] for x in first]
