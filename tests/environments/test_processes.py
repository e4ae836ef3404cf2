"""Episodes in processes of their own: the same ones, and what a tool does there touches nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

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
        if self.what == "raise":
            raise KeyError("price")
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


def test_what_is_raised_there_is_told_with_its_line_and_its_traceback(environment, tool):
    episode = environment.open()
    episode.begin(ASK, {"what": "raise"}, 0)
    with pytest.raises(FaultError, match=rf"KeyError: 'price' \({tool}, line \d+\)") as fault:
        episode.step(Reply("a", "a"))
    (note,) = fault.value.__notes__
    assert f'File "{tool}"' in note
    episode.close()


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


LEAVES = """
import os, signal, subprocess, sys, time

class Leaves:
    def begin(self, row, seed=0):
        self.what = row.get("what")
        return None

    def step(self, text):
        more = {"start_new_session": True} if self.what == "apart" else {}
        child = subprocess.Popen(["sleep", row_seconds()], **more)
        if self.what == "group":
            os.killpg(os.getpgid(child.pid), signal.SIGKILL)
        if self.what == "daemon":
            subprocess.run(f"sleep {row_seconds()} & disown", shell=True, executable="/bin/bash")
        if self.what in ("hang", "apart"):
            child.wait()
        if self.what == "tidy":
            child.kill()
            child.wait()
        if self.what == "left as it crashes":
            os.abort()
        return f"pid {os.getpid()}", 1.0, True

    def close(self):
        if self.what == "close raises":
            raise RuntimeError("it does not close")

def row_seconds():
    return "SECONDS"
"""


@pytest.fixture(scope="module")
def leaves(tmp_path_factory):
    """An environment whose episodes start programs, and what lists those that run."""
    seconds, folder = f"4243.{os.getpid()}", tmp_path_factory.mktemp("leaves")
    (folder / "leaves.py").write_text(LEAVES.replace("SECONDS", seconds))
    made = open_environment(
        EnvironmentConfig(path=f"{folder / 'leaves.py'}:Leaves", run_in="processes", time_limit=3.0)
    )
    assert isinstance(made, ProcessEnvironment)

    def running() -> list[str]:
        found = subprocess.run(["ps", "-eo", "stat,pid,args"], capture_output=True, text=True, check=True).stdout
        lines = [line for line in found.splitlines() if seconds in line and not line.startswith("Z")]
        return [line for line in lines if "ps -eo" not in line]

    return made, running


def soon(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("what", ["hang", "apart", "daemon", "left as it crashes", "left"])
def test_what_an_episode_started_ends_with_it(leaves, what):
    """Programs that hang, and what runs when the process is over: in its group, in a session apart, or orphaned."""
    if what == "apart" and sys.platform != "linux":
        pytest.skip("only Linux tells who came from where")
    environment, running = leaves
    episode = environment.open()
    episode.begin(ASK, {"what": what}, 0)
    with suppress(FaultError, TooLateError):
        assert episode.step(Reply("a", "a")).done
        assert running()
    episode.close()
    assert soon(lambda: not running()), running()


def test_a_process_whose_episode_left_nothing_is_used_again_and_any_other_is_not(leaves):
    environment, _ = leaves
    pids = []
    for what in ("tidy", "tidy", "left", "tidy", "close raises", "tidy"):
        episode = environment.open()
        episode.begin(ASK, {"what": what}, 0)
        pids.append(episode.step(Reply("a", "a")).messages[0]["content"])
        with suppress(FaultError):
            episode.close()
    assert pids[0] == pids[1] == pids[2]
    assert pids[3] == pids[4] != pids[2]
    assert pids[5] not in pids[:5]


def test_a_tool_that_ends_its_process_group_ends_its_own_episode_alone(leaves):
    environment, running = leaves
    bad, good = environment.open(), environment.open()
    bad.begin(ASK, {"what": "group"}, 0)
    good.begin(ASK, {"what": "tidy"}, 0)
    with pytest.raises(FaultError, match="its process ended"):
        bad.step(Reply("a", "a"))
    assert good.step(Reply("a", "a")).done
    good.close()
    again = environment.open()
    again.begin(ASK, {"what": "tidy"}, 0)
    assert again.step(Reply("a", "a")).done
    assert not running()


def test_a_host_that_is_killed_is_replaced_and_its_processes_end_with_it(leaves):
    environment, running = leaves
    episodes = [environment.open() for _ in range(3)]
    for episode, what in zip(episodes, ("tidy", "hang", "tidy"), strict=True):
        episode.begin(ASK, {"what": what}, 0)
    idle = episodes.pop()
    pid = int(idle.step(Reply("a", "a")).messages[0]["content"].split()[1])
    idle.close()
    os.kill(environment._host.process.pid, signal.SIGKILL)
    environment._host.process.wait()
    again = environment.open()
    again.begin(ASK, {"what": "tidy"}, 0)
    assert again.step(Reply("a", "a")).messages[0]["content"] != f"pid {pid}"
    if sys.platform == "linux":
        for episode in episodes:
            with pytest.raises(FaultError, match="its process ended"):
                episode.step(Reply("a", "a"))
            episode.close()
        assert soon(lambda: not running()), running()


def test_hosts_that_end_again_and_again_are_refused(leaves, monkeypatch):
    environment, _ = leaves
    environment.open().close()
    ended = environment._host
    os.kill(ended.process.pid, signal.SIGKILL)
    ended.process.wait()
    monkeypatch.setattr(environment, "_running_host", lambda: environment._idle.clear() or ended)
    with pytest.raises(SteersmanError, match="ended 3 times in a row"):
        environment.open()


def test_all_ends_with_the_run(leaves):
    """When the line to the run closes, so do the host, its processes and what they started."""
    environment, running = leaves
    episode, idle = environment.open(), environment.open()
    for one, what in ((episode, "hang"), (idle, "tidy")):
        one.begin(ASK, {"what": what}, 0)
    idle.step(Reply("a", "a"))
    threading.Thread(target=_step, args=(episode,)).start()
    assert soon(lambda: bool(running()))
    environment._host.process.stdin.close()
    assert environment._host.process.wait(20) == -signal.SIGKILL
    assert soon(lambda: not running()), running()


def _step(episode):
    with suppress(FaultError, TooLateError):
        episode.step(Reply("a", "a"))
