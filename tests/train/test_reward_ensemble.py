"""Several heads on one trunk: what they share, where they differ, and what is taken off where they do."""

from __future__ import annotations

import pytest
import torch
from letter_models import write_jsonl
from reward_kit import settings
from test_reward_kinds import compare, interrupted, run
from train_kit import merge

from steersman.data import Encoded, EncodedSet, Preference, Row
from steersman.loss.reward import pairwise
from steersman.model import EnsembleModel, load_reward
from steersman.objectives.reward_config import RewardModelConfig
from steersman.objectives.reward_ensemble import EnsembleReward
from steersman.reward import ModelReward
from steersman.train.tally import Tally
from steersman.types import Prompt, Sample, SteersmanError, Tokens


@pytest.fixture
def asked(tmp_path, mini):
    return merge(settings(tmp_path, mini, "preference"), {"train.heads": 3})


def test_it_runs_and_resumes_bit_for_bit_and_is_loaded_back(asked, tmp_path, monkeypatch):
    summary = run(asked)
    assert summary["held_out/disagreement"] > 0
    cut = merge(asked, {"run.dir": str(tmp_path / "cut")})
    interrupted(cut, monkeypatch, 2)
    compare(tmp_path / "run" if (tmp_path / "run").exists() else tmp_path, tmp_path / "cut")
    model = load_reward(summary["model"])
    assert isinstance(model, EnsembleModel)
    heads = model.output.weight
    assert heads.shape[0] == 3
    assert not torch.allclose(heads[0], heads[1], atol=0.1)


def some(count=3):
    tokens = Tokens.from_ids([[3, 4]] * count, [[5 + i, 6, 7] for i in range(count)])
    return tokens, [Sample(Prompt([3, 4], "a"), [5 + i, 6, 7], [0.0] * 3, "eos", "b") for i in range(count)]


def test_what_is_taken_off_is_the_heads_deviation(asked):
    model = load_reward(run(asked)["model"])
    assert isinstance(model, EnsembleModel)
    tokens, samples = some()
    heads = model.outputs(tokens)
    expected = heads.mean(1) - 1.5 * ((heads - heads.mean(1, keepdim=True)) ** 2).mean(1).sqrt()
    reward = ModelReward(model, model.tokenizer, pessimism=1.5)
    torch.testing.assert_close(reward.score(samples).total, expected)
    assert "3 heads, their mean less 1.5 deviations" in reward.describe()
    torch.testing.assert_close(ModelReward(model, model.tokenizer).score(samples).total, model.score(tokens))


def test_a_model_of_one_head_has_nothing_to_be_pessimistic_about(asked):
    model = load_reward(run(merge(asked, {"train.heads": 1}))["model"])
    with pytest.raises(SteersmanError, match=r"no heads that could disagree; train one with .*--train.heads"):
        ModelReward(model, model.tokenizer, pessimism=1.0)


def test_heads_learn_of_pairs_alone(asked, tmp_path, mini):
    thumbs = merge(settings(tmp_path, mini, "feedback"), {"train.heads": 3, "run.dir": str(tmp_path / "x")})
    with pytest.raises(SteersmanError, match="kind feedback: give pairs"):
        run(thumbs)


def objective(asked):
    model = load_reward(run(asked)["model"])
    assert isinstance(model, EnsembleModel)
    data: EncodedSet[Preference] = EncodedSet()
    for i in range(5):
        data.groups.append([Encoded([3, 4], [5 + i + side, 6], [True] * 2) for side in (0, 3)])
        data.examples.append(Preference("x", "a", "b", Row({}, "f", i), agreement=0.5 + i / 8, weight=1.0 + i))
    generator = torch.Generator().manual_seed(0)
    return EnsembleReward(model, data, data, RewardModelConfig(heads=3), 1000, generator)


def test_each_head_learns_of_its_own_draws_and_parts_add_up(asked):
    made = objective(asked)
    rows = list(range(5))
    denominator = made.denominator(rows)
    whole = made.loss(rows, denominator, Tally())
    parts = sum(made.loss([i], denominator, Tally()) for i in rows)
    torch.testing.assert_close(whole, parts)
    model, total, weights = made.module, 0.0, 0.0
    for i in rows:
        pair = made.train.groups[i]
        tokens = Tokens.from_ids([e.prompt for e in pair], [e.response for e in pair])
        score = model.outputs(tokens)
        for k in range(3):
            weight = made.train.examples[i].weight * made.bootstrap_counts[i, k]
            target = score.new_tensor([made.train.examples[i].agreement])
            total = total + weight * pairwise(score[:1, k], score[1:, k], target=target, margin=score.new_zeros(1))[0]
            weights += float(weight)
    torch.testing.assert_close(whole, total / weights)
    assert len({tuple(column) for column in made.bootstrap_counts.T.tolist()}) == 3


def test_a_pessimistic_reward_is_a_recipe_key(asked, tmp_path):
    from train_kit import recipe
    from train_kit import settings as on_policy

    from steersman.verbs import rl

    told = run(asked)
    base = on_policy(tmp_path, asked["model"]["path"])
    base["run"]["dir"] = str(tmp_path / "grpo")
    base["reward"] = {"parts": {"rm": {"model": told["model"], "pessimism": 1.0}}}
    assert rl.run(recipe("grpo", base, iterations=1))["finished"]
    write_jsonl(tmp_path / "none.jsonl", [])
    with pytest.raises(ValueError, match="belong to a model"):
        recipe("grpo", merge(base, {"reward.parts": {"x": {"builtin": "length", "pessimism": 1.0}}}))
