"""Each on-policy algorithm runs end to end, and what is particular to some of them happens."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from letter_models import rows_of
from train_kit import merge, plain, recipe, rewards_file, rows, save_tiny, settings, weights
from transformers import AutoModelForCausalLM

from steersman.algorithms import ALGORITHMS
from steersman.cli import main
from steersman.data import Batches
from steersman.setup.reference import AdaptersOff
from steersman.train.on_policy import OnPolicy
from steersman.train.policy_update import Learner
from steersman.train.roles import build_roles
from steersman.types import Prompt
from steersman.update.kl_controller import DoublingKL
from steersman.verbs import rl

CPU = torch.device("cpu")


def on_policy(name, base, count=12, **extra) -> OnPolicy:
    """The loop's state without folder and log, on prompts that are single letters."""
    asked = recipe(name, base, **extra)
    roles = build_roles(asked, CPU)
    prompts = [Prompt([3 + i], chr(97 + i), index=i) for i in range(count)]
    return OnPolicy(asked, roles, prompts, Batches(count, asked.rollout.prompts, asked.run.seed, drop_last=True))


def snapshot(module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def moved(module, before) -> bool:
    return any(not torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_runs_and_leaves_finite_numbers(name, base, tmp_path, mini):
    summary = rl.run(recipe(name, base))
    assert summary["finished"]
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [0, 1, 2]
    numbers = {k: v for row in found for k, v in row.items()}
    assert all(isinstance(v, int | float) and math.isfinite(v) for v in numbers.values()), numbers
    assert {"reward/total", "held_out/reward/total", "entropy", "grad_norm/actor"} <= set(numbers)
    assert ("loss/value" in numbers) == ALGORITHMS[name].critic
    if ALGORITHMS[name].update == "gradient":
        assert all(row["ratio_gap"] < 2e-4 for row in found[1:])
    after, start = weights(tmp_path / "run" / "model"), weights(mini)
    assert all(torch.isfinite(w).all() for w in after.values())
    assert any(not torch.equal(after[k], start[k]) for k in after)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def test_a_run_leaves_its_report(base, tmp_path, with_report):
    rl.run(recipe("rloo", base))
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()


def test_critic_warmup_trains_the_critic_alone(base):
    state = on_policy("ppo", base, critic__warmup=2, iterations=4, algorithm__kl_target=1.0, algorithm__beta=0.1)
    actor, critic = snapshot(state.roles.policy), snapshot(state.roles.learner.critic)
    for _ in range(2):
        stats = state.iteration().stats
        assert "grad_norm/actor" not in stats
        assert "loss/policy" not in stats
    assert not moved(state.roles.policy, actor)
    assert moved(state.roles.learner.critic, critic)
    assert state.coefficients.beta.coef == 0.1
    assert "grad_norm/actor" in state.iteration().stats
    assert moved(state.roles.policy, actor)
    # the schedule spans the updates that the actor makes
    assert state.roles.learner.actor.total == 2 * 4 * 2
    assert state.roles.learner.critic_optimizer.total == 4 * 4 * 2


def test_critic_warmup_holds_back_a_trust_region_too(base):
    state = on_policy("trpo", base, critic__warmup=1)
    actor = snapshot(state.roles.policy)
    assert "trpo/step" not in state.iteration().stats
    assert not moved(state.roles.policy, actor)
    assert "trpo/step" in state.iteration().stats


def test_a_shared_critic_is_a_head_on_the_actors_trunk(base):
    state = on_policy("ppo", base, critic__init="shared")
    learner = state.roles.learner
    assert learner.critic_optimizer is None
    actor = snapshot(state.roles.policy)
    stats = state.iteration().stats
    assert moved(state.roles.policy, actor)
    assert learner.critic.value_head.weight.abs().sum() > 0
    assert stats["loss/value"] > 0
    assert stats["ratio_gap"] < 2e-4


def test_lora_trains_adapters_and_its_reference_is_the_actor_without_them(base, tmp_path, mini):
    state = on_policy("ppo", base, model__lora={"r": 2}, optimizer__lr=0.05)
    roles = state.roles
    assert isinstance(roles.reference, AdaptersOff)
    assert roles.reference.policy is roles.policy
    assert state.iteration().stats["kl"] == pytest.approx(0, abs=1e-5)
    assert state.iteration().stats["kl"] > 1e-3
    trained = [name for name, p in roles.policy.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    # the base weights, which the reference reads, are those on disk
    start = AutoModelForCausalLM.from_pretrained(mini)
    prompt = torch.tensor([[4, 9, 20]])
    with roles.policy.reference() as frozen, torch.no_grad():
        torch.testing.assert_close(frozen.model(prompt).logits, start(prompt).logits)


def test_critic_and_reward_come_from_the_reward_model(base, tmp_path, mini):
    from steersman.model import load_scalar, save

    judge = load_scalar(mini)
    torch.nn.init.normal_(judge.model.score.weight)
    save(judge, judge.tokenizer, tmp_path / "judge")
    with_judge = merge(base, {"reward.parts": {"judge": {"model": str(tmp_path / "judge")}}})
    critic = on_policy("ppo", with_judge).roles.learner.critic
    torch.testing.assert_close(critic.model.score.weight, judge.model.score.weight)
    assert all(p.requires_grad for p in critic.parameters())
    # another vocabulary: the judge reads text, but a critic reads ids, so it starts from the policy
    other = save_tiny(tmp_path / "other", vocabulary=[*["<unk>", "<s>", "</s>"], *(chr(i) for i in range(65, 97))])
    judge = load_scalar(other)
    torch.nn.init.normal_(judge.model.score.weight)
    save(judge, judge.tokenizer, tmp_path / "judge2")
    bridged = merge(base, {"reward.parts": {"judge": {"model": str(tmp_path / "judge2")}}})
    assert on_policy("ppo", bridged).roles.learner.critic.model.config.hidden_size == 16


def test_updates_stop_when_the_policy_has_moved_far_enough(base):
    free = on_policy("ppo", base, algorithm__epochs=6, optimizer__lr=0.05)
    far = free.iteration().stats
    assert "epochs" not in far
    held = on_policy("ppo", base, algorithm__epochs=6, optimizer__lr=0.05, algorithm__stop_kl=1e-3)
    stats = held.iteration().stats
    assert 0 < stats["epochs"] < 6
    assert stats["kl/old"] < far["kl/old"]
    made = held.roles.learner.actor.updates
    assert made == round(stats["epochs"] * 2) < free.roles.learner.actor.updates == 12


def test_the_controller_of_ppo_kl_sees_the_step_that_was_made(base, monkeypatch):
    """KL(old || new) once the updates are done (1707.06347, section 4), by whole distributions: not a mean over the
    minibatches, the first of which is always 0."""
    state = on_policy("ppo-kl", base, algorithm__epochs=3, optimizer__lr=0.02, algorithm__target_old=1e9)
    learner, seen, update = state.roles.learner, [], Learner.update

    def watched(self, tokens, traj, *given, **named):
        seen.append((tokens, traj))
        return update(self, tokens, traj, *given, **named)

    monkeypatch.setattr(Learner, "update", watched)
    first = learner.algorithm.beta_old
    stats = state.iteration().stats
    tokens, traj = seen[0]
    with torch.no_grad():
        logp = learner.policy.logp(tokens).logp
    log_ratio = torch.where(traj.mask, logp - traj.logp_old, 0.0).double()
    expected = float((log_ratio.exp() - 1 - log_ratio).sum() / traj.mask.sum())
    assert expected > 1e-4
    assert stats["kl/old"] == pytest.approx(expected, rel=1e-4)
    assert state.coefficients.beta_old.coef == first / 2


def test_trust_region_step_stays_in_its_region(base):
    state = on_policy("trpo", base, algorithm__max_kl=0.003)
    taken = 0
    for _ in range(4):
        stats = state.iteration().stats
        assert stats["trpo/kl"] <= 0.003
        taken += stats["trpo/step"] > 0
        if stats["trpo/step"] > 0:
            assert stats["trpo/improvement"] > 0
            assert stats["trpo/kl"] > 1e-5
    assert taken >= 3


def test_dynamic_sampling_replaces_groups_without_signal(base):
    calls: list[list[int]] = []

    def signal_from_even_prompts(prompts, completions, samples):
        calls.append([s.prompt.index for s in samples])
        return [float(s.index) if s.prompt.index % 2 == 0 else 1.0 for s in samples]

    state = on_policy("dapo", base, count=16, rollout__prompts=4, algorithm__dynamic_sampling=8)
    state.roles.reward.parts["score"][1].__init__(signal_from_even_prompts, "score")
    state.batches.shuffle = False
    samples, scores = state.sample(state.next_prompts())
    assert sorted({s.prompt.index for s in samples}) == [0, 2, 4, 6]
    assert len(samples) == len(scores.total) == 8
    assert [float(x) for x in scores.total] == [float(s.index) for s in samples]
    assert calls == [[0, 0, 1, 1, 2, 2, 3, 3], [4, 4, 5, 5], [6, 6]]
    assert [p.index for p in state.next_prompts()] == [7, 8, 9, 10]  # no prompt is passed over
    fixed = on_policy("dapo", base, count=16, algorithm__dynamic_sampling=0)
    fixed.roles.reward.parts["score"][1].__init__(signal_from_even_prompts, "score")
    fixed.batches.shuffle = False
    samples, _ = fixed.sample(fixed.next_prompts())
    assert {s.prompt.index for s in samples} == {0, 1, 2, 3}


def test_remax_compares_with_the_shaped_score_of_the_greedy_response(base):
    state = on_policy("remax", base, reward__clip=0.4, rollout__samples=1)
    samples, scores = state.sample(state.next_prompts())
    _, traj, _ = state.experience(samples, scores)
    prompts = [s.prompt for s in samples]
    greedy = state.roles.generate(prompts, seed=0, n=1, greedy=True)
    expected = torch.tensor([min(s.text.count("a") / 4, 0.4) for s in greedy])
    torch.testing.assert_close(traj.baseline, expected)
    for sample in greedy:  # greedy is what it says: each token is the likeliest
        ids = torch.tensor([sample.prompt.ids + sample.ids])
        with torch.no_grad():
            best = state.roles.policy.model(ids).logits[0, len(sample.prompt.ids) - 1 : -1].argmax(-1)
        assert best.tolist() == sample.ids
    running = on_policy("remax", base, reward__normalise=True, rollout__samples=1)
    running.iteration()
    assert running.roles.shaping.norm.count == 4  # the greedy scores are not counted


def test_the_moving_baseline_is_of_earlier_iterations_only(base):
    state = on_policy("reinforce", base, algorithm__beta=0.0, reference="none")
    samples, scores = state.sample(state.next_prompts())
    _, first, _ = state.experience(samples, scores)
    assert first.baseline.tolist() == [0.0] * 8
    assert state.moving_mean == pytest.approx(float(scores.total.mean()))
    before = state.moving_mean
    samples, scores = state.sample(state.next_prompts())
    _, second, _ = state.experience(samples, scores)
    torch.testing.assert_close(second.baseline, torch.full((8,), before))


def test_nlpo_never_samples_outside_the_lagging_copys_nucleus_but_to_end(base, tmp_path):
    spiky = merge(base, {"model.path": str(save_tiny(tmp_path / "spiky", scale=4.0))})
    state = on_policy("nlpo", spiky, algorithm__mask_top_p=0.6, algorithm__mask_every=2, optimizer__lr=0.05)
    masker = state.roles.mask.model
    frozen = snapshot(masker)
    samples, _ = state.sample(state.next_prompts())
    for sample in samples:
        ids = torch.tensor([sample.prompt.ids + sample.ids])
        with torch.no_grad():
            p = masker(ids).logits[0, len(sample.prompt.ids) - 1 : -1].softmax(-1)
        for t, token in enumerate(sample.ids):
            better = p[t][p[t] > p[t, token]].sum()
            assert token in state.roles.engine.end_ids or better < 0.6 + 1e-5
    state.iteration()
    assert not moved(masker, frozen)
    state.iteration()
    assert moved(masker, frozen)


def test_the_penalty_of_ppo_kl_follows_how_far_the_policy_moved(base):
    state = on_policy("ppo-kl", base, algorithm__target_old=1e-9, optimizer__lr=0.03)
    assert isinstance(state.coefficients.beta_old, DoublingKL)
    state.iteration()
    assert state.coefficients.beta_old.coef == 2.0


def test_same_seed_same_run_and_another_seed_another(base, tmp_path):
    def one(folder: str, seed: int):
        again = merge(
            base, {"run.dir": str(tmp_path / folder), "run.seed": seed, "rollout.top_p": 0.9, "iterations": 1}
        )
        rl.run(recipe("ppo", again))
        return [plain(row) for row in rows(tmp_path / folder)], weights(tmp_path / folder / "model")

    (rows_a, a), (rows_b, b), (rows_c, c) = one("a", 3), one("b", 3), one("c", 4)
    assert rows_a == rows_b
    assert rows_a != rows_c
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_rewards_per_token_reach_their_tokens(base, tmp_path):
    path = f"{rewards_file(tmp_path)}:per_token"
    state = on_policy("ppo", merge(base, {"reward.parts": {"dense": {"function": path}}}), algorithm__beta=0.0)
    samples, scores = state.sample(state.next_prompts())
    _, traj, _ = state.experience(samples, scores)
    for row, sample in enumerate(samples):
        expected = torch.tensor([0.1 * (i % 7) for i in sample.ids])
        torch.testing.assert_close(traj.reward[row, : len(sample.ids)], expected)


def test_a_method_by_its_path_trains(tmp_path, mini):
    """`steersman my_method.py:Class` is the on-policy loop with that class."""
    (tmp_path / "mine.py").write_text(
        "from steersman.algorithms.grpo import GRPO\n\n\n"
        "class Mine(GRPO):\n"
        "    name = 'mine'\n"
        "    title = 'GRPO with half the advantage'\n\n"
        "    def advantage(self, traj):\n"
        "        made = super().advantage(traj)\n"
        "        return type(made)(made.adv * 0.5)\n"
    )
    base = settings(tmp_path, mini)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(base))
    assert main([f"{tmp_path}/mine.py:Mine", str(path)]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["verb"] == "mine"


def test_a_look_says_how_sure_its_mean_is(tmp_path, base):
    """The standard error of the mean over the held prompts, from the rewards in samples.jsonl."""
    rl.run(recipe("grpo", base, rollout__held_out=5))
    numbers = [row for row in rows(tmp_path / "run") if "held_out/reward_se" in row]
    answers = rows_of(tmp_path / "run" / "samples.jsonl")
    assert len(numbers) == 2
    for look in numbers:
        found = torch.tensor(
            [a["reward"]["score"] for a in answers if a["step"] == look["step"]], dtype=torch.float64
        )
        assert len(found) == 5
        assert look["held_out/reward/total"] == pytest.approx(float(found.mean()))
        assert look["held_out/reward_se"] == pytest.approx(math.sqrt(float(found.var()) / 5))


def test_every_token_knows_the_version_of_the_weights_that_it_was_sampled_from(base):
    """Version 0 is the start, n the weights after n iterations; a resumed run counts on."""
    state = on_policy("rloo", base)
    seen = []
    for _ in range(3):
        seen.append(state.iteration())
        state.publish()
    assert [{v for s in one.samples for v in s.version} for one in seen] == [{0}, {1}, {2}]
    assert all(len(s.version) == len(s.ids) for one in seen for s in one.samples)
    again = on_policy("rloo", base)
    again.load_state_dict(state.state_dict())
    assert {v for s in again.iteration().samples for v in s.version} == {3}
