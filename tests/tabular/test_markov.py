"""Markov chains against closed forms."""

from __future__ import annotations

import pytest
import torch

from steersman.tabular.markov import MarkovChain
from steersman.types import SteersmanError


def gambler(p: float, top: int) -> MarkovChain:
    """Win 1 with probability p, lose 1 otherwise, stop at 0 and at `top`."""
    P = torch.zeros(top + 1, top + 1, dtype=torch.float64)
    P[0, 0] = P[top, top] = 1
    for i in range(1, top):
        P[i, i + 1], P[i, i - 1] = p, 1 - p
    return MarkovChain(P)


def only(size, *states):
    target = torch.zeros(size, dtype=torch.bool)
    target[list(states)] = True
    return target


@pytest.mark.parametrize("p", [0.4, 0.55])
def test_gamblers_ruin(p):
    top = 10
    chain = gambler(p, top)
    i, x = torch.arange(top + 1).double(), (1 - p) / p
    win = (1 - x**i) / (1 - x**top)
    duration = (i - top * win) / (1 - 2 * p)
    torch.testing.assert_close(chain.hitting_probability(only(11, top)), win, rtol=0, atol=1e-12)
    torch.testing.assert_close(chain.hitting_time(only(11, 0, top)), duration, rtol=0, atol=1e-10)
    assert chain.closed_classes == [[0], [10]]
    torch.testing.assert_close(chain.absorption(), torch.stack([1 - win, win], 1), rtol=0, atol=1e-12)
    # one coin per round played is the expected duration as a return
    paid = torch.ones(11).double()
    paid[[0, top]] = 0
    torch.testing.assert_close(chain.expected_return(paid), duration, rtol=0, atol=1e-10)
    # a prize on the winning transition is the winning probability
    prize = torch.zeros(11, 11)
    prize[top - 1, top] = 1
    won = chain.expected_return(prize)
    torch.testing.assert_close(won[:-1], win[:-1], rtol=0, atol=1e-12)
    # arrival at the top alone is not certain
    assert chain.hitting_time(only(11, top))[:-1].isinf().all()


def test_two_state_chain():
    a, b = 0.3, 0.1
    chain = MarkovChain(torch.tensor([[1 - a, a], [b, 1 - b]]).double())
    assert chain.irreducible
    assert chain.period(0) == 1
    want = torch.tensor([[b, a]]).double() / (a + b)
    torch.testing.assert_close(chain.stationary(), want, rtol=0, atol=1e-7)
    torch.testing.assert_close(chain.stationary() @ chain.P, chain.stationary(), rtol=0, atol=1e-14)
    assert float(chain.hitting_time(only(2, 1))[0]) == pytest.approx(1 / a, rel=1e-6)


def test_stationary_distribution_is_the_long_run():
    P = torch.softmax(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double(), -1)
    long_run = torch.linalg.matrix_power(P, 500)
    torch.testing.assert_close(long_run, MarkovChain(P).stationary().expand(6, 6), rtol=0, atol=1e-12)


def test_classes_and_periods():
    # a cycle of three, a cycle of four with a chord that leaves period 2, and one transient state feeding both
    P = torch.zeros(8, 8)
    for i in range(3):
        P[i, (i + 1) % 3] = 1
    for i in range(4):
        P[3 + i, 3 + (i + 1) % 4] = 1
    P[3, 4], P[3, 6] = 0.5, 0.5
    P[7, 0], P[7, 3] = 0.25, 0.75
    chain = MarkovChain(P)
    assert chain.classes == [[0, 1, 2], [3, 4, 5, 6], [7]]
    assert chain.closed_classes == [[0, 1, 2], [3, 4, 5, 6]]
    assert [chain.period(s) for s in (1, 5, 7)] == [3, 2, 0]
    assert not chain.irreducible
    torch.testing.assert_close(chain.absorption()[7], torch.tensor([0.25, 0.75]).double())
    torch.testing.assert_close(chain.stationary()[0, :3], torch.full((3,), 1 / 3).double())


def test_discounted_return_against_a_long_sum():
    rng = torch.Generator().manual_seed(1)
    P = torch.softmax(torch.randn(5, 5, generator=rng).double(), -1)
    reward = torch.randn(5, generator=rng).double()
    total, now = torch.zeros(5).double(), reward.clone()
    for t in range(600):
        total += 0.9**t * now
        now = P @ now
    torch.testing.assert_close(MarkovChain(P).expected_return(reward, 0.9), total, rtol=0, atol=1e-12)


def test_refusals():
    with pytest.raises(SteersmanError, match=r"P\[1\].*sum 0\.9"):
        MarkovChain(torch.tensor([[1.0, 0.0], [0.5, 0.4]]))
    with pytest.raises(SteersmanError, match=r"smallest entry -0\.5"):
        MarkovChain(torch.tensor([[1.5, -0.5], [0.5, 0.5]]))
    with pytest.raises(SteersmanError, match="square"):
        MarkovChain(torch.ones(2, 3) / 3)
    with pytest.raises(SteersmanError, match=r"discount 1\.1"):
        gambler(0.5, 3).expected_return(torch.zeros(4), 1.1)
    with pytest.raises(SteersmanError, match="state 0 recurs"):
        gambler(0.5, 3).expected_return(torch.ones(4))
