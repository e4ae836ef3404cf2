import math

import numpy as np
import pytest
import torch
from reward_samples import make_samples

from steersman.reward.core import CallableReward, WeightedSum
from steersman.types import SteersmanError


def word_count(prompts, completions):
    return [len(c.split()) for c in completions]


def test_gets_texts_and_only_the_columns_it_accepts():
    seen = {}

    def reward(prompts, completions, answer, samples, scale=2.0):
        seen.update(prompts=prompts, completions=completions, answer=answer, samples=samples, scale=scale)
        return [1, 2]

    samples = make_samples(["x y", "z"], [{"answer": "A", "other": 1}, {"answer": "B", "other": 2}])
    scores = CallableReward(reward).score(samples)
    assert scores.total.tolist() == [1.0, 2.0]
    assert scores.total.dtype == torch.float32
    assert seen == {
        "prompts": ["prompt 0", "prompt 1"], "completions": ["x y", "z"], "answer": ["A", "B"],
        "samples": samples, "scale": 2.0,
    }  # fmt: skip


def test_double_star_gets_every_column_and_missing_cells_are_none():
    seen = {}

    def reward(completions, **columns):
        seen.update(columns)
        return [0.0] * len(completions)

    CallableReward(reward, args={"alpha": 3}).score(make_samples(["x", "y"], [{"a": 1}, {"a": 2, "b": 5}]))
    assert seen == {"prompts": ["prompt 0", "prompt 1"], "a": [1, 2], "b": [None, 5], "alpha": 3}


def test_other_parameter_names_are_filled_by_position_and_columns_are_renamed():
    def reward(questions, replies, gold):
        return [float(q.startswith("prompt") and r == g) for q, r, g in zip(questions, replies, gold, strict=True)]

    samples = make_samples(["x", "y"], [{"solution": "x"}, {"solution": "n"}])
    assert CallableReward(reward, columns={"gold": "solution"}).score(samples).total.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "values",
    [[1.5, True], (1.5, 1), torch.tensor([1.5, 1.0]), np.array([1.5, 1]), [np.float32(1.5), torch.tensor(1)]],
)
def test_every_kind_of_number_is_taken(values):
    assert CallableReward(lambda prompts, completions: values).score(make_samples(["x", "y"])).total.tolist() == [
        1.5,
        1,
    ]


def test_per_token_lists_fill_per_token_and_sum_to_the_total():
    samples = make_samples(["x y", "z"])  # 3 and 2 tokens
    scores = CallableReward(lambda prompts, completions: [[1, 2, 4], torch.tensor([8.0, 16.0])]).score(samples)
    assert scores.per_token.tolist() == [[1, 2, 4], [8, 16, 0]]
    assert scores.total.tolist() == [7, 24]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "returned 1 values for 2 completions"),
        ([1.0, 2.0, 3.0], "returned 3 values for 2"),
        ([0.0, math.nan], r"gave nan for sample 1 \(prompt: 'prompt 1', completion: 'z'\)"),
        ([-math.inf, 0.0], "gave -inf for sample 0"),
        ([0.0, None], "gave NoneType 'None' for sample 1"),
        ([0.0, "1"], "gave str '1' for sample 1"),
        (None, "returned NoneType"),
        (3.0, "returned float"),
        ({"a": 1}, "returned dict"),
        (torch.tensor(3.0), "returned float"),
        ([[1, 2, 3], 1.0], "gave float for sample 1"),
        ([[1, 2], [1, 2]], "gave 2 values for sample 0, which has 3 response tokens"),
        ([[1, 2, math.nan], [1, 2]], "gave nan for sample 0, token 2"),
    ],
)
def test_wrong_returns_are_named(values, message):
    with pytest.raises(SteersmanError, match=f"reward 'mine': {message}"):
        CallableReward(lambda prompts, completions: values, "mine").score(make_samples(["x y", "z"]))


def test_a_raising_function_is_named_with_its_prompt_and_cause():
    def reward(prompts, completions):
        return [1 / 0]

    with pytest.raises(SteersmanError, match=r"reward 'reward'.*ZeroDivisionError.*'prompt 0'") as caught:
        CallableReward(reward).score(make_samples(["x"]))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_missing_columns_and_unknown_args_are_refused():
    def reward(prompts, completions, answer, scale=1.0):
        return [0.0]

    with pytest.raises(SteersmanError, match=r"needs the column 'answer'.*it has: response"):
        CallableReward(reward).score(make_samples(["x"], [{"response": 1}]))
    with pytest.raises(SteersmanError, match=r"'scael' is not a parameter.*answer, scale"):
        CallableReward(reward, args={"scael": 2})
    with pytest.raises(SteersmanError, match="needs the column 'gone'"):
        CallableReward(reward, columns={"answer": "gone"}).score(make_samples(["x"], [{"answer": 1}]))


