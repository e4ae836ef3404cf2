"""Rollouts made by another engine: each step weighted by min(pi_train / pi_rollout, cap)."""

from __future__ import annotations

import copy

import pytest
import torch
from letter_models import LETTERS, letters
from tiny_models import tiny_model
from train_kit import recipe, rows, weights

from steersman.advantage.gae import Advantage
from steersman.algorithms import ALGORITHMS, Coefficients
from steersman.config.load import load_recipe
from steersman.data import Batches
from steersman.loss.correction import CAPS, Correction
from steersman.model import Policy
from steersman.rollout import Engine, Sampling
from steersman.train.experience import behaviour_logp, tokens_of, trajectory
from steersman.train.on_policy import OnPolicy
from steersman.train.policy_update import Learner
from steersman.train.roles import build_roles
from steersman.types import Prompt, SteersmanError, Tokens, Trajectory
from steersman.update.optimizer import Optimizer, OptimizerConfig
from steersman.verbs import rl
from steersman.verbs.on_policy_recipes import RECIPES

CPU, V = torch.device("cpu"), len(LETTERS)
PROMPTS = [Prompt(ids, "", index=i) for i, ids in enumerate([[5], [7, 3, 9, 30], [12, 4], [33, 20, 8]])]


def policy() -> Policy:
    return Policy(tiny_model("llama", vocab=V, scale=2.0), letters())


