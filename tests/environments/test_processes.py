"""Episodes in processes of their own: the same ones, and what a tool does there touches nothing else."""

from __future__ import annotations

import os

import pytest
from train_kit import merge, plain, recipe, rows

from steersman.environments.classes import FaultError
from steersman.environments.config import EnvironmentConfig, open_environment
from steersman.environments.port import Reply
from steersman.environments.processes import ProcessEnvironment
from steersman.environments.workers import TooLateError
from steersman.types import SteersmanError
from steersman.verbs import rl

ASK = [{"role": "user", "content": "go"}]

TOOL = """
import ctypes, os, re, sys, time

class Bad:
    def begin(self, row, seed=0):
        self.left, self.what = 2, row.get("what")
        return None

    def step(self, text):
        self.left -= 1
        if self.what == "crash":
            ctypes.string_at(0)
        if self.what == "leave":
            os._exit(0)
        if self.what == "hold":
            re.match(r"(a+)+$", "a" * 40 + "b")  # holds the interpreter for years
        if self.what == "exit":
            sys.exit(4)
        return f"pid {os.getpid()}", 1.0, self.left == 0
"""


@pytest.fixture(scope="module")
def tool(tmp_path_factory):
    path = tmp_path_factory.mktemp("tool") / "tool.py"
    path.write_text(TOOL)
    return path


@pytest.fixture(scope="module")
def environment(tool) -> ProcessEnvironment:
    config = EnvironmentConfig(path=f"{tool}:Bad", run_in="processes", time_limit=1.0)
    made = open_environment(config)
    assert isinstance(made, ProcessEnvironment)
    made.open().close()  # the host loads what it needs, which takes seconds
    return made


def test_every_episode_has_a_process_and_processes_are_used_again(environment):
    episodes, pids = [environment.open(), environment.open()], []
    for episode in episodes:
        assert episode.begin(ASK, {}, 0) == ASK
        pids.append(episode.step(Reply("a", "a")).messages[0]["content"])
    assert len({*pids, f"pid {os.getpid()}"}) == 3
    assert episodes[0].step(Reply("a", "a")).done
    episodes[0].close()
    third = environment.open()
    third.begin([], {}, 0)
    assert third.step(Reply("a", "a")).messages[0]["content"] == pids[0]


@pytest.mark.parametrize(
    ("what", "error", "said"),
    [
        ("crash", FaultError, "its process ended"),
        ("leave", FaultError, "its process ended"),
        ("exit", FaultError, "SystemExit: 4"),
        ("hold", TooLateError, ""),
    ],
)
def test_a_tool_that_breaks_its_process_ends_its_episode_alone(environment, what, error, said):
    bad, good = environment.open(), environment.open()
    bad.begin(ASK, {"what": what}, 0)
    good.begin(ASK, {}, 0)
    with pytest.raises(error, match=said):
        bad.step(Reply("a", "a"))
    assert good.step(Reply("a", "a")).reward == 1.0
    bad.close()
    good.close()
    again = environment.open()
    again.begin(ASK, {}, 0)
    assert again.step(Reply("a", "a")).reward == 1.0


def test_what_a_recipe_can_not_mean_is_refused(tool):
    with pytest.raises(ValueError, match="belong to other environments"):
        EnvironmentConfig(agent=["true"], run_in="processes")
    with pytest.raises(ValueError, match="give its file as `record`"):
        EnvironmentConfig(path=f"{tool}:Bad", replay=True)


def test_episodes_in_processes_train_as_in_threads_and_are_played_again_from_their_record(base, tmp_path):
    record = str(tmp_path / "record.jsonl")
    places = {
        "threads": {},
        "processes": {"run_in": "processes", "record": record},
        "record": {"path": base["environment"]["path"], "record": record, "replay": True},
    }
    for place, more in places.items():
        values = {**base, "environment": base["environment"] | more}
        rl.run(recipe("rloo", merge(values, {"run.dir": str(tmp_path / place)}), iterations=2))
    first, *others = (plain(rows(tmp_path / place)[-1]) for place in places)
    assert others == [first, first]


def test_a_record_that_does_not_fit_is_told(tool, tmp_path):
    """Replies that were never recorded are a fault; a broken line is named."""
    record = tmp_path / "record.jsonl"
    config = EnvironmentConfig(path=f"{tool}:Bad", record=str(record))
    recorded = open_environment(config).open()
    recorded.begin(ASK, {}, 7)
    told = recorded.step(Reply("a", "a"))
    replayed = open_environment(config.model_copy(update={"replay": True})).open()
    replayed.begin(ASK, {}, 7)
    assert replayed.step(Reply("a", "a")) == told
    with pytest.raises(FaultError, match="replies differ from those recorded"):
        replayed.step(Reply("b", "b"))
    record.write_text("{\n")
    with pytest.raises(SteersmanError, match=r"record.jsonl, line 1"):
        open_environment(config.model_copy(update={"replay": True}))
    record.unlink()
    with pytest.raises(SteersmanError, match="no such file"):
        open_environment(config.model_copy(update={"replay": True}))


def test_a_record_holds_texts_with_any_line_break(tool, tmp_path):
    """A prompt may hold U+2028 and its like, which end no line of the record."""
    config = EnvironmentConfig(path=f"{tool}:Bad", record=str(tmp_path / "record.jsonl"))
    asked = [{"role": "user", "content": "one\u2028two\x85three"}]
    begun = open_environment(config).open().begin(asked, {}, 7)
    replayed = open_environment(config.model_copy(update={"replay": True})).open()
    assert replayed.begin(asked, {}, 7) == begun
    assert "one\u2028two\x85three" in begun[-1]["content"]
