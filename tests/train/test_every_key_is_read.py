"""A key that a verb accepts is a key that it reads: runs are watched for the settings that they look at."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from letter_models import save_mini, write_jsonl
from train_kit import merge

from steersman.cli import main
from steersman.config.load import load_recipe
from steersman.config.sections import Section
from steersman.control.recipe import RECIPES
from steersman.verb_table import VERBS

WORDS = ["yes it is.", "no", "a cat", "ok", "look", "so", "hm", "what?"]
SOMETIMES = {
    "data.cut", "data.on_too_long", "data.opening_words", "data.score_range", "data.step_separator", "data.ties",
    "optimizer.min_lr", "critic.optimizer.min_lr", "algorithm.kl_horizon", "gating.correlation", "gating.hidden",
    "gating.layers", "gating.verbosity", "data.shuffle", "rollout.correction.kind", "data.json_columns",
    "rollout.servers", "rollout.url", "rollout.python", "rollout.arguments", "rollout.timeout", "rollout.tolerance",
    "rollout.in_flight", "rollout.sync", "rollout.folder", "data.cache_gb", "data.buffer",
    "data.judgements.combine", "data.judgements.min_gold", "data.judgements.queues", "data.judgements.weights",
}  # fmt: skip
"""Read where something of the data, or another key, asks for it; these runs are too plain. So is all of `health`, and
of `parallel`, which several processes read."""
_SHORT = [
    "--rollout.copies", "2", "--evaluation.episodes", "1", "--evaluation.during", "1", "--run.eval_every", "1",
]  # fmt: skip
CONTROL = {
    "ppo": [*_SHORT, "--rollout.steps", "16", "--settings.epochs", "1"],
    "trpo": [*_SHORT, "--rollout.steps", "16"],
    "reinforce": [*_SHORT, "--rollout.episodes", "2"],
    "dqn": [*_SHORT, "--rollout.steps", "32", "--settings.learning_starts", "32", "--settings.updates", "2"],
    "q-learning": ["--env", "FrozenLake-v1", "--settings.episodes", "20"],
}
READERS = ("pydantic", "steersman.config.load", "steersman.run.files.inputs", "steersman.config.help")
"""Modules that look at every key whatever it means."""


def leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, tuple[int, str]]]:
    for name in type(section).model_fields:
        value = section.__dict__[name]
        if isinstance(value, Section):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, (id(section), name)


def read_by(verb: str, recipe: Section, monkeypatch) -> tuple[set[str], set[str]]:
    """All keys of the recipe, and those that the run looked at, in it or in a copy of a section."""
    seen: set[tuple[int, str]] = set()
    copies: dict[int, tuple[Section, Section]] = {}
    copy_of = Section.model_copy

    def watched(self, name):
        if name in type(self).model_fields:
            reader = sys._getframe(1).f_globals.get("__name__", "")
            if not reader.startswith(READERS):
                seen.add((id(self), name))
                while id(self) in copies:
                    self = copies[id(self)][1]
                    seen.add((id(self), name))
        return object.__getattribute__(self, name)

    def copied(self, **how):
        made = copy_of(self, **how)
        copies[id(made)] = made, self
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Section, "__getattribute__", watched, raising=False)
        patch.setattr(Section, "model_copy", copied)
        VERBS[verb].start(verb, recipe)
    found = dict(leaves(recipe))
    return set(found), {key for key, place in found.items() if place in seen}


def offline(tmp_path, mini, verb: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [{"prompt": "ask" + "?" * (i % 4), "completion": w} for i, w in enumerate(WORDS)]
    if verb in ("reward", "dpo"):
        rows = [{"prompt": r["prompt"], "chosen": r["completion"] + " a", "rejected": "no e"} for r in rows]
    elif verb == "kto":
        rows = [{**row, "label": i % 2 == 0} for i, row in enumerate(rows)]
    return {
        "model": {"path": str(mini)},
        "data": {"path": str(write_jsonl(tmp_path / f"{verb}.jsonl", rows)), "held_out": 2},
        "train": {"batch_size": 2, "epochs": 1},
        "run": {"threads": 1},
    }


def runs_of(verb: str, tmp_path, mini, base) -> list[dict[str, Any]]:
    """Two short runs: as it is, and with adapters, a schedule and what depends on other keys."""
    if verb == "generate":
        plain = {"model": {"path": str(mini)}, "rollout": {"max_new_tokens": 4}, "run": {"threads": 1}}
        rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": w} for w in WORDS])
        return [
            {**plain, "prompts": ["hm"]},
            {**plain, "data": {"path": str(rows)}, "out": str(tmp_path / "out.jsonl")},
        ]
    more: dict[str, Any] = {"model.lora": {"r": 2}}
    if verb == "distill":
        teacher = save_mini(tmp_path / "teacher", 1)
        plain = {**offline(tmp_path, mini, verb), "teacher": {"path": str(teacher)}, "loss": {"name": "jsd"}}
        plain = merge(plain, {"train.on_policy": 0.5, "rollout.max_new_tokens": 4, "rollout.samples": 2})
        own = {"loss.name": "minillm", "train.on_policy": 1, "reward": base["reward"]}
        own |= {"teacher": {"path": "start", "prompt": "a {prompt}"}, "optimizer.warmup": 2}
        runs = ({"run.dir": str(tmp_path / "a")}, {**more, **own, "optimizer.schedule": "cosine"})
        return [merge(plain, {"run.dir": str(tmp_path / "b"), **extra}) for extra in runs]
    if verb in ("sft", "reward", "dpo", "kto"):
        plain = offline(tmp_path, mini, verb)
        more |= {"optimizer.warmup": 2, "optimizer.schedule": "cosine", "train.keep": "best"}
        more |= {"dpo": {"anchor": str(mini)}, "reward": {"train.bottleneck": 2}}.get(verb, {})
    else:
        plain = merge(base, {"iterations": 1})
    return [merge(plain, {**extra, "run.dir": str(tmp_path / f"{verb}-{i}")}) for i, extra in enumerate(({}, more))]


@pytest.mark.parametrize(
    "verb",
    ["sft", "reward", "dpo", "kto", "distill", "generate", "ppo", "trpo", "grpo", "nlpo",
     *(pytest.param(name, marks=pytest.mark.slow) for name in ("ppo-kl", "rloo", "remax", "dapo", "gspo", "a2c"))],
)  # fmt: skip
def test_what_a_verb_accepts_it_reads(verb, tmp_path, mini, base, monkeypatch):
    keys, read = set(), set()
    for values in runs_of(verb, tmp_path, mini, base):
        recipe = VERBS[verb].recipe_class(None, []).model_validate(values)
        all_keys, looked_at = read_by(verb, recipe, monkeypatch)
        keys |= all_keys
        read |= looked_at
    assert len(keys) > 20
    declared = VERBS[verb].recipe_class(None, []).unread_keys()
    passed = ("health.", "parallel.", *(f"{section}." for section in declared))
    unread = {key for key in keys - read - declared - SOMETIMES if not key.startswith(passed)}
    assert not unread, f"{verb} accepts these and does not look at them: {sorted(unread)}"


@pytest.mark.parametrize("name", ["ppo", "trpo", "reinforce", "dqn", "q-learning"])
def test_what_a_method_of_control_accepts_it_reads(name, tmp_path, monkeypatch):
    words = ["--iterations", "2", "--run.dir", str(tmp_path / "run"), *CONTROL[name]]
    recipe = load_recipe(RECIPES[name], None, words)
    keys, read = read_by("control", recipe, monkeypatch)
    # what is read for continuous actions, for half precision, and where it is no section
    sometimes = {"network.log_std", "optimizer.rounding", "critic.optimizer.rounding", "critic"}
    unread = keys - read - recipe.unread_keys() - sometimes
    assert not unread, f"{name} accepts these and does not look at them: {sorted(unread)}"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["generate", "--model.path", "m", "--prompts", "[a]", "--run.save_every", "3"], "--run.save_every"),
        (["generate", "--model.path", "m", "--prompts", "[a]", "--model.lora.r", "3"], "--model.lora"),
        (["reward", "--model.path", "m", "--data.path", "d", "--model.scratch", "{model_type: llama}"],
         "--model.scratch"),
        (["trpo", "--model.path", "m", "--data.path", "d", "--reward.parts", "{l: {builtin: length}}",
          "--optimizer.lr", "0.1"], "--optimizer.lr"),
        (["ppo-kl", "--model.path", "m", "--data.path", "d", "--reward.parts", "{l: {builtin: length}}",
          "--algorithm.clip_low", "0.1"], "--algorithm.clip_low"),
    ],
)  # fmt: skip
def test_a_key_that_is_not_read_is_refused(words, key, capsys):
    assert main(words) == 2
    assert f"{key}: this verb does not read it" in " ".join(capsys.readouterr().err.split())
    assert main([words[0], "--help"]) == 0
    assert f"{key} " not in capsys.readouterr().out


def test_the_defaults_of_keys_that_are_not_read_are_accepted(capsys):
    """A whole recipe, as `--print-config` gives it, is a recipe."""
    words = [
        "trpo",
        "--model.path",
        "m",
        "--data.path",
        "d",
        "--reward.parts",
        json.dumps({"l": {"builtin": "length"}}),
    ]
    assert main([*words, "--print-config"]) == 0
    assert main([*words, "--optimizer.lr", "1e-4", "--print-config"]) == 0
