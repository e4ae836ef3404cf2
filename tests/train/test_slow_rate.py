"""A rate for whole models under adapters is told before the run."""

from __future__ import annotations

from typing import Any

import pytest
from letter_models import write_jsonl

from steersman import cli
from steersman.config.load import load_recipe
from steersman.recipe.sections import ADAPTER_RATE, LoraSection, ModelConfig
from steersman.setup.models import slow_rate
from steersman.types import SteersmanError


@pytest.mark.parametrize(("lora", "lr", "told"), [(True, 1e-5, True), (True, 2e-4, False), (False, 1e-5, False)])
def test_it_is_told_for_adapters_alone(lora, lr, told):
    config = ModelConfig(path="m", lora=LoraSection() if lora else None)
    assert (slow_rate(config, lr) is not None) == told


def test_preflight_shows_it(tmp_path, mini, capsys):
    data = write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": f"a{'?' * i}", "chosen": "b", "rejected": "c"} for i in range(4)]
    )
    words = [
        "--data.path",
        str(data),
        "--run.dir",
        str(tmp_path / "run"),
        "--train.batch_size",
        "2",
        "--optimizer.lr",
        "1e-5",
    ]
    assert cli.main(["dpo", "--model.path", str(mini), "--model.lora", "{r: 2}", *words]) == 0
    assert "1e-05 is a rate for whole models" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("verb", ["sft", "dpo", "kto", "reward", "grpo", "distill"])
def test_the_default_rate_goes_by_what_is_trained(verb):
    model: Any = cli.VERBS[verb].recipe_class(None, [])
    words = ["--model.path", "m", "--data.path", "d", "--optimizer.beta2", "0.99"]
    words += {"grpo": ["--reward.parts", "{l: {builtin: length}}"], "distill": ["--teacher.path", "t"]}.get(verb, [])
    whole = load_recipe(model, None, words)
    lora = load_recipe(model, None, [*words, "--model.lora", "{}"])
    given = load_recipe(model, None, [*words, "--model.lora", "{}", "--optimizer.lr", "3e-6"])
    assert [r.optimizer.lr for r in (lora, given)] == [ADAPTER_RATE, 3e-6]
    assert whole.optimizer.lr < ADAPTER_RATE
    assert lora.optimizer.model_copy(update={"lr": 0}) == whole.optimizer.model_copy(update={"lr": 0})


def test_a_method_without_gradient_steps_has_no_rate():
    words = [
        "--model.path",
        "m",
        "--data.path",
        "d",
        "--reward.parts",
        "{l: {builtin: length}}",
        "--model.lora",
        "{}",
    ]
    recipe: Any = load_recipe(cli.VERBS["trpo"].recipe_class(None, []), None, words)
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
    ],
)  # fmt: skip
def test_the_default_rates_of_a_loop_go_by_what_is_trained(verb, words, rates):
    model: Any = cli.VERBS[verb].recipe_class(None, [])
    words = ["--model.path", "m", *words]
    whole = load_recipe(model, None, words).model_dump()
    lora = load_recipe(model, None, [*words, "--model.lora", "{}"]).model_dump()
    given = load_recipe(model, None, [*words, "--model.lora", "{}", f"--{rates[0]}.lr", "3e-6"]).model_dump()
    for key in rates:
        assert at(lora, key)["lr"] == ADAPTER_RATE, key
        assert at(whole, key)["lr"] < ADAPTER_RATE, key
    assert at(given, rates[0])["lr"] == 3e-6


@pytest.mark.parametrize("stages", ["5", "null", "[x]", "[{}]"])
@pytest.mark.parametrize(("verb", "key"), [("arena", "stages"), ("feedback", "then"), ("wheel", "then")])
def test_stages_that_are_none_are_refused_by_their_key(verb, key, stages):
    model: Any = cli.VERBS[verb].recipe_class(None, [])
    with pytest.raises(SteersmanError, match=rf"{key}(\.0)?: .* was given; allowed: "):
        load_recipe(model, None, ["--model.path", "m", "--model.lora", "{}", f"--{key}", stages])


def at(values: dict[str, Any], key: str) -> dict[str, Any]:
    for name in key.split("."):
        values = values[name]
    return values