def bfloat16_copy(model: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(model).to(torch.bfloat16)


def gradient(policy: Policy, tokens: Tokens, traj: Trajectory, adv: torch.Tensor, cap: float) -> torch.Tensor:
    """The gradient that `Learner` takes, unclipped, of one update on the whole batch."""
    rloo = ALGORITHMS["rloo"](beta=0.0, average="episode")
    one = Optimizer(policy.parameters(), OptimizerConfig(lr=1e-30, max_grad_norm=1e30), 1)
    taken: list[torch.Tensor] = []
    one.adamw.register_step_pre_hook(
        lambda *_: taken.append(
            torch.cat([p.grad.flatten().clone() for p in policy.parameters() if p.grad is not None])
        )
    )
    Learner(rloo, policy, one, correction=Correction(cap=cap)).update(
        tokens, traj, Advantage(adv), Coefficients(), torch.Generator().manual_seed(0)
    )
    return taken[0]


def test_weights_make_the_expected_gradient_exact_when_the_sampler_is_in_bfloat16():
    """One-token answers, all of them, each with its probability under the bfloat16 copy: nothing is sampled.

    The exact gradient is sum_a pi_train(a) A(a) grad log pi_train(a), by autograd of sum_a pi_train(a) A(a).
    """
    trained = policy()
    other = bfloat16_copy(trained.model)
    prompt = torch.tensor([PROMPTS[1].ids])
    worth = torch.randn(V, generator=torch.Generator().manual_seed(3))
    logp = trained.model(prompt).logits[0, -1].log_softmax(-1)
    exact = torch.cat(
        [g.flatten() for g in torch.autograd.grad(-(logp.exp() * worth).sum(), list(trained.model.parameters()))]
    )
    with torch.no_grad():
        sampled_from = other(prompt).logits[0, -1].float().log_softmax(-1)
    tokens = Tokens.from_ids([PROMPTS[1].ids] * V, [[a] for a in range(V)])
    column = torch.ones(V, 1)
    adv = (V * sampled_from.exp() * worth)[:, None]

    def error(cap: float, corrected: bool) -> float:
        old = logp.detach()[:, None] if corrected else sampled_from[:, None]
        traj = Trajectory(
            tokens.mask, 0 * column, column, old, logp_rollout=sampled_from[:, None] if corrected else None
        )
        return float((gradient(trained, tokens, traj, adv, cap) - exact).norm() / exact.norm())

    plain, weighted, cut = error(1.0, False), error(2.0, True), error(1.0, True)
    assert plain > 2e-3, "bfloat16 is far enough from float32 to matter"
    assert weighted < 1e-5
    assert weighted < cut < plain, "a cap that binds leaves part of the error"


@pytest.mark.parametrize("cap", [1.0, 2.0])
def test_the_gradient_of_real_rollouts_in_bfloat16_is_the_weighted_one(cap):
    """Against a transcription, token by token, of -min(pi / mu, cap) A grad log pi."""
    trained = policy()
    other = bfloat16_copy(trained.model)
    samples = Engine(other, trained.tokenizer, eos_token_id=[2]).generate(PROMPTS, Sampling(max_new_tokens=7), n=3)
    tokens, rloo = tokens_of(samples), ALGORITHMS["rloo"](beta=0.0)
    with torch.no_grad():
        logp_old = trained.logp(tokens).logp
    traj = trajectory(samples, tokens, torch.zeros(len(samples)), rloo, logp_old=logp_old)
    assert traj.logp_rollout is not None
    assert torch.equal(traj.logp_rollout, behaviour_logp(samples, tokens.mask.shape[1]))
    adv = torch.randn(tokens.mask.shape, generator=torch.Generator().manual_seed(1))
    got = gradient(trained, tokens, traj, adv, cap)

    total = torch.zeros(())
    for row, sample in enumerate(samples):
        logits = trained.model(torch.tensor([sample.prompt.ids + sample.ids])).logits[0, len(sample.prompt.ids) - 1 :]
        for t, token in enumerate(sample.ids):
            logp = logits[t].log_softmax(-1)[token]
            weight = min(float((logp.detach() - sample.logp[t]).exp()), cap)
            total = total - weight * adv[row, t] * logp
    expected = torch.autograd.grad(total / len(samples), list(trained.model.parameters()))
    torch.testing.assert_close(got, torch.cat([g.flatten() for g in expected]), rtol=1e-3, atol=1e-5)


def state(base, **changes) -> OnPolicy:
    asked = recipe("ppo", base, algorithm__epochs=1, algorithm__minibatches=1, **changes)
    prompts = [Prompt([3 + i], chr(97 + i), index=i) for i in range(12)]
    return OnPolicy(asked, build_roles(asked, CPU), prompts, Batches(12, asked.rollout.prompts, 0, drop_last=True))


def test_the_loop_sees_another_engine_and_says_how_far_off_it_is(base):
    """The same engine leaves nothing to weigh; a bfloat16 one shows as a gap, not as a ratio."""
    agreeing = state(base, rollout__recompute_logp=True).iteration().stats
    assert agreeing["rollout/gap"] < 2e-4
    assert agreeing["rollout/weight"] == pytest.approx(1, abs=1e-4)
    assert agreeing["rollout/capped"] == 0

    seen = {}
    for recompute in (False, True):
        run = state(base, rollout__recompute_logp=recompute)
        run.roles.engine = Engine(bfloat16_copy(run.roles.policy.model), run.roles.policy.tokenizer, eos_token_id=[2])
        seen[recompute] = run.iteration().stats
    assert seen[False]["ratio_gap"] > 1e-3, "without recomputing, the first ratio is off"
    assert "rollout/gap" not in seen[False]
    assert seen[True]["ratio_gap"] < 2e-4
    assert seen[True]["rollout/gap"] == pytest.approx(seen[False]["ratio_gap"], rel=0.01)


@pytest.mark.parametrize("name", ["rloo", "ppo", "trpo", "nlpo", "gspo"])
def test_where_the_engines_agree_recomputing_changes_nothing(name, base, tmp_path, mini):
    plain, again = tmp_path / "plain", tmp_path / "again"
    # an epsilon this large makes Adam's step proportional to the gradient, so that rounding stays small
    optimizer = {"lr": 0.3, "eps": 1.0}
    rl.run(recipe(name, base, run__dir=str(plain), optimizer=optimizer))
    rl.run(recipe(name, base, run__dir=str(again), optimizer=optimizer, rollout__recompute_logp=True))
    one, two, start = weights(plain / "model"), weights(again / "model"), weights(mini)
    moved = max(float((one[k] - start[k]).abs().max()) for k in one)
    apart = max(float((one[k] - two[k]).abs().max()) for k in one)
    assert apart < 1e-3 * moved
    assert all(row["rollout/gap"] < 2e-4 for row in rows(again)[1:])


@pytest.mark.parametrize("kind", ["none", "decoupled", "token_masked", "sequence_truncated", "sequence_masked",
                                  "geometric_masked", "k3_masked"])  # fmt: skip
def test_every_correction_reaches_the_loss_by_its_name(kind, base):
    """A bfloat16 sampler, and what the run logs of it: gap, weight, share bounded and effective sample size."""
    run = state(base, rollout__recompute_logp=True, rollout__correction={"kind": kind})
    run.roles.engine = Engine(bfloat16_copy(run.roles.policy.model), run.roles.policy.tokenizer, eos_token_id=[2])
    assert run.roles.learner.correction.kind == kind
    stats = run.iteration().stats
    assert stats["rollout/gap"] > 1e-3
    assert stats["rollout/weight"] == pytest.approx(1, abs=0.05)
    assert 0.95 < stats["rollout/ess"] <= 1 + 1e-6
    assert stats["rollout/capped"] == 0


def test_the_bound_of_a_correction_follows_its_kind(base):
    own = {"rollout__recompute_logp": True}
    made = {k: recipe("ppo", base, **own, rollout__correction={"kind": k}) for k in CAPS}
    made = {k: asked.rollout.correction.correction() for k, asked in made.items()}
    assert {k: c.cap for k, c in made.items()} == CAPS


def test_a_cap_below_one_is_refused(base, tmp_path):
    with pytest.raises(SteersmanError, match=r"rollout\.correction"):
        load_recipe(RECIPES["ppo"], None, ["--rollout.correction.cap", "0.5"])
