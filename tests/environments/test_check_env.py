"""`steersman check-env`: a sound environment passes, and each fault is found by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
from imitations import R1, save_chat
from letter_models import write_jsonl

from steersman.cli import main

FAULTY = '''
import random

class Endless:
    """Never ends."""
    def begin(self, row): return "go"
    def step(self, text): return "on", 0.5, False

class Rich:
    """Pays much."""
    def begin(self, row): return "go"
    def step(self, text): return "", 50.0, True

class Moody:
    """Has no seed."""
    def begin(self, row): return str(random.random())
    def step(self, text): return "", 1.0, True

class Mute:
    def reset(self): pass
    def tell(self, what: str) -> str: return what
    def get_reward(self) -> float: return 1.0

class Broken:
    """Raises."""
    def begin(self, row): return "go"
    def step(self, text): raise KeyError(text)

class Unmade:
    """Can not be made."""
    def __init__(self): raise OSError("no such port")
    def begin(self, row): return "go"
    def step(self, text): return "", 1.0, True
'''


@pytest.fixture
def faulty(tmp_path):
    path = tmp_path / "faulty.py"
    path.write_text(FAULTY)
    return path


def checked(capsys, *words):
    code = main(["check-env", *map(str, words)])
    printed = capsys.readouterr()
    return code, " ".join((printed.out + printed.err).split())


def test_a_sound_environment_passes(worlds, mini, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": w} for w in ("we", "no", "up")])
    code, said = checked(
        capsys, f"{worlds}:Echo", "--model.path", mini, "--data.path", rows, "--environment.max_turns", 5,
        "--rollout.max_new_tokens", 6,
    )  # fmt: skip
    assert code == 0, said
    assert "nothing to mend" in said
    assert "16 of 16, within 5 turns" in said
    for name in (
        "a random player earns",
        "the model earns",
        "the greedy model earns",
        "time per step",
        "longest episode",
    ):
        assert name in said


@pytest.mark.parametrize(
    ("name", "code", "finding"),
    [("Endless", 2, "none of 16 episodes ended"), ("Rich", 2, "outside [-1, 1], such as 50"),
     ("Moody", 0, "otherwise the second time"), ("Mute", 0, "tell: no docstring"), ("Broken", 2, "KeyError"),
     ("Unmade", 2, "an episode failed: OSError: no such port")],
)  # fmt: skip
def test_each_fault_is_found(faulty, capsys, name, code, finding):
    found, said = checked(capsys, f"{faulty}:{name}", "--reward_low", -1, "--reward_high", 1)
    assert finding in said
    assert found == code


def test_what_was_heard_in_a_loss_is_seen(worlds, mini, tmp_path, capsys, monkeypatch):
    from steersman.environments.conversation import Conversation

    def leaking(self, ids):
        self.ids += ids
        self.logp += [0.0] * len(ids)
        self.mask += [True] * len(ids)
        self.version += [0] * len(ids)

    monkeypatch.setattr(Conversation, "add_observation", leaking)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "we"}])
    code, said = checked(capsys, f"{worlds}:Echo", "--model.path", mini, "--data.path", rows)
    assert code == 2
    assert "tokens count where" in said


def test_rows_of_one_prompt_are_held_out_row_by_row_as_in_training(worlds, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "we", "wish": n} for n in range(4)])
    code, said = checked(capsys, f"{worlds}:Echo", "--data.path", rows, "--data.held_out", 1)
    assert code == 0, said


def test_tools_that_a_model_of_plain_text_would_not_know_are_to_be_told(worlds, mini, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": w} for w in ("we", "no")])
    words = [f"{worlds}:Shop", "--model.path", mini, "--data.path", rows, "--episodes", 2]
    code, said = checked(capsys, *words)
    assert code == 2
    assert "plain text, without tools; set environment.tell_tools" in said
    code, said = checked(capsys, *words, "--environment.tell_tools", "true")
    assert code == 0, said


def test_the_name_of_an_environment_is_shown_as_it_is(tmp_path, capsys):
    (tmp_path / "money.py").write_text(FAULTY.replace("Mute", "bank"))
    _, said = checked(capsys, f"{tmp_path / 'money.py'}:bank")
    assert "money.py:bank: tools tell" in said.replace("\n", "")


@pytest.mark.parametrize(
    "sampled",
    [
        ("--rollout.top_k", 4), ("--rollout.top_p", 0.8), ("--rollout.min_p", 0.1),
        ("--rollout.min_new_tokens", 4), ("--rollout.temperature", 0.3, "--rollout.top_k", 6),
        ("--model.dtype", "bfloat16"), ("--model.dtype", "bfloat16", "--rollout.top_p", 0.9),
    ],
)  # fmt: skip
def test_log_probabilities_are_compared_over_what_could_be_sampled(worlds, mini, tmp_path, capsys, sampled):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": w} for w in ("we", "no", "up")])
    code, said = checked(
        capsys, f"{worlds}:Echo", "--model.path", mini, "--data.path", rows, "--episodes", 4,
        "--environment.max_turns", 3, "--rollout.max_new_tokens", 6, *sampled,
    )  # fmt: skip
    assert code == 0, said


def test_episodes_that_the_template_shows_anew_are_read_as_they_were_said(worlds, tmp_path, capsys):
    model = save_chat(tmp_path / "model", R1)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": w} for w in ("we", "no")])
    code, said = checked(
        capsys, f"{worlds}:Echo", "--model.path", model, "--data.path", rows, "--data.wrap_in_chat", "true",
        "--episodes", 2, "--environment.history", "segments", "--environment.max_turns", 3,
        "--rollout.max_new_tokens", 6,
    )  # fmt: skip
    assert code == 0, said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_probabilities_of_another_distribution_are_to_be_mended(
    worlds, mini, tmp_path, capsys, monkeypatch, dtype
):
    """As a server tells them that forgets the temperature."""
    from steersman.rollout import Engine

    real = Engine.generate

    def untempered(self, prompts, sampling, **how):
        return real(self, prompts, replace(sampling, temperature=4.0 * sampling.temperature), **how)

    monkeypatch.setattr(Engine, "generate", untempered)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "we"}])
    code, said = checked(
        capsys, f"{worlds}:Echo", "--model.path", mini, "--data.path", rows, "--episodes", 4, "--model.dtype", dtype,
        "--rollout.max_new_tokens", 8, "--rollout.temperature", 0.2,
    )  # fmt: skip
    assert code == 2
    assert "log-probabilities while sampling and in training differ by up to" in said
    assert f"rounding in {dtype} explains" in said
