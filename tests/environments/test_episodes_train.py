"""Every interface trains: episodes in, weights moved, tokens exact, and what the environment said never counts."""

from __future__ import annotations

import json

import pytest
import torch
from letter_models import LETTERS, letters
from pydantic import ValidationError
from tiny_models import tiny_model
from train_kit import merge, recipe, rows, weights

from steersman.advantage.by_turn import by_turn
from steersman.environments.config import EnvironmentConfig, open_environment
from steersman.environments.telling import with_tool_descriptions
from steersman.train.experience import tokens_of
from steersman.train.on_policy import OnPolicy
from steersman.train.roles import build_roles
from steersman.verbs import rl
from steersman.verbs.rl import _prompts

CPU = torch.device("cpu")


def played(base, name="rloo", **extra):
    """The parts of a run, and the episodes of its first iteration."""
    made = recipe(name, base, **extra)
    roles = build_roles(made, CPU)
    train = _prompts(made, roles).train
    samples = roles.generate(train[:4], seed=(0, 0), n=2)
    return made, roles, train, samples


def test_sampled_ids_are_trained_ids_and_the_rest_was_tokenised_once(base):
    _, roles, _, samples = played(base)
    decode = roles.policy.tokenizer.decode
    for s in samples:
        assert len(s.turns) == 3
        assert s.outcome == "done"
        for turn, after in zip(s.turns, [*s.turns[1:], None], strict=True):
            assert all(s.mask[turn.begin : turn.end])
            assert decode(s.ids[turn.begin : turn.end], skip_special_tokens=True) == turn.reply
            if after is not None:
                assert not any(s.mask[turn.end : after.begin])
                assert decode(s.ids[turn.end : after.begin]) == turn.observation
    tokens = tokens_of(samples)
    logp = roles.policy.logp(tokens).logp
    recorded = torch.tensor([x for s in samples for x, m in zip(s.logp, s.mask, strict=True) if m])
    torch.testing.assert_close(logp[tokens.mask], recorded, atol=2e-5, rtol=0)


def test_samples_of_one_prompt_meet_one_world_and_the_same_seed_repeats(base):
    _, roles, train, samples = played(base)
    again = roles.generate(train[:4], seed=(0, 0), n=2)
    assert [s.ids for s in again] == [s.ids for s in samples]
    assert [s.turns[0].observation for s in samples[::2]] == [s.turns[0].observation for s in samples[1::2]]
    alone = roles.generate(train[1:2], seed=(0, 0), n=2)
    assert [s.ids for s in alone] == [s.ids for s in samples[2:4]]


@pytest.mark.parametrize("name", ["ppo", "grpo", "reinforce", "remax", "a2c", "trpo"])
def test_what_the_environment_said_reaches_no_loss(base, name):
    """Environment tokens' recorded numbers and rewards are changed; no gradient moves."""
    made, roles, train, samples = played(base, name, algorithm__beta=0.1)
    for change in (False, True):
        loop = OnPolicy(made, roles, train, _Batches())  # its baseline moves with every batch
        if change:
            for s in samples:
                s.logp = [x if m else 40.0 for x, m in zip(s.logp, s.mask, strict=True)]
        scores = roles.reward.score(samples)
        _tokens, traj, _ = loop.experience(samples, scores)
        adv = made.algorithm.advantage(traj)
        found = torch.where(traj.mask, adv.adv, 0.0)
        assert (adv.adv[~traj.mask] == 0).all()
        if not change:
            first = found
    torch.testing.assert_close(first, found)
    assert traj.reward[~traj.mask].abs().max() == 0


class _Batches:
    def forever(self):
        while True:
            yield [0]


def test_turn_rewards_stand_at_the_ends_of_turns(base):
    _, roles, _, samples = played(base)
    scores = roles.reward.score(samples)
    for b, s in enumerate(samples):
        ends = [t.end - 1 for t in s.turns]
        assert scores.per_token[b, ends].tolist() == pytest.approx([t.reply.count("a") / 4 for t in s.turns])
        assert float(scores.per_token[b].sum()) == pytest.approx(sum(t.reward for t in s.turns))


