"""The oracle must call an unbiased estimator unbiased and a biased one biased."""

from __future__ import annotations

import time

import pytest
import torch

from steersman.tabular.oracle import exact_gradient, expected_gradient, groups, relative_deviation
from steersman.tabular.token_mdp import TokenMDP
from steersman.types import SteersmanError


def make(beta=0.7, **kwargs):
    mdp = TokenMDP.random(vocab=3, horizon=3, beta=beta, seed=2, **{"per_token": True, **kwargs})
    rng = torch.Generator().manual_seed(3)
    return mdp, torch.randn(mdp.next_state.shape, generator=rng, dtype=torch.float64)


def reinforce(batch):
    """Score function times reward-to-go, written with loops as an independent check."""
    tr = batch.trajectory
    to_go = torch.stack([tr.reward[:, t:].sum(-1) for t in range(tr.reward.shape[1])], 1)
    return torch.where(tr.mask, -batch.logp * to_go, 0)


def actor_critic(batch):
    tr = batch.trajectory
    delta = tr.reward + tr.discount * tr.value[:, 1:] - tr.value[:, :-1]
    return torch.where(tr.mask, -batch.logp * delta, 0)


def leave_one_out(batch):
    total = batch.trajectory.reward.sum(-1).reshape(batch.batches, -1)
    others = (total.sum(-1, keepdim=True) - total) / (total.shape[1] - 1)
    return -(total - others) * batch.logp.sum(-1).reshape(total.shape) / total.shape[1]


def group_mean(batch):
    total = batch.trajectory.reward.sum(-1).reshape(batch.batches, -1)
    adv = total - total.mean(-1, keepdim=True)
    return -adv * batch.logp.sum(-1).reshape(total.shape) / total.shape[1]


@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("loss", [reinforce, actor_critic])
def test_unbiased_estimators(beta, loss):
    mdp, logits = make(beta, prompts=2)
    assert relative_deviation(expected_gradient(mdp, logits, loss), -exact_gradient(mdp, logits)) < 1e-12


def test_leave_one_out_is_unbiased_and_the_group_mean_shrinks_by_a_known_factor():
    mdp, logits = make(prompts=2)
    exact = exact_gradient(mdp, logits)
    for size in (2, 3):
        assert relative_deviation(expected_gradient(mdp, logits, leave_one_out, size=size), -exact) < 1e-12
        shrunk = expected_gradient(mdp, logits, group_mean, size=size)
        assert relative_deviation(shrunk, -exact * (size - 1) / size) < 1e-12


def test_bias_is_seen():
    mdp, logits = make()
    exact = exact_gradient(mdp, logits)
    wrong_value = torch.randn(len(mdp.states), generator=torch.Generator().manual_seed(0)).double()
    assert relative_deviation(expected_gradient(mdp, logits, actor_critic, value=wrong_value), -exact) > 0.1
    assert relative_deviation(expected_gradient(mdp, logits, lambda b: -reinforce(b)), -exact) > 1

    def whitened(batch):
        adv = batch.trajectory.reward.sum(-1)
        return -((adv - adv.mean()) / (adv.std() + 1e-8) * batch.logp.sum(-1)).mean()

    assert relative_deviation(expected_gradient(mdp, logits, whitened, count=2, stacked=False), -exact) > 0.1


def test_stacked_and_one_at_a_time_agree():
    mdp, logits = make()
    one = expected_gradient(mdp, logits, lambda b: leave_one_out(b).sum(), size=2, stacked=False)
    torch.testing.assert_close(one, expected_gradient(mdp, logits, leave_one_out, size=2), rtol=0, atol=1e-14)
    both = expected_gradient(mdp, logits, lambda b: reinforce(b).sum() / 2, count=2, stacked=False)
    torch.testing.assert_close(both, -exact_gradient(mdp, logits), rtol=0, atol=1e-13)


def test_importance_weights_from_another_behaviour():
    mdp, logits = make(beta=0.0)

    def weighted(batch):
        tr = batch.trajectory
        ratio = (batch.logp - tr.logp_old).sum(-1).exp()
        return -ratio * tr.reward.sum(-1)

    behaviour = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(8)).double()
    grad = expected_gradient(mdp, logits, weighted, behaviour=behaviour)
    assert relative_deviation(grad, -exact_gradient(mdp, logits)) < 1e-12


def test_losses_may_use_whole_distributions():
    mdp, logits = make(beta=0.0)

    def entropy_bonus(batch):
        dist = torch.distributions.Categorical(logits=mdp.along(batch.logits, batch.rows)[:, :-1])
        # the distribution's own gradient and the score function's: together the gradient of E[sum_t H_t]
        h = torch.where(batch.trajectory.mask, dist.entropy(), 0).sum(-1)
        return h + batch.logp.sum(-1) * h.detach()

    leaf = logits.clone().requires_grad_()
    (want,) = torch.autograd.grad(mdp.entropy(leaf), leaf)
    got = expected_gradient(mdp, logits, entropy_bonus)
    torch.testing.assert_close(got, want.flatten(), rtol=0, atol=1e-13)


def test_gradients_reach_the_parameters_of_a_transformer():
    from transformers import AutoModelForCausalLM, GPT2Config

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=3, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    mdp, _ = make(prompts=2)
    params = list(model.parameters())
    grad = expected_gradient(mdp, lambda: mdp.logits_of(model), reinforce, params)
    assert grad.numel() == sum(p.numel() for p in params)
    assert relative_deviation(grad, -exact_gradient(mdp, lambda: mdp.logits_of(model), params)) < 1e-10
    with pytest.raises(SteersmanError, match="params"):
        exact_gradient(mdp, lambda: mdp.logits_of(model))


def test_groups_are_all_tuples_with_their_probability():
    mdp, logits = make(prompts=2)
    index, prob = groups(mdp, logits, size=2, count=2)
    assert index.shape == ((2 * 15**2) ** 2, 4)
    assert float(prob.sum()) == pytest.approx(1, abs=1e-12)
    assert (mdp.prompt[index[:, 0]] == mdp.prompt[index[:, 1]]).all()
    one = mdp.sequence_logp(logits).sum(-1).exp()[index[77]]
    assert float(prob[77]) == pytest.approx(float(one.prod()) / 4)
    with pytest.raises(SteersmanError, match="too many"):
        groups(mdp, logits, size=6)


def test_one_exact_gradient_takes_milliseconds():
    mdp = TokenMDP.random(vocab=4, horizon=3, beta=0.5)
    logits = torch.zeros(mdp.next_state.shape, dtype=torch.float64)
    exact_gradient(mdp, logits)
    start = time.process_time()
    for _ in range(20):
        exact_gradient(mdp, logits)
    assert (time.process_time() - start) / 20 < 0.05
