"""Hidden Markov models against enumeration of every hidden path."""

from __future__ import annotations

import itertools

import pytest
import torch

from steersman.tabular.hmm import HMM, baum_welch
from steersman.types import SteersmanError


def make(seed=0, K=3, M=4) -> HMM:
    rng = torch.Generator().manual_seed(seed)
    draw = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((K,), (K, K), (K, M)))
    return HMM(*(torch.softmax(1.5 * x, -1) for x in draw))


def every_path(model, obs):
    """[(path, joint probability)] by multiplication."""
    for path in itertools.product(range(len(model.start)), repeat=len(obs)):
        p = float(model.start[path[0]] * model.emission[path[0], obs[0]])
        for t in range(1, len(obs)):
            p *= float(model.transition[path[t - 1], path[t]] * model.emission[path[t], obs[t]])
        yield path, p


@pytest.mark.parametrize("obs", [[2], [0, 3, 1, 1, 2]])
def test_against_brute_force(obs):
    model, T = make(), len(obs)
    state, pair, total = torch.zeros(T, 3).double(), torch.zeros(T - 1, 3, 3).double(), 0.0
    paths = list(every_path(model, obs))
    for path, p in paths:
        total += p
        for t in range(T):
            state[t, path[t]] += p
        for t in range(T - 1):
            pair[t, path[t], path[t + 1]] += p
    got = model.forward_backward(torch.tensor(obs))
    torch.testing.assert_close(got.state, state / total, rtol=0, atol=1e-13)
    torch.testing.assert_close(got.pair, pair / total, rtol=0, atol=1e-13)
    assert float(got.log_likelihood.exp()) == pytest.approx(total, rel=1e-12)
    # what is known at the end is the same filtered or smoothed
    torch.testing.assert_close(got.filtered[-1], got.state[-1], rtol=0, atol=1e-13)
    early = model.forward_backward(torch.tensor(obs[:1]))
    torch.testing.assert_close(got.filtered[0], early.state[0], rtol=0, atol=1e-13)
    best, p = max(paths, key=lambda item: item[1])
    path, logp = model.viterbi(torch.tensor(obs))
    assert tuple(path.tolist()) == best
    assert float(logp.exp()) == pytest.approx(p, rel=1e-12)


def test_long_sequences_do_not_underflow():
    model = make()
    _, obs = model.sample(3000, torch.Generator().manual_seed(0))
    got = model.forward_backward(obs)
    assert got.log_likelihood.isfinite()
    torch.testing.assert_close(got.state.sum(-1), torch.ones(3000).double(), rtol=0, atol=1e-9)


def test_one_baum_welch_step_is_the_posterior_frequency():
    model, sequences = make(), [torch.tensor([0, 3, 1]), torch.tensor([2, 2])]
    start, moves, symbols = torch.zeros(3).double(), torch.zeros(3, 3).double(), torch.zeros(3, 4).double()
    for obs in sequences:
        paths = list(every_path(model, obs.tolist()))
        total = sum(p for _, p in paths)
        for path, p in paths:
            start[path[0]] += p / total
            for t, o in enumerate(obs.tolist()):
                symbols[path[t], o] += p / total
                if t:
                    moves[path[t - 1], path[t]] += p / total
    fitted, history = baum_welch(model, sequences, iterations=1)
    torch.testing.assert_close(fitted.start, start / 2, rtol=0, atol=1e-13)
    torch.testing.assert_close(fitted.transition, moves / moves.sum(-1, keepdim=True), rtol=0, atol=1e-13)
    torch.testing.assert_close(fitted.emission, symbols / symbols.sum(-1, keepdim=True), rtol=0, atol=1e-13)
    assert len(history) == 2


def test_baum_welch_climbs_and_recovers_a_clear_model():
    truth = HMM(
        torch.tensor([0.5, 0.5]),
        torch.tensor([[0.9, 0.1], [0.2, 0.8]]).double(),
        torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.2, 0.8]]).double(),
    )
    rng = torch.Generator().manual_seed(3)
    sequences = [truth.sample(60, rng)[1] for _ in range(8)]
    first = HMM(torch.tensor([0.5, 0.5]), torch.full((2, 2), 0.5), torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]))
    fitted, history = baum_welch(first, sequences, iterations=20, tolerance=1e-2)
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(history))
    torch.testing.assert_close(fitted.transition, truth.transition, rtol=0, atol=0.1)
    torch.testing.assert_close(fitted.emission, truth.emission, rtol=0, atol=0.1)
    assert history[-1] >= sum(float(truth.forward_backward(o).log_likelihood) for o in sequences)


def test_refusals():
    with pytest.raises(SteersmanError, match="do not fit"):
        HMM(torch.ones(1), torch.eye(2), torch.ones(2, 1))
    with pytest.raises(SteersmanError, match=r"emission\[1\]"):
        HMM(torch.tensor([1.0, 0.0]), torch.eye(2), torch.tensor([[1.0, 0.0], [0.5, 0.0]]))
    with pytest.raises(SteersmanError, match=r"0\.\.3"):
        make().viterbi(torch.tensor([4]))
    with pytest.raises(SteersmanError, match="at least one sequence"):
        baum_welch(make(), [])
    stuck = HMM(torch.tensor([1.0, 0.0]), torch.eye(2), torch.eye(2))
    with pytest.raises(SteersmanError, match="impossible"):
        stuck.forward_backward(torch.tensor([0, 1]))
    with pytest.raises(SteersmanError, match="impossible"):
        stuck.viterbi(torch.tensor([0, 1]))
