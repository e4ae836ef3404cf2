"""Each method's advantages and critic targets on one small batch, against plain loops over Python numbers.

Signs of baselines do not show in an expected gradient (any baseline leaves it as it is); they show here.
"""

from __future__ import annotations

from statistics import mean, pstdev, stdev

import pytest
import torch

from steersman.algorithms import ALGORITHMS
from steersman.types import Trajectory

GAMMA, LAM = 0.9, 0.7
REWARD = [[0.1, -0.2, 1.0], [0.3, 0.5], [-0.4], [0.2, 0.0, -1.0]]
SCORE = [0.7, 0.9, -0.5, -1.1]
"""Without KL: what a group's deviation is measured on."""
VALUE = [[0.5, 0.4, -0.1, 9.0], [0.2, -0.3, 9.0], [0.6, 9.0], [-0.7, 0.1, 0.3, 9.0]]
"""9 stands after a terminated episode, and is worth nothing."""
GROUP, BASELINE = [7, 3, 7, 3], [0.25, -0.5, 0.75, 0.1]


def trajectory(critic: bool) -> Trajectory:
    lengths, T = [len(row) for row in REWARD], 3
    mask = torch.tensor([[t < n for t in range(T)] for n in lengths])
    discount = torch.tensor([[GAMMA * (t < n - 1) for t in range(T)] for n in lengths], dtype=torch.float64)
    value = torch.tensor([row + [5.0] * (T + 1 - len(row)) for row in VALUE], dtype=torch.float64)
    reward = torch.tensor([row + [5.0] * (T - len(row)) for row in REWARD], dtype=torch.float64)
    return Trajectory(
        mask, reward, discount, torch.zeros(4, T, dtype=torch.float64), value=value if critic else None,
        group=torch.tensor(GROUP), baseline=torch.tensor(BASELINE, dtype=torch.float64),
        score=torch.tensor(SCORE, dtype=torch.float64),
    )  # fmt: skip


def to_go(row: int) -> list[float]:
    rewards = REWARD[row]
    return [sum(GAMMA ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]


def estimated(row: int, lam: float) -> list[float]:
    """sum_k (gamma lam)^k delta_{t+k}."""
    n, value = len(REWARD[row]), [*VALUE[row][:-1], 0.0]
    delta = [REWARD[row][t] + GAMMA * value[t + 1] - value[t] for t in range(n)]
    return [sum((GAMMA * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


def whitened(rows: list[list[float]]) -> list[list[float]]:
    every = [x for row in rows for x in row]
    return [[(x - mean(every)) / pstdev(every) for x in row] for row in rows]


def others(row: int) -> list[int]:
    return [i for i in range(4) if GROUP[i] == GROUP[row] and i != row]


def per_response(value) -> list[list[float]]:
    return [[value(row)] * len(REWARD[row]) for row in range(4)]


def group_relative(row: int) -> float:
    """The lead in return (with KL) over the group's mean, in deviations (n - 1) of the scores without."""
    members = [row, *others(row)]
    return (sum(REWARD[row]) - mean(sum(REWARD[i]) for i in members)) / (stdev(SCORE[i] for i in members) + 1e-4)


def lead(row: int) -> float:
    return sum(REWARD[row]) - mean(sum(REWARD[i]) for i in [row, *others(row)])


def penalty(row: int) -> float:
    return sum(REWARD[row]) - SCORE[row]


def decoupled(row: int) -> float:
    """The score in deviations of the scores; the rest of the return as it is."""
    members = [row, *others(row)]
    spread = stdev(SCORE[i] for i in members) + 1e-4
    standard = (SCORE[row] - mean(SCORE[i] for i in members)) / spread
    return standard + penalty(row) - mean(penalty(i) for i in members)


EXPECTED = {
    "reinforce": lambda: [[g - BASELINE[b] for g in to_go(b)] for b in range(4)],
    "reinforce-baseline": lambda: [estimated(b, 1.0) for b in range(4)],
    "reinforce++": lambda: whitened([to_go(b) for b in range(4)]),
    "rloo": lambda: per_response(lambda b: sum(REWARD[b]) - mean(sum(REWARD[i]) for i in others(b))),
    "remax": lambda: [[g - BASELINE[b] for g in to_go(b)] for b in range(4)],
    "a2c": lambda: [estimated(b, LAM) for b in range(4)],
    **dict.fromkeys(
        ("trpo", "ppo", "ppo-kl", "nlpo", "vc-ppo"), lambda: whitened([estimated(b, LAM) for b in range(4)])
    ),
    # 1 - 1 / (0.05 l) is below 0 for answers this short, so VAPO's lambda is 0
    "vapo": lambda: whitened([estimated(b, 0.0) for b in range(4)]),
    **dict.fromkeys(
        ("grpo", "dapo", "gspo", "cispo", "gmpo", "sapo", "dppo", "gfpo", "clip-cov", "kl-cov", "luspo", "vespo"),
        lambda: per_response(group_relative),
    ),
    **dict.fromkeys(("dr-grpo", "gpg"), lambda: per_response(lead)),
    "reinforce++-baseline": lambda: whitened(per_response(lead)),
    "gdpo": lambda: whitened(per_response(decoupled)),
    "a2po": lambda: per_response(lambda b: SCORE[b] - BASELINE[b]),  # KL is in the loss
    # of two the better one gets all that it is ahead by, and the other nothing; what is not score (KL) is compared
    "pass-at-k": lambda: per_response(
        lambda b: 2 * max(0.0, SCORE[b] - SCORE[others(b)[0]]) + penalty(b) - penalty(others(b)[0])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALGORITHMS)
def test_advantages_and_targets(name):
    method = ALGORITHMS[name]
    settings = {"lam": LAM} if "lam" in method.model_fields else {}
    got = method(gamma=GAMMA, **settings).advantage(trajectory(method.critic))
    for b, row in enumerate(EXPECTED[name]()):
        assert got.adv[b].tolist() == pytest.approx(row + [0.0] * (3 - len(row)), abs=1e-6)
    if not method.critic:
        assert got.ret is None
        return
    lam = 1.0 if not settings or "lam_critic" in method.model_fields else LAM
    for b in range(4):
        target = [a + v for a, v in zip(estimated(b, lam), VALUE[b][:-1], strict=True)]
        assert got.ret[b, : len(target)].tolist() == pytest.approx(target)
