"""The rate follows what is trained, adapters of a recipe or a folder or all weights, and is told before the run."""

from __future__ import annotations

from typing import Any

import pytest
from letter_models import write_jsonl

from steersman import cli, verb_table
from steersman.config.load import load_recipe
from steersman.flywheel.stages import refresh_values
from steersman.model import LoraConfig, load_policy, load_scalar, save
from steersman.recipe.sections import ADAPTER_RATE
from steersman.types import SteersmanError

SAVED = LoraConfig(r=2, alpha=6.0, targets=["q_proj", "v_proj"], rslora=True)


@pytest.fixture
def adapters(mini, tmp_path) -> str:
    """A policy's adapters, saved alone."""
    return str(save(load_policy(mini, lora=SAVED), None, tmp_path / "adapters", merged=False))


@pytest.fixture
def judge(mini, tmp_path) -> str:
    """A reward model's adapters and head, saved alone."""
    scalar = load_scalar(mini)
    scalar.adapt(SAVED)
    return str(save(scalar, None, tmp_path / "judge", merged=False))


ROWS = {
    "sft": {"completion": "b"}, "dpo": {"chosen": "b", "rejected": "c"}, "reward": {"chosen": "b", "rejected": "c"},
    "grpo": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "start", "words", "said"),
    [
        ("dpo", "mini", ["--model.lora", "{r: 2}", "--optimizer.lr", "1e-5"], "1e-05 is a rate for whole models"),
        ("dpo", "mini", ["--model.lora", "{r: 2}"], "0.0005, for adapters"),
        ("dpo", "mini", [], "1e-05, for all weights"),
        ("dpo", "adapters", [], "0.0005, for adapters"),
        ("dpo", "adapters", ["--model.lora", "null"], "0.0005, for adapters"),
        ("dpo", "adapters", ["--optimizer.lr", "2e-5"], "2e-05 is a rate for whole models"),
        ("sft", "adapters", [], "0.0005, for adapters"),
        ("grpo", "adapters", [], "0.0005, for adapters"),
        ("reward", "judge", [], "0.0005, for adapters"),
        ("reward", "mini", ["--optimizer.lr", "1e-5", "--model.lora", "{r: 2}"], "1e-05 is a rate for whole models"),
    ],
)
def test_preflight_says_what_the_rate_is_for(verb, start, words, said, tmp_path, request, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"a{'?' * i}", **ROWS[verb]} for i in range(4)])
    words = ["--data.path", str(data), "--run.dir", str(tmp_path / "run"), *words]
    if verb == "grpo":
        words += ["--reward.parts", "{l: {builtin: length}}", "--iterations", "1", "--rollout.prompts", "2"]
        words += ["--rollout.samples", "4", "--rollout.max_new_tokens", "4"]
    else:
        words += ["--train.batch_size", "2", "--train.max_steps", "1"]
    assert cli.main([verb, "--model.path", str(request.getfixturevalue(start)), *words]) == 0
    assert f"optimizer.lr {said}" in " ".join(capsys.readouterr().out.split())


VERBS = ["sft", "dpo", "kto", "reward", "grpo", "trpo", "distill"]
MORE = {name: ["--reward.parts", "{l: {builtin: length}}"] for name in ("grpo", "trpo")}
MORE["distill"] = ["--teacher.path", "t"]


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "trpo"])
def test_the_default_rate_goes_by_what_is_trained(verb):
    model: Any = verb_table.VERBS[verb].recipe_class(None, [])
    words = ["--model.path", "m", "--data.path", "d", "--optimizer.beta2", "0.99", *MORE.get(verb, [])]
    whole = load_recipe(model, None, words)
    lora = load_recipe(model, None, [*words, "--model.lora", "{}"])
    given = load_recipe(model, None, [*words, "--model.lora", "{}", "--optimizer.lr", "3e-6"])
    assert [r.optimizer.lr for r in (lora, given)] == [ADAPTER_RATE, 3e-6]
    assert whole.optimizer.lr < ADAPTER_RATE
    assert lora.optimizer.model_copy(update={"lr": 0}) == whole.optimizer.model_copy(update={"lr": 0})


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_of_adapters_is_trained_as_what_it_is(verb, adapters, judge):
    """The recipe then has them as `model.lora`, so that all that asks whether adapters are trained knows it."""
    model: Any = verb_table.VERBS[verb].recipe_class(None, [])
    path = judge if verb == "reward" else adapters
    words = ["--model.path", path, "--data.path", "d", *MORE.get(verb, [])]
    recipe = load_recipe(model, None, words)
    lora = recipe.model.lora
    assert (lora.r, lora.alpha, lora.rslora, lora.dora, lora.dropout, lora.train_whole) == (2, 6, True, False, 0, [])
    assert {name.rsplit(".", 1)[-1] for name in lora.targets} == {"q_proj", "v_proj"}
    assert recipe.optimizer.lr == (1e-4 if verb == "trpo" else ADAPTER_RATE)
    assert load_recipe(model, None, [*words, "--model.lora", "{r: 7}"]).model.lora.alpha == 14


