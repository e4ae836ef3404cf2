"""Recipes: what is read, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator
from rich.console import Console

from steersman.config.dump import dump_recipe
from steersman.config.help import default_text, help_table
from steersman.config.load import load_recipe
from steersman.config.sections import Section
from steersman.types import SteersmanError


class Optim(Section):
    """How weights move."""

    lr: float = Field(1e-3, gt=0, description="learning rate")
    warmup: int = Field(0, ge=0, description="updates of warm-up")


class Part(Section):
    name: str = Field(description="which reward")
    weight: float = Field(1.0, description="its share of the sum")


class Batch(Section):
    prompts: int = Field(8, gt=0, description="prompts per iteration")
    micro_batch: int = Field(4, gt=0, description="rows in memory at once")

    @model_validator(mode="after")
    def _divides(self) -> Batch:
        if self.prompts % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} does not divide prompts {self.prompts}")
        return self


class Recipe(Section):
    model: str = Field(description="path or hub name")
    stop: str | None = Field(None, description="stop string")
    quiet: bool = Field(False, description="print less")
    mode: Literal["on", "off"] = Field("on", description="a word that YAML 1.1 takes for a boolean")
    folder: Path = Field(Path("runs"), description="where to")
    train: Optim = Field(Optim(lr=1e-4), description="the actor's optimiser")
    critic: Optim | None = Field(None, description="the critic's optimiser")
    batch: Batch = Field(Batch(), description="sizes")
    parts: list[Part] = Field([], description="weighted rewards")
    names: list[str] = Field([], description="names")
    own: dict[str, str] = Field({}, description="names of the user's")
    shares: dict[str, float] = Field({}, description="a number for each name of the user's")
    by_name: dict[str, Part] = Field({}, description="parts by name")
    anything: dict[str, Any] = Field({}, description="arguments of something else")


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path: Path | None, *overrides: str) -> str:
    with pytest.raises(SteersmanError) as error:
        load_recipe(Recipe, path, ["--model=m", *overrides])
    return str(error.value)


def test_file_then_overrides_and_the_recipe_class_keeps_its_own_defaults(recipe):
    path = recipe("model: base\ntrain:\n  warmup: 5\ncritic:\nmode: off\n")
    r = load_recipe(Recipe, path, ["--train.warmup", "7", "--critic.lr=3e-4", "--quiet", "--batch.micro-batch", "2"])
    assert r.train == Optim(lr=1e-4, warmup=7)  # 1e-4 is the recipe's default, not Optim's own 1e-3
    assert r.critic == Optim(lr=3e-4)
    assert r.quiet is True
    assert r.mode == "off"
    assert r.batch.micro_batch == 2


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", ".0001", "0.0001", "1e-04"])
def test_scientific_notation_is_a_number_in_file_and_override(recipe, text):
    assert load_recipe(Recipe, recipe(f"model: m\ntrain: {{lr: {text}}}"), []).train.lr == 1e-4
    assert load_recipe(Recipe, None, ["--model=m", f"--train.lr={text}"]).train.lr == 1e-4


def test_text_fields_take_what_was_typed(recipe):
    for text in [
        "{prompt} answer",
        "a: b",
        "12:30",
        "no",
        "2026-01-02",
        "010",
        "# x",
        "[x",
        "module:function",
    ]:
        assert load_recipe(Recipe, None, ["--model=m", "--stop", text]).stop == text
    assert load_recipe(Recipe, None, ["--model=m", "--stop", r'"\n\n"']).stop == "\n\n"
    assert load_recipe(Recipe, None, ["--model=m", "--stop", "null"]).stop is None
    assert load_recipe(Recipe, None, ["--model=m", "--names", "[a, b]"]).names == ["a", "b"]


def test_dashes_stand_for_underscores_in_names_of_fields_and_not_in_the_users_own(recipe):
    path = recipe("model: m\nshares: {r-3f: 1.0}\nby_name: {a-b: {name: x}}\n")
    taken = load_recipe(
        Recipe,
        path,
        ["--shares.r-3f", "0", "--own.my-prompt", "x", "--by-name.a-b.weight=2", "--anything.x-y.z-0", "1",
         "--batch.micro-batch", "2"],
    )  # fmt: skip
    assert taken.shares == {"r-3f": 0.0}
    assert taken.own == {"my-prompt": "x"}
    assert taken.by_name == {"a-b": Part(name="x", weight=2)}
    assert taken.anything == {"x-y": {"z-0": 1}}
    assert taken.batch.micro_batch == 2
    assert "--by_name.a-b.wei_ght: unknown key" in refusal(path, "--by_name.a-b.wei-ght", "2")


def test_text_in_a_recipe_is_the_text_as_it_is_written(recipe):
    text = (
        "model: 007\nstop: true\nfolder: 0012\nnames: [1e3, 0x1F, 2.50, ~]\nown: {010: 1_0}\nshares: {0e1: 5}\n"
        "parts: [&part {name: 1.0, weight: 2}, {<<: *part, weight: 3}]\nby_name: {x: {<<: [{name: 08}]}}\n"
    )
    taken = load_recipe(Recipe, recipe(text.replace(", ~", "")))
    assert (taken.model, taken.stop, taken.folder) == ("007", "true", Path("0012"))
    assert taken.names == ["1e3", "0x1F", "2.50"]
    assert (taken.own, taken.shares) == ({"010": "1_0"}, {"0e1": 5.0})
    assert taken.parts == [Part(name="1.0", weight=2), Part(name="1.0", weight=3)]
    assert taken.by_name["x"].name == "08"
    assert "names.3: None was given" in refusal(recipe(text))
    assert load_recipe(Recipe, recipe("model: m\nstop: null")).stop is None
    assert load_recipe(Recipe, recipe(dump_recipe(taken))) == taken


def test_text_below_mappings_and_lists_is_taken_as_typed():
    taken = load_recipe(
        Recipe, None,
        ["--model", "007", "--folder", "0012", "--own.x", "1e3", "--parts", "[{name: a}]", "--parts.0.name", "08",
         "--names", "[007, 1.50]", "--stop", " a # b\nc"],
    )  # fmt: skip
    assert (taken.model, taken.folder, taken.own) == ("007", Path("0012"), {"x": "1e3"})
    assert (taken.parts[0].name, taken.names) == ("08", ["007", "1.50"])
    assert taken.stop == " a # b\nc"
    assert "--own.x: a value is missing" in refusal(None, "--own.x")


def test_unknown_key_names_the_nearest(recipe):
    assert "train.warmup" in refusal(recipe("train: {warmpu: 3}"))
    assert "did you mean train?" in refusal(None, "--trian.lr", "3")
    assert "--trian" in refusal(None, "--trian.lr", "3")
    assert "did you mean parts.0.weight?" in refusal(recipe("parts: [{name: a, wieght: 3}]"))
    assert "known here: train.lr, train.warmup" in refusal(recipe("train: {zzzzqqq: 3}"))


def test_known_key_in_the_wrong_section_is_told_where_it_belongs(recipe):
    message = refusal(recipe("lr: 0.1"))
    assert "`lr` belongs under `train` or `critic`: write train.lr or critic.lr" in message
    assert "`prompts` belongs under `batch`" in refusal(None, "--train.prompts=3")
    assert "`quiet` belongs under the top level" in refusal(recipe("train: {quiet: true}"))


@pytest.mark.parametrize("given", ["10%", "1.5", "-1"])
def test_a_value_that_is_none_of_several_types_is_told_once_with_the_limits_of_each(given):
    class Held(Section):
        out: Annotated[float, Field(ge=0, lt=1)] | Annotated[int, Field(ge=0)] = Field(default=0, description="rows")

    with pytest.raises(SteersmanError) as told:
        load_recipe(Held, None, ["--out", given])
    assert str(told.value).endswith("was given; allowed: number >= 0 < 1 or whole number >= 0")
    assert str(told.value).count("was given") == 1


def test_values_out_of_bounds_name_file_key_given_and_allowed(recipe):
    path = recipe("train: {lr: -0.1}")
    assert refusal(path) == f"recipe {path}: train.lr: -0.1 was given; allowed: number > 0"
    assert refusal(None, "--train.warmup", "1.5") == (
        "settings: --train.warmup: 1.5 was given; allowed: whole number >= 0"
    )
    assert "one of on, off" in refusal(recipe("mode: maybe"))
    assert "allowed: a section with lr, warmup" in refusal(recipe("train: 3"))
    assert "number > 0" in refusal(recipe("train: {lr: .nan}"))
    assert "micro_batch 3 does not divide prompts 8" in refusal(recipe("batch: {micro_batch: 3}"))


def test_a_list_is_told_as_it_is_written_and_a_missing_bracket_is_seen():
    assert refusal(None, "--names", "Once upon") == (
        "settings: --names: 'Once upon' was given; allowed: list of text, written '[one, two]'"
    )
    for key, text in [("names", "[a, b"), ("train", "{lr: 3"), ("parts", "[{weight: 'x}]")]:
        assert refusal(None, f"--{key}", text).startswith(f"--{key}: {text!r} can not be read; is a bracket or")
    taken = load_recipe(Recipe, None, ["--model", "[a, b", "--stop", "{", "--folder", "a: b: c"])
    assert (taken.model, taken.stop, taken.folder) == ("[a, b", "{", Path("a: b: c"))


def test_all_problems_come_together(recipe):
    message = refusal(recipe("lr: 1\ntrain: {lr: 0, warmup: x}\nquiet: 5"), "--critic.lr", "-1")
    assert "5 problems" in message
    for part in ["lr: unknown key", "train.lr: 0", "train.warmup: 'x'", "quiet: 5", "--critic.lr: -1"]:
        assert part in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "section:"),
        ("model: a\nmodel: b", "`model` stands twice"),
    ],
)
def test_files_that_are_no_recipe(recipe, text, said):
    assert said in refusal(recipe(text))


def test_a_data_file_in_the_place_of_a_recipe_is_told_its_flag():
    class Data(Section):
        path: str = Field(description="rows")

    class Reads(Section):
        data: Data

    with pytest.raises(SteersmanError, match=r"recipe a/b\.jsonl: .*; give it by --data\.path a/b\.jsonl$"):
        load_recipe(Reads, Path("a/b.jsonl"))
    with pytest.raises(SteersmanError, match=r"recipe b\.CSV: .* a recipe is a YAML file$"):
        load_recipe(Data, Path("b.CSV"))


def test_missing_file_missing_key_missing_value(tmp_path):
    assert "there is no such file" in refusal(tmp_path / "none.yaml")
    with pytest.raises(SteersmanError, match=r"model: missing \(path or hub name\).*--model VALUE"):
        load_recipe(Recipe, None, [])
    assert "--train.lr: a value is missing" in refusal(None, "--train.lr")
    assert "--train.lr: a value is missing" in refusal(None, "--train.lr", "--quiet")
    assert "stray: not understood here" in refusal(None, "--quiet=true", "stray")
    assert "--train.lr.x" in refusal(None, "--train.lr=1", "--train.lr.x=3")


def test_a_required_section_is_missing_key_by_key():
    class Data(Section):
        path: str = Field(description="file")
        limit: int = Field(3, description="rows")

    class Outer(Section):
        data: Data

    with pytest.raises(SteersmanError, match=r"^settings: data\.path: missing \(file\).*--data\.path VALUE$"):
        load_recipe(Outer)
    assert load_recipe(Outer, None, ["--data.path", "x"]).data == Data(path="x")


def test_dump_reads_back_equal_and_carries_the_meanings(recipe):
    first = load_recipe(
        Recipe,
        None,
        ["--model", "'1e-4'", "--stop", "no: {", "--train.lr=1e-7",
         "--parts", "[{name: 'true'}, {name: '010'}]", "--names", "['1e5', ~x, 'null', 'ü\n']", "--mode=off"],
    )  # fmt: skip
    text = dump_recipe(first)
    assert load_recipe(Recipe, recipe(text), []) == first
    assert "# learning rate" in text
    assert first.model == "1e-4"
    assert dump_recipe(load_recipe(Recipe, recipe(text), [])) == text


def test_sections_are_frozen():
    with pytest.raises(ValidationError):
        Optim().lr = 3.0


def test_help_shows_every_key_with_the_recipes_defaults():
    console = Console(width=120, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(help_table(Recipe))
    text = capture.get()
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip().startswith("--")}
    assert "required" in rows["--model"]
    assert "0.0001" in rows["--train.lr"]
    assert "number > 0" in rows["--train.lr"]
    assert "learning rate" in rows["--critic.lr"]
    assert "0.001" in rows["--critic.lr"]


def test_a_default_of_several_lines_is_told_on_one():
    told = {"\n\nso {answer}\n": '"\\n\\nso {answer}\\n"', "": '""', "a b": "a b", "é": "é"}
    assert {text: default_text(text) for text in told} == told
