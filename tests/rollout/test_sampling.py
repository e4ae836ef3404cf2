"""One uniform number picks one token: the right distribution, and never a token of probability 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import tiny_model

from steersman.rollout import Engine, Sampling
from steersman.rollout.sampling import draw, uniforms
from steersman.types import Prompt


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    """The p-value of the counts, cells that expect fewer than 5 taken together."""
    expected = p * counts.sum()
    small = expected < 5
    observed = np.append(counts[~small], counts[small].sum())
    wanted = np.append(expected[~small], expected[small].sum())
    keep = wanted > 0
    return stats.chisquare(observed[keep], wanted[keep] * (observed.sum() / wanted.sum())).pvalue


@pytest.mark.parametrize("setting", [{}, {"temperature": 1.4}, {"top_k": 6}, {"top_p": 0.9}])
def test_first_tokens_are_distributed_as_the_model_says(setting):
    model = tiny_model("gpt2", scale=2.0)
    prompt, sampling = Prompt([7, 8, 9], ""), Sampling(1, **setting)
    samples = Engine(model, max_batch=512).generate([prompt], sampling, n=4000, seed=11)
    counts = np.bincount([s.ids[0] for s in samples], minlength=97)
    with torch.no_grad():
        logits = model(torch.tensor([prompt.ids])).logits[0, -1].double() / sampling.temperature
    p = logits.softmax(-1)
    if "top_k" in setting:
        p[p < p.sort().values[-6]] = 0
    if "top_p" in setting:
        ranked, order = p.sort(descending=True)
        p[order[ranked.cumsum(0) - ranked >= 0.9]] = 0
    p = (p / p.sum()).numpy()
    assert counts[p == 0].sum() == 0
    assert chi_square(counts, p) > 0.01


@pytest.mark.parametrize("vocab", [97, 5003])
def test_evenly_spread_uniforms_give_the_exact_shares(vocab):
    torch.manual_seed(0)
    logits = torch.randn(vocab) * 2
    u = (torch.arange(20000) + 0.5) / 20000
    ids, logp = zip(*(draw(logits.expand(len(some), -1), some) for some in u.split(4000)), strict=True)
    ids, logp = torch.cat(ids), torch.cat(logp)
    p = logits.double().softmax(-1)
    share = torch.bincount(ids, minlength=vocab) / 20000
    assert (share - p).abs().max() < 1.1 / 20000  # one spacing of the grid
    torch.testing.assert_close(logp.double(), p.log()[ids], atol=2e-6, rtol=0)
    assert (ids.diff() >= 0).all()


@pytest.mark.parametrize("vocab", [5, 97, 1024, 1025, 5003])
def test_no_uniform_reaches_a_token_of_probability_zero(vocab):
    torch.manual_seed(1)
    rows = 200
    logits = torch.randn(rows, vocab) * 5
    logits[torch.rand(rows, vocab) < 0.7] = -torch.inf
    logits[:, [0, -1]] = -torch.inf
    logits[torch.arange(rows), torch.randint(1, vocab - 1, (rows,))] = 0.0
    for u in (0.0, 2**-24, 0.5, 1 - 2**-24):
        ids, logp = draw(logits, torch.full((rows,), u))
        assert (logits.gather(1, ids[:, None]) > -torch.inf).all()
        assert torch.isfinite(logp).all()


def test_a_token_left_alone_is_certain():
    logits = torch.full((1, 3000), -torch.inf)
    logits[0, 1717] = -1e4
    ids, logp = draw(logits, torch.tensor([0.999]))
    assert (ids.item(), logp.item()) == (1717, 0.0)


def test_greedy_takes_the_first_of_equals():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    ids, logp = draw(logits, None)
    assert ids.tolist() == [1]
    torch.testing.assert_close(logp, logits.log_softmax(-1)[:, 1])


def test_streams_are_uniform_prefix_stable_and_unrelated():
    base = uniforms(3, 5, 0, 1, 4000)
    assert base.dtype == np.float32
    assert base.min() >= 0
    assert base.max() < 1
    assert stats.kstest(base, "uniform").pvalue > 0.01
    np.testing.assert_array_equal(uniforms(3, 5, 0, 1, 10), base[:10])
    for other in (
        uniforms(4, 5, 0, 1, 4000),
        uniforms(3, 6, 0, 1, 4000),
        uniforms(3, 5, 1, 1, 4000),
        uniforms(3, 5, 0, 2, 4000),
    ):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.06
