"""`steersman check-env`: a sound environment passes, and each fault is found by name."""

from __future__ import annotations

import pytest
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
