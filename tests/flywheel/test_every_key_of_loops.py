"""A key that a loop, or a verb that makes data, accepts is a key that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from letter_models import WORDS, save_chat_mini, save_mini, write_jsonl
from test_every_key_is_read import SOMETIMES, read_by
from wheel_kit import loop_settings

from steersman.cli import main
from steersman.verb_table import VERBS

HANDED_ON = {
    "best-of-n": ("model.", "run."),
    "online-dpo": ("model.", "run."),
    "arena": ("model.", "run.", "rollout.", "ppo.reward_train.bottleneck_weight"),
    "feedback": ("model.", "run.", "data.append_eos", "data.held_out", "data.max_length", "data.max_prompt_tokens"),
}
"""What verbs get that are run inside, which have a test of their own."""
BY_CHOICE = ("judge.", "parallel.", "corrector.", "environment.", "pairs.column", "data.max_length")
"""Read where a judge asks, where several processes share the run, and where an environment or an answer is of
another kind. `data.max_length` is handed on by all loops."""
QUICK = {"train": {"batch_size": 4}}


def rows_for(folder: Path, **columns: Any) -> str:
    return str(write_jsonl(folder / "rows.jsonl", [{"prompt": w, **columns} for w in WORDS]))


def loop(folder: Path, mini: Path, verb: str) -> list[dict[str, Any]]:
    other = {"judge": {"reward": {"l": {"builtin": "length"}}}}
    if verb == "best-of-n":
        rules = ({"rule": "best"}, {"rule": "top"}, {"rule": "threshold", "threshold": -99})
        more: list[dict[str, Any]] = [{**QUICK, "keep": rule} for rule in rules]
    elif verb == "online-dpo":
        more = [QUICK, {**QUICK, "pairs": {"by": "compare"}, "reference": "mixed", **other}]
    else:
        ppo = {"iterations": 1, "prompts": 3, "samples": 2}
        opponents = {"other": str(save_mini(folder / "other", seed=1, context=128))}
        more = [{"opponents": opponents, "sft": QUICK, "dpo": QUICK, "ppo": ppo, "draws": 20}]
    return [loop_settings(folder, mini, f"run-{i}", **own, rounds=1) for i, own in enumerate(more)]


def maker(folder: Path, mini: Path, verb: str) -> list[dict[str, Any]]:
    """Short runs of the other verbs."""
    run = {"run": {"dir": str(folder / "run"), "threads": 1}}
    model, judge = {"model": {"path": str(mini)}}, {"judge": {"reward": {"l": {"builtin": "happy_story"}}}}
    pairs = rows_for(folder, chosen="a good day", rejected="no")
    if verb == "step-labels":
        sampled = {"rollout": {"prompts": 6, "samples": 4, "max_new_tokens": 12}, "continuations": 2}
        data = {"data": {"path": rows_for(folder), "step_separator": " "}}
        return [{**model, **data, **run, **sampled, "reward": {"l": {"builtin": "length"}}}]
    if verb == "instruct":
        wide = str(save_mini(folder / "wide", context=1024))
        corrector = {"corrector": {"local": {"path": wide, "max_tokens": 4}}, "rephrase": True}
        sampled = {"rollout": {"prompts": 3, "max_new_tokens": 8, "held_out": 1}}
        rules = {"rules": {"held_out": ["startend:quotation"]}}
        data = {"data": {"path": rows_for(folder)}, "model": {"path": wide}}
        return [{**data, **corrector, **sampled, **rules, **run}]
    if verb == "feedback":
        said = [("Tell.", "A cat.", "Thanks, that helps!"), ("Sing.", "No.", "That is wrong.")] * 3
        turns = [
            [
                {"role": "user", "content": ask},
                {"role": "assistant", "content": answer},
                {"role": "user", "content": more},
            ]
            for ask, answer, more in said
        ]
        data = {"data": {"path": str(write_jsonl(folder / "chats.jsonl", [{"messages": t} for t in turns]))}}
        chat = {"model": {"path": str(save_chat_mini(folder / "chat", 256))}, "then": ["sft", "kto"]}
        return [{**data, **run, **chat}]
    if verb == "judge":
        return [{"data": {"path": pairs}, **judge, **run}]
    if verb == "judge-lessons":
        out = {"out": str(folder / "o.jsonl"), "held_out": str(folder / "h.jsonl")}
        return [{"data": {"path": pairs, "held_out": 2}, **out}]
    if verb == "check-env":
        (folder / "env.py").write_text(
            "class Env:\n    def begin(self, row):\n        return None\n\n"
            "    def step(self, text):\n        return 'on', 1.0, True\n"
        )
        chat = {"model": {"path": str(save_chat_mini(folder / "chat", 256))}}
        played = {"environment": {"path": f"{folder / 'env.py'}:Env"}, "episodes": 2, "run": {"threads": 1}}
        return [{**chat, **played, "data": {"path": rows_for(folder)}, "rollout": {"max_new_tokens": 4}}]
    raise ValueError(verb)


LOOPS = ("best-of-n", "online-dpo", "arena")
MAKERS = ("step-labels", "instruct", "feedback", "judge", "judge-lessons", "check-env")


@pytest.mark.parametrize("verb", [*LOOPS, *MAKERS])
def test_what_a_loop_accepts_it_reads(verb, tmp_path, mini_model, monkeypatch):
    kind = VERBS[verb].recipe_class(None, [])
    keys, read = set(), set()
    for values in (loop if verb in LOOPS else maker)(tmp_path, mini_model, verb):
        all_keys, looked_at = read_by(verb, kind.model_validate(values), monkeypatch)
        keys |= all_keys
        read |= looked_at
    declared = kind.unread_keys()
    passed = (*BY_CHOICE, *HANDED_ON.get(verb, ()), *(f"{section}." for section in declared))
    unread = {key for key in keys - read - declared - SOMETIMES if not key.startswith(passed)}
    unread = {key for key in unread if not key.endswith("optimizer.min_lr")}
    assert not unread, f"{verb} accepts these and does not look at them: {sorted(unread)}"


MODEL, DATA, JUDGE = ["--model.path", "m"], ["--data.path", "d"], ["--judge.reward", "{l: {builtin: length}}"]
ONE = "{path: m}"
LEAST = {
    "arena": [*MODEL, *DATA, *JUDGE, "--opponents", "{a: m}"],
    "step-labels": [*MODEL, *DATA, "--reward", "{l: {builtin: length}}"],
    "feedback": DATA,
    "wheel": [*MODEL, "--judgements.folder", "f"],
    "judge": [*DATA, *JUDGE],
    "judge-lessons": [*DATA, "--out", "o"],
    "simulate-users": [*JUDGE, "--candidates", f"{{a: {ONE}, b: {ONE}}}", "--user", ONE,
                       "--personas", "{p: {character: c, goal: g}}"],
    "check-env": ["--environment.path", "e.py:E"],
    "grpo": [*MODEL, *DATA, "--reward.parts", "{l: {builtin: length}}"],
    **{verb: [*MODEL, *DATA, *JUDGE] for verb in ("best-of-n", "online-dpo")},
    **{verb: [*MODEL, *DATA] for verb in ("instruct", "sft", "dpo", "kto", "reward")},
}  # fmt: skip
"""The least that makes a recipe of each verb."""


@pytest.mark.parametrize(
    ("verb", "key", "value"),
    [
        ("best-of-n", "rollout.recompute_logp", "true"),
        ("online-dpo", "rollout.correction.low", "0.2"),
        ("online-dpo", "loss.margin_weight", "0.5"),
        ("arena", "rollout.samples", "4"),
        ("arena", "dpo.loss.margin_weight", "0.5"),
        ("arena", "dpo.loss.explore", "0.1"),
        ("step-labels", "data.shuffle", "false"),
        ("instruct", "data.on_too_long", "truncate"),
        ("feedback", "data.wrap_in_chat", "false"),
        ("judge", "data.held_out", "4"),
        ("judge-lessons", "data.append_eos", "false"),
        ("simulate-users", "run.save_every", "3"),
        ("check-env", "rollout.samples", "3"),
        ("sft", "data.ties", "keep"),
        ("dpo", "data.score_range", "[1, 5]"),
        ("kto", "data.step_separator", "x"),
        ("grpo", "data.ties", "drop"),
        ("reward", "data.opening_words", "3"),
    ],
)
def test_what_a_verb_does_not_read_is_refused_and_not_in_its_help(verb, key, value, capsys):
    assert main([verb, *LEAST[verb], f"--{key}", value, "--print-config"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    asked = key.removesuffix(".low")
    assert f"--{asked}: this verb does not read it" in said
    assert main([verb, *LEAST[verb], "--print-config"]) == 0
    capsys.readouterr()
    assert main([verb, "--help"]) == 0
    assert f"--{key} " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "words", "said"),
    [
        (
            "arena",
            ["--stages", "[sft, dpo]", "--ppo.iterations", "3"],
            "ppo: nothing reads this section, since `stages` is ['sft', 'dpo']; remove it, or add ppo to `stages`",
        ),
        (
            "feedback",
            ["--model.path", "m", "--then", "[kto]", "--sft.optimizer.lr", "1e-3"],
            "sft: nothing reads this section, since `then` is ['kto']; remove it, or add sft to `then`",
        ),
        (
            "wheel",
            ["--kto.train.epochs", "2"],
            "kto: nothing reads this section, since `then` is ['dpo']; remove it, or add kto to `then`",
        ),
    ],
)
def test_the_section_of_a_stage_that_is_not_asked_for_is_refused(verb, words, said, capsys):
    assert main([verb, *LEAST[verb], *words, "--print-config"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert main([verb, *LEAST[verb], *words[:-2], "--print-config"]) == 0
