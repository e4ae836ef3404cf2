"""What a user's function raises is told with the line of the user's own file, and kept whole in the run folder."""

from __future__ import annotations

import json
import re

import pytest
from train_kit import save_tiny, settings

from steersman.guards.functions import load_function
from steersman.guards.raised import MOST, Tracebacks, kept, place_of, user_errors
from steersman.reward import CallableReward
from steersman.run.files.folder import TRACEBACKS, RunFolder
from steersman.types import Prompt, Sample, SteersmanError
from steersman.verbs import rl
from steersman.verbs.on_policy_recipes import RECIPES

OWN = """
import json, statistics

def helper(text):
    return json.loads(text)

def deep(prompts, completions):
    return [helper("{") for _ in completions]

async def late(prompts, completions):
    raise KeyError("answer")

def nothing(prompts, completions):
    return [None for _ in completions]

class Stateless:
    def score(self, prompts, completions):
        return [0.0 for _ in completions]
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


@pytest.mark.parametrize(
    ("name", "said", "line"), [("deep", "JSONDecodeError: ", 5), ("late", "KeyError: 'answer'", 11)]
)
def test_a_reward_that_raises_says_where_and_the_run_keeps_the_traceback(own, tmp_path, name, said, line):
    asked = settings(tmp_path, save_tiny(tmp_path / "model"))
    asked["reward"] = {"parts": {"r": {"function": f"{own}:{name}"}}}
    with pytest.raises(SteersmanError) as told:
        rl.run(RECIPES["grpo"].model_validate(asked))
    message = str(told.value)
    assert message.startswith(f"reward 'r': it raised {said}")
    assert f"({own}, line {line})" in message
    assert "first prompt: " in message
    file = tmp_path / "run" / TRACEBACKS
    assert message.endswith(f"; the whole traceback is in {file}")
    text = file.read_text()
    assert f'File "{own}", line {line}' in text
    assert text.count("Traceback (most recent call last)") == 1
    assert not kept


def test_a_library_is_named_where_there_is_no_file_of_the_users_own():
    with pytest.raises(json.JSONDecodeError) as told:
        json.loads("{")
    assert re.search(r"test_raised\.py, line \d+", place_of(told.value))
    own_frame = told.value.__traceback__
    assert own_frame is not None
    assert re.search(r"decoder\.py, line \d+", place_of(told.value.with_traceback(own_frame.tb_next)))
    with pytest.raises(SyntaxError) as told:
        compile("a b", "x.py", "exec")
    assert place_of(told.value) == ""  # its own text has file and line


def test_many_errors_fill_no_disk(tmp_path):
    file = Tracebacks(tmp_path / "t.txt", lambda path, text: path.write_text(text) and None)
    for n in range(MOST + 5):
        error = ValueError("x")
        error.add_note(str(n))
        assert file.add("who", error) == (n < MOST)
    assert file.add("who", error) is False
    assert file.file.read_text().count("ValueError") == MOST


def test_the_newest_folder_has_it_and_a_run_that_begins_anew_has_none_of_an_earlier_one(tmp_path):
    (tmp_path / "model").mkdir()
    recipe = RECIPES["grpo"].model_validate(settings(tmp_path, tmp_path / "model"))

    def fail():
        with user_errors("sums"):
            raise ValueError("no sum")

    with RunFolder(tmp_path / "a", recipe) as outer:
        with RunFolder(tmp_path / "b", recipe) as inner, pytest.raises(SteersmanError, match="b/tracebacks"):
            fail()
        inner.forget()
        with pytest.raises(SteersmanError, match="a/tracebacks"):
            fail()
        assert (inner.path / TRACEBACKS).exists()  # a message points to it
    with RunFolder(tmp_path / "a", recipe, resume=True):
        assert (outer.path / TRACEBACKS).exists()
    with RunFolder(tmp_path / "b", recipe):
        assert not (inner.path / TRACEBACKS).exists()


def test_the_texts_of_a_sample_are_told_and_what_is_no_function(own):
    sample = Sample(Prompt([1], "Say:", {}), [5], [0.0], "eos", "a word")
    with pytest.raises(
        SteersmanError, match=r"gave NoneType 'None' for sample 0 \(prompt: 'Say:', completion: 'a word'\)"
    ):
        CallableReward(f"{own}:nothing").score([sample])
    with pytest.raises(SteersmanError, match="a method of a class can not be named; write a function"):
        load_function(f"{own}:Stateless.score")
    with pytest.raises(SteersmanError, match="Stateless is a class; give a function"):
        CallableReward(f"{own}:Stateless")
