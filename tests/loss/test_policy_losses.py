"""Policy losses against transcriptions of the papers, element by element, in float64."""

import math

import pytest
import torch

from steersman.algorithms.grpo import GRPO
from steersman.algorithms.gspo import GSPO
from steersman.algorithms.vespo import VESPO
from steersman.loss.policy import (
    clipped,
    clipped_weight,
    reinforce,
    sequence_clipped,
    surrogate,
)
from steersman.loss.value import explained_variance, value_loss
from steersman.types import Trajectory
from steersman.update.on_policy import clipped_steps

g = torch.Generator().manual_seed(0)
B, T = 5, 6
LOGP = torch.randn(B, T, generator=g).double() * 0.4 - 2
OLD = LOGP + torch.randn(B, T, generator=g).double() * 0.4
ADV = torch.randn(B, T, generator=g).double()
MASK = torch.arange(T) < torch.tensor([6, 3, 5, 1, 2])[:, None]


def each(f):
    return torch.tensor(
        [[f(LOGP[b, t].item(), OLD[b, t].item(), ADV[b, t].item()) for t in range(T)] for b in range(B)]
    )


def gradient(loss_of):
    x = LOGP.clone().requires_grad_()
    return torch.autograd.grad(loss_of(x).sum(), x)[0]


def numeric(loss_of, eps=1e-6):
    out = torch.zeros_like(LOGP)
    for b in range(B):
        for t in range(T):
            d = torch.zeros_like(LOGP)
            d[b, t] = eps
            out[b, t] = (loss_of(LOGP + d).sum() - loss_of(LOGP - d).sum()) / (2 * eps)
    return out


def test_reinforce_and_surrogate():
    torch.testing.assert_close(reinforce(LOGP, ADV), each(lambda p, q, a: -a * p).double())
    torch.testing.assert_close(
        surrogate(LOGP, OLD, ADV), each(lambda p, q, a: -a * math.exp(p) / math.exp(q)).double()
    )


@pytest.mark.parametrize("dual", [None, 1.5])
def test_clipped(dual):
    def paper(p, q, a):
        ratio = math.exp(p - q)
        objective = min(ratio * a, min(max(ratio, 1 - 0.1), 1 + 0.3) * a)
        if dual is not None and a < 0:
            objective = max(objective, dual * a)
        return -objective

    def ours(x):
        return clipped(x, OLD, ADV, 0.1, 0.3, dual)

    torch.testing.assert_close(ours(LOGP), each(paper).double())
    torch.testing.assert_close(gradient(ours), numeric(ours), atol=1e-7, rtol=1e-6)
    flat = gradient(ours) == 0
    assert flat.any()
    assert not flat.all()


def test_sequence_clipped_has_one_ratio_per_sequence():
    loss = sequence_clipped(LOGP, OLD, ADV, MASK, 0.05, 0.1)
    for b in range(B):
        n = int(MASK[b].sum())
        s = math.exp(sum((LOGP[b, t] - OLD[b, t]).item() for t in range(n)) / n)
        for t in range(n):
            a = ADV[b, t].item()
            assert loss[b, t].item() == pytest.approx(-min(s * a, min(max(s, 0.95), 1.1) * a))
    poisoned = torch.where(MASK, LOGP, torch.nan)
    assert torch.equal(sequence_clipped(poisoned, OLD, ADV, MASK, 0.05, 0.1)[MASK], loss[MASK])


def test_clipped_weight_keeps_every_gradient():
    grad = gradient(lambda x: clipped_weight(x, OLD, ADV, 1.2))
    torch.testing.assert_close(grad, each(lambda p, q, a: -a * min(math.exp(p - q), 1.2)).double())


def test_clipped_steps_are_those_whose_ratio_is_outside_as_the_method_reads_it():
    ratio = (LOGP - OLD).exp()
    of_row = [math.exp(sum(d[m].tolist()) / int(m.sum())) for d, m in zip(LOGP - OLD, MASK, strict=True)]
    traj = Trajectory(MASK, OLD, OLD, OLD)
    for method, read in ((GRPO, ratio.tolist()), (GSPO, [[r] * T for r in of_row])):
        found = clipped_steps(method(clip_low=0.1, clip_high=0.2), LOGP, traj)
        assert found is not None
        outside = [[not 0.9 <= r <= 1.2 for r in row] for row in read]
        assert found[MASK].tolist() == torch.tensor(outside)[MASK].tolist()
        assert 0 < int(found[MASK].sum()) < int(MASK.sum())
    assert clipped_steps(VESPO(), LOGP, traj) is None


def test_value_loss_is_pessimistic_when_clipped():
    value, old, ret = LOGP, OLD, ADV
    torch.testing.assert_close(value_loss(value, old, ret), each(lambda v, o, r: (v - r) ** 2 / 2).double())

    def paper(v, o, r):
        near = o + max(-0.1, min(0.1, v - o))
        return max((v - r) ** 2, (near - r) ** 2) / 2

    torch.testing.assert_close(value_loss(value, old, ret, clip=0.1), each(paper).double())


def test_explained_variance():
    ret = ADV
    assert explained_variance(ret, ret, MASK).item() == pytest.approx(1.0)
    assert explained_variance(torch.zeros_like(ret), ret, MASK).item() == pytest.approx(0.0)
    assert explained_variance(-ret, ret, MASK).item() == pytest.approx(-3.0)
    assert explained_variance(ret, torch.ones_like(ret), MASK).item() == 0.0
