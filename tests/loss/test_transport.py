"""AOT beside sorted lists in one piece, value and gradient, in float64; its coupling beside a linear program."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from steersman.loss.pairs import BatchLogp, PairLogp, as_batch
from steersman.loss.preference import aot, aot_unpaired, dpo, soft_labelled
from steersman.loss.transport import coupling

BETA, EPS = 0.4, 0.1
LOSSES = {"aot": aot, "aot_unpaired": aot_unpaired}


def answers(count: int = 7, seed: int = 0) -> list[Tensor]:
    """log pi of chosen and rejected answers, then the reference's."""
    g = torch.Generator().manual_seed(seed)
    own = [(-9 * torch.rand(count, generator=g, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    return [*own, *(-9 * torch.rand(2, count, generator=g, dtype=torch.float64)).unbind()]


def pair_of(
    found: list[Tensor], weight: Tensor | None = None, agreement: Tensor | None = None, rows: Tensor | None = None
) -> PairLogp:
    """All pairs, or some rows of them, with the whole batch."""
    length = torch.ones_like(found[0])
    whole = PairLogp(found[0], found[1], length, length, found[2], found[3])
    batch = as_batch(whole, torch.ones_like(found[2]) if weight is None else weight, agreement)
    if rows is None:
        return whole._replace(batch=batch)
    some = PairLogp(*(x[rows] for x in (found[0], found[1], length, length, found[2], found[3])))
    return some._replace(batch=batch._replace(places=rows))


def plain(name: str, found: list[Tensor]) -> Tensor:
    """2406.05882 over a batch in one piece, by sorting with gradients: the mean of h over both sorted lists."""
    w, l, rw, rl = found  # noqa: E741
    upper, lower = (w - l, rw - rl) if name == "aot" else (w - rw, l - rl)
    lead = upper.sort().values - lower.sort().values
    good = 1 / (1 + torch.exp(-BETA * lead))
    return (-(1 - EPS) * torch.log(good) - EPS * torch.log(1 - good)).mean()


def run(name: str, pair: PairLogp) -> Tensor:
    return LOSSES[name](pair, beta=BETA, label_smoothing=EPS)[0]


def same(a: Tensor, b: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    for x, y in zip(*(torch.autograd.grad(v, leaves, retain_graph=True) for v in (a, b)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_equals_the_sorted_batch_in_one_piece(name, count):
    found = answers(count)
    pair = pair_of(found)
    same(run(name, pair).mean(), plain(name, found), found[:2])
    explain = LOSSES[name](pair, beta=BETA)[1]
    torch.testing.assert_close(explain["margin"], BETA * ((found[0] - found[2]) - (found[1] - found[3])).detach())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cuts", [[0, 1, 2, 3, 4, 5, 6], [3, 3], [6]])
def test_micro_batches_add_up_to_the_batch(name, cuts):
    """In an order of their own, some of them with one row."""
    found = answers()
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    parts = [run(name, pair_of(found, rows=rows)) for rows in order.tensor_split(cuts) if len(rows)]
    same(torch.cat(parts).sum() / 7, plain(name, found), found[:2])
    torch.testing.assert_close(torch.cat(parts)[order.argsort()], run(name, pair_of(found)))


@pytest.mark.parametrize("name", LOSSES)
def test_weights_and_votes_are_copies_of_a_pair(name):
    """A pair of weight 3 on which two of three raters agree is two pairs one way and one the other way round."""
    found = answers(5)
    up, down = [2, 1, 0, 3, 0], [1, 0, 2, 1, 0]
    total = torch.tensor(up, dtype=torch.float64) + torch.tensor(down, dtype=torch.float64)
    agreement = torch.tensor(up, dtype=torch.float64) / total.clamp(min=1)
    pair = pair_of(found, total, agreement)
    loss, _ = soft_labelled(lambda p: LOSSES[name](p, beta=BETA, label_smoothing=EPS), pair, agreement)
    copies: list[list[Tensor]] = [[], [], [], []]
    for i in range(5):
        w, l, rw, rl = (x[i] for x in found)  # noqa: E741
        for list_, (one, other) in zip(copies, ((w, l), (l, w), (rw, rl), (rl, rw)), strict=True):
            list_ += [one] * up[i] + [other] * down[i]
    same((total * loss).sum() / total.sum(), plain(name, [torch.stack(x) for x in copies]), found[:2])
    assert float(loss[4].detach()) == 0.0  # it counts nothing


def test_the_coupling_is_the_cheapest_there_is():
    g = torch.Generator().manual_seed(3)
    first, second = torch.randn(2, 6, generator=g, dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.25, 0.0], dtype=torch.float64)
    i, j, mass = coupling(first, second, weight)
    for kept, number in ((i, mass), (j, mass)):
        torch.testing.assert_close(weight.new_zeros(6).index_add(0, kept, number), weight)
    cost = torch.log1p(torch.exp(-(first[:, None] - second[None, :])))
    sides = torch.cat([torch.eye(6).repeat_interleave(6, 1), torch.eye(6).repeat(1, 6)])
    best = linprog(cost.flatten().numpy(), A_eq=sides.numpy(), b_eq=torch.cat([weight, weight]).numpy())
    assert float((mass * cost[i, j]).sum()) == pytest.approx(best.fun, rel=1e-9)
    assert len(mass) <= 12


def test_one_pair_is_dpo():
    found = answers(1)
    pair = pair_of(found)
    same(aot(pair, beta=BETA)[0].sum(), dpo(pair, beta=BETA)[0].sum(), found[:2])


def test_a_number_per_prompt_drops_out_of_the_paired_loss_alone():
    """So a reference that is known up to one serves it."""
    found, shift = answers(), torch.linspace(0, 3, 7, dtype=torch.float64)
    moved = [found[0], found[1], found[2] + shift, found[3] + shift]
    torch.testing.assert_close(run("aot", pair_of(found)), run("aot", pair_of(moved)))
    assert not torch.allclose(run("aot_unpaired", pair_of(found)), run("aot_unpaired", pair_of(moved)))


@pytest.mark.parametrize("name", LOSSES)
def test_extremes_and_ties_stay_finite(name):
    own = [torch.tensor(x, requires_grad=True) for x in ([-5000.0, 0.0, -1.0, -1.0], [0.0, -5000.0, -1.0, -1.0])]
    pair = pair_of([*own, torch.full((4,), -2.0), torch.full((4,), -2.0)])
    loss = LOSSES[name](pair)[0]
    assert loss.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), own))


@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_alone_is_refused(name):
    with pytest.raises(TypeError, match="whole batch"):
        LOSSES[name](pair_of(answers())._replace(batch=None))


def test_a_batch_swapped_twice_is_itself():
    batch = pair_of(answers(), torch.rand(7), torch.rand(7)).batch
    assert isinstance(batch, BatchLogp)
    assert all(a is b for a, b in zip(batch, batch.swapped().swapped(), strict=True))
