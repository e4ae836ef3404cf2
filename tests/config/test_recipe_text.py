import contextlib

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from steersman.config.load import load_recipe
from steersman.config.recipe_text import load_yaml
from steersman.run.run_config import RunConfig
from steersman.types import SteersmanError

FAULTS = {
    "huge integer": ("run: {seed: " + "9" * 5000 + "}", r"run.seed: the whole number 999999999999\.\.\. is above"),
    "just above": ("seed: 9223372036854775808", "seed: the whole number"),
    "recursive": ("model: &a {path: x, lora: *a}", r"model.lora: it contains itself"),
    "recursive list": ("a: &b [1, *b]", r"a\.1: it contains itself"),
    "unhashable": ("? [a, b]\n: 1\n", "a list or a mapping stands where a key must be"),
    "unhashable below": ("run:\n  ? {a: b}\n  : 1\n", "run: a list or a mapping"),
    "deep": ("a: " + "[" * 60 + "]" * 60, "nested too deeply"),
    "deeper": ("[" * 100_000, "nested too deeply"),
    "half a pair": ('a: ["\\ud83d"]', r"a\.0: a lone surrogate"),
    "laughs": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)),
        "more than 100,000 values",
    ),
    "tag": ("a: !!bool x", "does not fit its tag"),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_what_nothing_can_use_is_named_with_its_key(tmp_path, name):
    text, message = FAULTS[name]
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(SteersmanError, match=rf"recipe.yaml(, line [0-9]+)?: .*{message}"):
        load_recipe(RunConfig, tmp_path / "recipe.yaml")


def test_what_is_within_the_limits():
    assert load_yaml("a: {b: [9223372036854775807, 0x10, -5, 1_000]}\nc: &x [1]\nd: *x\ne: {<<: {f: 1}}\n") == {
        "a": {"b": [2**63 - 1, 16, -5, 1000]}, "c": [1], "d": [1], "e": {"f": 1},
    }  # fmt: skip
    assert load_yaml("") is None


def test_a_huge_number_on_the_command_line():
    with pytest.raises(SteersmanError, match="--seed: the whole number"):
        load_recipe(RunConfig, None, ["--seed", "9" * 100])
    assert load_recipe(RunConfig, None, ["--dir", "9" * 100]).dir == "9" * 100


PIECES = st.sampled_from(
    ["a: ", "- ", "\n", "  ", "[", "]", "{", "}", "&x ", "*x", "? ", ": ", "!!int ", "!!timestamp ", "!!set ", "<<: ",
     "!!binary ", "!!omap ", "9" * 30, "0x", '"\\ud800"', "'", '"', "|", "\0", "2001-01-01", "-", ".inf", "a"]
)  # fmt: skip


@given(st.text(max_size=40) | st.lists(PIECES, max_size=25).map("".join))
def test_any_text_is_a_value_or_a_yaml_error(text):
    with contextlib.suppress(yaml.YAMLError):
        load_yaml(text)