def test_discount_per_turn(base):
    made, roles, train, samples = played(
        base, "a2c", algorithm__gamma=0.5, environment__discount_per="turn", algorithm__beta=0.0
    )
    loop = OnPolicy(made, roles, train, _Batches())
    _, traj, _ = loop.experience(samples, roles.reward.score(samples))
    for b, s in enumerate(samples):
        ends = [t.end - 1 for t in s.turns]
        inside = [t for t in range(len(s.ids)) if s.mask[t] and t not in ends]
        assert traj.discount[b, ends].tolist() == [0.5, 0.5, 0.0]
        assert all(traj.discount[b, inside] == 1)


@pytest.mark.parametrize(("cut", "last"), [("end", 0.0), ("bootstrap", 1.0)])
def test_a_turn_limit_truncates_and_keeps_what_was_earned(base, cut, last):
    made, roles, train, samples = played(base, "ppo", environment__max_turns=2, critic__cut=cut, algorithm__beta=0.0)
    assert {s.outcome for s in samples} == {"turn limit"}
    assert not any(s.terminated for s in samples)
    loop = OnPolicy(made, roles, train, _Batches())
    _, traj, _ = loop.experience(samples, roles.reward.score(samples))
    for b, s in enumerate(samples):
        assert float(traj.discount[b, s.turns[-1].end - 1]) == last
        assert float(traj.reward[b].sum()) == pytest.approx(sum(t.reward for t in s.turns), abs=1e-6)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_a_text_environment_trains(base, tmp_path, name):
    made = recipe(name, base, iterations=3)
    rl.run(made)
    seen = rows(tmp_path / "run")
    assert seen[-1]["ratio_gap"] < 1e-4
    assert seen[-1]["episode/done"] == 1
    assert seen[-1]["episode/turns"] == 3
    assert seen[-1]["length/mean"] == seen[-1]["episode/said"] <= 3 * 6  # not what the environment wrote
    assert 0 < seen[0]["held_out/length"] <= 3 * 6
    kept = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [set(t) for t in kept[-1]["turns"]] == [{"said", "heard", "reward"}] * 3
    assert weights(tmp_path / "run" / "model")


def test_it_learns(base, tmp_path):
    made = recipe(
        "rloo", base, iterations=25, rollout__prompts=8, rollout__samples=4, optimizer__lr=2e-2, algorithm__beta=0.0,
        run__eval_every=25,
    )  # fmt: skip
    rl.run(made)
    seen = [row["reward/total"] for row in rows(tmp_path / "run") if "reward/total" in row]
    assert sum(seen[-3:]) / 3 > 3 * (sum(seen[:3]) / 3 + 0.1)


COUNTER = """
class CountingEnv:
    def reset(self, **kwargs) -> str | None:
        self.count = 0
        return " count up"

    def increment(self, step: int) -> int:
        \"\"\"
        Adds to the counter.

        Args:
            step: How much to add.

        Returns:
            The counter's new value.
        \"\"\"
        self.count += step
        return self.count

    def get_reward(self) -> float:
        return float(self.count)
"""
"""A class as TRL's documentation has it, in other words."""