def test_a_reward_model_of_adapters_is_evaluated_without_training_them(judge):
    words = ["--model.path", judge, "--data.path", "d", "--stage", "evaluate"]
    recipe: Any = load_recipe(verb_table.VERBS["reward"].recipe_class(None, []), None, words)
    assert recipe.model.lora is None


@pytest.mark.parametrize("broken", ["", "[]", '{"peft_type": "LORA", "r": "x"}', '{"peft_type": "IA3"}'])
def test_settings_of_adapters_that_can_not_be_read_are_left_to_loading(broken, tmp_path):
    (tmp_path / "adapter_config.json").write_text(broken)
    words = ["--model.path", str(tmp_path), "--data.path", "d"]
    recipe: Any = load_recipe(verb_table.VERBS["sft"].recipe_class(None, []), None, words)
    assert recipe.model.lora is None


def test_a_method_without_gradient_steps_has_no_rate():
    words = ["--model.path", "m", "--data.path", "d", *MORE["trpo"], "--model.lora", "{}"]
    recipe: Any = load_recipe(verb_table.VERBS["trpo"].recipe_class(None, []), None, words)
    assert recipe.optimizer == type(recipe.optimizer)()


JUDGED = ["--data.path", "d", "--judge.reward", "{l: {builtin: length}}"]


@pytest.mark.parametrize(
    ("verb", "words", "rates"),
    [
        ("best-of-n", JUDGED, ["optimizer"]),
        ("online-dpo", JUDGED, ["optimizer"]),
        ("arena", [*JUDGED, "--opponents", "{o: m}"],
         ["sft.optimizer", "dpo.optimizer", "ppo.optimizer", "ppo.reward_optimizer"]),
        ("arena", [*JUDGED, "--opponents", "{o: m}", "--stages", "[dpo]"], ["dpo.optimizer"]),
        ("feedback", ["--data.path", "d", "--then", "[sft, kto]"], ["sft.optimizer", "kto.optimizer"]),
        ("feedback", ["--data.path", "d", "--then", "[kto]"], ["kto.optimizer"]),
        ("wheel", ["--judgements.folder", "d"], ["dpo.optimizer"]),
        ("wheel", ["--judgements.folder", "d", "--then", "[sft, ppo]"],
         ["sft.optimizer", "ppo.optimizer", "ppo.reward_optimizer"]),
        ("best-of-n",
         ["--data.path", "d", "--judge.reward", "{l: {model: r}}", "--watch", "{g: {builtin: length}}",
          "--refresh.by", "g"],
         ["optimizer", "refresh.optimizer"]),
        ("grue", [], ["supervised.optimizer", "rl.optimizer"]),
    ],
)  # fmt: skip
def test_the_default_rates_of_a_loop_go_by_what_is_trained(verb, words, rates, adapters):
    model: Any = verb_table.VERBS[verb].recipe_class(None, [])
    whole = load_recipe(model, None, ["--model.path", "m", *words]).model_dump()
    lora = load_recipe(model, None, ["--model.path", "m", *words, "--model.lora", "{}"]).model_dump()
    saved = load_recipe(model, None, ["--model.path", adapters, *words]).model_dump()
    given = load_recipe(model, None, ["--model.path", adapters, *words, f"--{rates[0]}.lr", "3e-6"]).model_dump()
    for key in rates:
        assert at(lora, key)["lr"] == at(saved, key)["lr"] == ADAPTER_RATE, key
        assert at(whole, key)["lr"] < ADAPTER_RATE, key
    assert at(given, rates[0])["lr"] == 3e-6
    # what a later round trains is saved whole, and gets new adapters of the same kind
    assert saved["model"]["lora"]["r"] == 2


def test_a_judge_of_adapters_is_refreshed_as_adapters(judge):
    recipe_class: Any = verb_table.VERBS["best-of-n"].recipe_class(None, [])
    words = ["--model.path", "m", "--data.path", "d", "--judge.reward", f"{{l: {{model: {judge}}}}}"]
    words += ["--watch", "{g: {builtin: length}}", "--refresh.by", "g"]
    recipe = load_recipe(recipe_class, None, words)
    assert recipe.refresh.optimizer.lr == ADAPTER_RATE
    assert recipe.optimizer.lr < ADAPTER_RATE
    assert recipe.model.lora is None
    values = refresh_values(recipe, "a later one, whole", ["f"])
    assert values["model"]["lora"]["r"] == 2
    assert values["model"]["path"] == "a later one, whole"


@pytest.mark.parametrize("stages", ["5", "null", "[x]", "[{}]"])
@pytest.mark.parametrize(("verb", "key"), [("arena", "stages"), ("feedback", "then"), ("wheel", "then")])
def test_stages_that_are_none_are_refused_by_their_key(verb, key, stages):
    model: Any = verb_table.VERBS[verb].recipe_class(None, [])
    with pytest.raises(SteersmanError, match=rf"{key}(\.0)?: .* was given; allowed: "):
        load_recipe(model, None, ["--model.path", "m", "--model.lora", "{}", f"--{key}", stages])


def at(values: dict[str, Any], key: str) -> dict[str, Any]:
    for name in key.split("."):
        values = values[name]
    return values
