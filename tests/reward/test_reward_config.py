import pytest
import torch
from reward_samples import make_samples

from steersman.config.dump import dump_recipe
from steersman.config.load import load_recipe
from steersman.config.sections import Section
from steersman.reward import RewardConfig, ScoreShaping, build_reward
from steersman.types import SteersmanError


class Recipe(Section):
    reward: RewardConfig = RewardConfig()


def test_a_recipe_builds_a_weighted_sum(tmp_path):
    (tmp_path / "my_reward.py").write_text(
        "def short(prompts, completions, cut=1):\n    return [-cut] * len(prompts)\n"
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"reward:\n  parts:\n    words: {{builtin: length, weight: 0.5}}\n"
        f"    right: {{builtin: exact_match, columns: {{answer: solution}}}}\n"
        f"    short: {{function: '{tmp_path}/my_reward.py:short', args: {{cut: 2}}}}\n"
    )
    recipe = load_recipe(Recipe, path, ["--reward.parts.words.weight", "2"])
    scores = build_reward(recipe.reward, tokenizer=None).score(make_samples(["a b", "c"], [{"solution": "A B"}] * 2))
    assert scores.total.tolist() == [2 * 2 + 1 - 2, 2 * 1 + 0 - 2]
    assert list(scores.parts) == ["words", "right", "short"]
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(Recipe, again) == recipe


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("{}", "exactly one of model, function, builtin, metric, environment; none given"),
        ("{model: m, builtin: length}", "model and builtin given"),
        ("{builtin: vader}", "no builtin reward 'vader'"),
        ("{builtin: lenght}", "did you mean length"),
        ("{model: m, args: {a: 1}}", "args and columns belong to a function"),
        ("{builtin: length, wieght: 2}", "wieght"),
        ("{builtin: length, weight: .nan}", "weight"),
    ],
)
def test_a_wrong_part_is_named(tmp_path, part, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"reward:\n  parts:\n    mine: {part}\n")
    with pytest.raises(SteersmanError, match=message) as caught:
        load_recipe(Recipe, path)
    assert "mine" in str(caught.value)


def test_no_parts_and_unknown_settings_are_refused():
    with pytest.raises(SteersmanError, match="no reward given"):
        build_reward(RewardConfig(), tokenizer=None)
    config = RewardConfig.model_validate({"parts": {"x": {"builtin": "length", "args": {"targte": 3}}}})
    with pytest.raises(SteersmanError, match=r"reward 'x': 'targte' is not a parameter.*target"):
        build_reward(config, tokenizer=None)


def test_scores_are_shaped_in_the_stated_order_and_resume():
    config = RewardConfig(normalise=True, clip=1.0, missing_eos_penalty=2.0, overlong_buffer=10)
    shape = ScoreShaping(config)
    raw, ended, length = (
        torch.tensor([0.0, 4.0, 2.0, 2.0]),
        torch.tensor([True, True, False, True]),
        torch.tensor([5, 5, 20, 15]),
    )
    shaped, stats = shape(raw, ended, length, max_length=20)
    assert shaped.tolist() == pytest.approx([-1.0, 1.0, 0.0 - 2.0 - 1.0, 0.0 - 0.5])  # std is sqrt 2, cut to 1
    assert stats["score/mean"] == 2
    resumed = ScoreShaping(config)
    resumed.load_state_dict(shape.state_dict())
    assert torch.equal(shape(raw, ended, length, 20)[0], resumed(raw, ended, length, 20)[0])


def test_defaults_leave_scores_alone():
    raw = torch.tensor([1.0, -3.0])
    shaped, _ = ScoreShaping(RewardConfig())(raw, torch.tensor([True, False]), torch.tensor([3, 3]), 3)
    assert torch.equal(shaped, raw)