def calling(folder, environment, name, **arguments):
    """A model to which a call is one token more, as likely as any letter, and what is told of the tools another."""
    call = f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
    tokenizer = letters()
    tools = open_environment(EnvironmentConfig(**environment)).tools
    told = with_tool_descriptions([], tools, system_turns=True)[0]["content"]
    tokenizer.add_tokens([call, told])
    tiny_model("llama", vocab=len(tokenizer), scale=0.3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_class_as_trl_takes_it_learns_to_call(base, tmp_path):
    (tmp_path / "counting.py").write_text(COUNTER)
    environment = {"path": f"{tmp_path / 'counting.py'}:CountingEnv", "max_turns": 3, "tell_tools": True}
    changes = {
        "model.path": calling(tmp_path / "model", environment, "increment", step=1), "rollout.max_new_tokens": 2,
        "environment": environment,
    }  # fmt: skip
    made = recipe(
        "rloo", merge(base, changes), iterations=14, rollout__prompts=8, rollout__samples=4, optimizer__lr=4e-2,
        algorithm__beta=0.0, run__eval_every=14,
    )  # fmt: skip
    rl.run(made)
    seen = [row for row in rows(tmp_path / "run") if "episode/turns" in row]
    assert seen[-1]["reward/total"] > seen[0]["reward/total"] + 0.5
    assert seen[-1]["episode/turns"] > seen[0]["episode/turns"]
    assert max(row["ratio_gap"] for row in seen) < 1e-4


def test_functions_as_tools_train(base, tmp_path, worlds):
    environment = {"tools": [f"{worlds}:add"], "max_turns": 3, "tell_tools": True}
    changes = {
        "model.path": calling(tmp_path / "model", environment, "add", a=1, b=2), "rollout.max_new_tokens": 8,
        "environment": environment, "reward.parts": {"l": {"builtin": "length"}},
    }  # fmt: skip
    rl.run(recipe("grpo", merge(base, changes)))
    seen = rows(tmp_path / "run")[-1]
    assert seen["episode/turns"] > 1
    assert seen["ratio_gap"] < 1e-4


def test_gymnasium_trains(base, tmp_path):
    environment = {"gym": "FrozenLake-v1", "actions": ["a", "b", "c", "d"], "max_turns": 4}
    made = merge(base, {"rollout.max_new_tokens": 1})
    made["environment"] = environment | {"args": {"is_slippery": False}, "max_characters": 60}
    rl.run(recipe("grpo", made))
    assert rows(tmp_path / "run")[-1]["episode/turns"] > 1


def test_a_judge_pays_each_turn(base, tmp_path):
    path = tmp_path / "judge.py"
    path.write_text(
        "def vowels(prompts, completions):\n"
        "    return [float('hm' in p or c.count('a')) for p, c in zip(prompts, completions)]\n"
    )
    judge = {"reward": {"vowels": {"function": f"{path}:vowels"}}}
    part = {"function": "steersman.judge.reward:grade_turns", "args": {"judge": judge}}
    values = {**base, "reward": {"parts": {"judge": part, "play": {"environment": "turn", "weight": 0.0}}}}
    _, roles, _, samples = played(values)
    scores = roles.reward.score(samples)
    for b, s in enumerate(samples):
        ends = [t.end - 1 for t in s.turns]
        told, shown = [], s.prompt.text
        for t in s.turns:
            told.append(float("hm" in shown or t.reply.count("a")))
            shown += f"{t.reply}\n{t.observation}\n"
        assert scores.per_token[b, ends].tolist() == told
        assert float(scores.per_token[b].sum()) == sum(told)
    rl.run(recipe("rloo", values, iterations=1))
    assert rows(tmp_path / "run")[-1]["ratio_gap"] < 1e-4


def test_baselines_per_turn(base, tmp_path):
    """Each turn is compared with the same turn of the prompt's other episodes."""
    made, roles, train, samples = played(base, "rloo", environment__baseline_per="turn", algorithm__beta=0.0)
    loop = OnPolicy(made, roles, train, _Batches())
    _, traj, _ = loop.experience(samples, roles.reward.score(samples))
    found = by_turn(made.algorithm.advantage, traj).adv
    for b, s in enumerate(samples):
        other = samples[b ^ 1]
        for k, t in enumerate(s.turns):
            earned, beside = (sum(u.reward for u in x.turns[k:]) for x in (s, other))
            assert found[b, t.begin : t.end].tolist() == pytest.approx(
                [earned - beside] * (t.end - t.begin), abs=1e-6
            )
    rl.run(made)
    assert rows(tmp_path / "run")[-1]["ratio_gap"] < 1e-4


@pytest.mark.parametrize(
    ("name", "why"),
    [("gspo", "one ratio for a whole episode"), ("ppo", "compares no samples"), ("pass-at-k", "best of k whole"),
     ("gfpo", "keeps whole episodes"), ("gdpo", "compares each part of the reward")],
)  # fmt: skip
def test_baselines_per_turn_are_refused_where_there_are_none(base, name, why):
    with pytest.raises(ValidationError, match=why):
        recipe(name, base, environment__baseline_per="turn")


@pytest.mark.parametrize("name", ["ppo", "rloo"])
def test_an_encoder_decoder_trains(base, tmp_path, name):
    """Each turn is a segment of its own; the episode is one all the same."""
    folder = tmp_path / "t5"
    tiny_model("t5", vocab=len(LETTERS), scale=1.0).save_pretrained(folder)
    letters().save_pretrained(folder)
    rl.run(recipe(name, base, model__path=str(folder), iterations=2))
    seen = rows(tmp_path / "run")[-1]
    assert seen["ratio_gap"] < 1e-4
    assert seen["episode/turns"] == 3