def test_loads_functions_from_files_and_modules(tmp_path, monkeypatch):
    (tmp_path / "my_polite_rewards.py").write_text(
        "limit = 3\ndef politeness(prompts, completions):\n    return [float('please' in c) for c in completions]\n"
    )
    samples = make_samples(["please go", "go"])
    assert CallableReward(f"{tmp_path}/my_polite_rewards.py:politeness").score(samples).total.tolist() == [1, 0]
    monkeypatch.chdir(tmp_path)
    reward = CallableReward("my_polite_rewards:politeness")
    assert reward.score(samples).total.tolist() == [1, 0]
    assert reward.name == "politeness"
    with pytest.raises(SteersmanError, match="has no 'politness'; did you mean politeness"):
        CallableReward("my_polite_rewards:politness")
    with pytest.raises(SteersmanError, match="'limit' is int and can't be called"):
        CallableReward("my_polite_rewards:limit")


def test_functions_that_cant_be_imported_are_named(tmp_path):
    broken = tmp_path / "broken_reward.py"
    broken.write_text("import a_module_that_is_not_there\n")
    with pytest.raises(SteersmanError, match=r"ModuleNotFoundError.*a_module_that_is_not_there") as caught:
        CallableReward(f"{broken}:f")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    with pytest.raises(SteersmanError, match="there is no file"):
        CallableReward(f"{tmp_path}/none.py:f")
    with pytest.raises(SteersmanError, match="there is no module no_such_module_here"):
        CallableReward("no_such_module_here:f")
    with pytest.raises(SteersmanError, match="write it as module:function"):
        CallableReward("just_a_name")


def test_weighted_sum_logs_parts_before_their_weights():
    samples = make_samples(["a b c", "d"])
    both = WeightedSum(
        {"words": (0.5, CallableReward(word_count)), "one": (-2.0, CallableReward(lambda p, c: [1.0] * len(c), "k"))}
    )
    scores = both.score(samples)
    assert scores.total.tolist() == [0.5 * 3 - 2, 0.5 - 2]
    assert {k: v.tolist() for k, v in scores.parts.items()} == {"words": [3, 1], "one": [1, 1]}
    assert scores.per_token is None
    assert "0.5 x words" in both.describe()


def test_weighted_sum_of_token_and_response_rewards():
    samples = make_samples(["a b", "d"])  # 3 and 2 tokens
    tokens = CallableReward(lambda p, c: [[1, 0, 0], [0, 1]], "t")
    scores = WeightedSum({"t": (2.0, tokens), "words": (1.0, CallableReward(word_count))}).score(samples)
    assert scores.per_token.tolist() == [[2, 0, 2], [0, 3, 0]]
    assert torch.equal(scores.per_token.sum(1), scores.total)


def test_a_sum_needs_parts_and_finite_weights():
    with pytest.raises(SteersmanError, match="no part"):
        WeightedSum({})
    with pytest.raises(SteersmanError, match="'a': the weight is nan"):
        WeightedSum({"a": (math.nan, CallableReward(word_count))})


def test_a_function_may_say_in_words_what_it_found():
    def checked(prompts, completions):
        said = [{"score": 0.0, "feedback": "too short"}, 1.0, {"score": 2, "feedback": None}]
        return said[: len(completions)]

    def counted(prompts, completions, samples):
        return [{"score": [1.0] * len(s.ids), "feedback": f"{len(s.ids)} ids"} for s in samples]

    samples = make_samples(["x", "y z", "w"])
    scores = CallableReward(checked).score(samples)
    assert scores.total.tolist() == [0, 1, 2]
    assert scores.feedback == ["too short", "", ""]
    assert scores.of([2, 0]).feedback == ["", "too short"]
    per_token = CallableReward(counted).score(samples)
    assert per_token.total.tolist() == [2, 3, 2]
    parts = {"a": (1.0, checked), "b": (2.0, counted), "c": (1.0, word_count)}
    both = WeightedSum({name: (w, CallableReward(f)) for name, (w, f) in parts.items()}).score(samples)
    assert both.feedback == ["too short\n2 ids", "3 ids", "2 ids"]
    assert both.total.tolist() == [5, 9, 7]
    assert CallableReward(word_count).score(samples).feedback is None


@pytest.mark.parametrize("value", [{"score": 1.0}, {"score": 1, "feedback": 3}, {"score": 1, "feedback": "", "x": 2}])
def test_feedback_in_another_form_is_refused(value):
    with pytest.raises(
        SteersmanError, match=r"'checked': gave .* for sample 1 \(prompt: 'prompt 1', .*\); return a number"
    ):
        CallableReward(lambda prompts, completions: [1.0, value], "checked").score(make_samples(["x", "y"]))
