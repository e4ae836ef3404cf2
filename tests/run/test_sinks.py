"""Sinks of one's own by path, and the trackers that are installed."""

from __future__ import annotations

import importlib.util
import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from steersman.run.files.log import Log
from steersman.run.files.sinks import SINKS, open_sink
from steersman.types import SteersmanError

OWN = """
import json

class Lines:
    def __init__(self, folder, resumed_step):
        self.file = open(folder / "own.jsonl", "a")
        self.file.write(json.dumps({"resumed": resumed_step}) + "\\n")
    def log(self, step, stats):
        self.file.write(json.dumps({"step": step, **stats}) + "\\n")
    def close(self):
        self.file.write('"closed"\\n')
        self.file.close()

class Half:
    def __init__(self, folder, resumed_step):
        pass
    def log(self, step, stats):
        pass

class Fails:
    def __init__(self, folder, resumed_step):
        self.folder = folder
    def log(self, step, stats):
        with open(self.folder / "asked", "a") as file:
            file.write(f"{step} ")
        if step == 2:
            {act}
    def close(self):
        1 / 0

class Broken:
    def __init__(self, folder, resumed_step):
        1 / 0
"""


@pytest.fixture
def own(tmp_path) -> Path:
    path = tmp_path / "my_sinks.py"
    path.write_text(OWN.replace("{act}", "pass"))
    return path


def test_a_sink_of_ones_own_gets_every_step_and_is_closed(own, tmp_path):
    for resumed, steps in ((-1, (1, 2)), (1, (2, 3))):
        with Log(tmp_path, title="t", total=3, resumed_step=resumed, sinks=[f"{own}:Lines"]) as log:
            for step in steps:
                log.step(step, {"loss": step / 2})
    told = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert told == [{"resumed": 0}, {"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, "closed",
                    {"resumed": 1}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 1.5}, "closed"]  # fmt: skip


@pytest.mark.parametrize(
    ("act", "said"),
    [("raise RuntimeError('no network')", "RuntimeError: no network"), ("raise SystemExit(3)", "sys.exit(3)"),
     ("__import__('os')._exit(3)", "os._exit(3)")],
)  # fmt: skip
def test_a_sink_that_fails_is_named_and_dropped_and_the_run_goes_on(act, said, tmp_path):
    path = tmp_path / "failing.py"
    path.write_text(OWN.replace("{act}", act))
    console = Console(file=StringIO(), width=1000)
    with Log(tmp_path, title="t", total=4, sinks=[f"{path}:Fails", f"{path}:Lines"], console=console) as log:
        for step in range(1, 5):
            log.step(step, {"loss": 1.0})
    told = console.file.getvalue()
    first, last = (line for line in told.splitlines() if "failed at step 2" in line)
    assert f"{path}:Fails" in first
    assert said in first
    assert told.rstrip().endswith(last)
    assert (tmp_path / "asked").read_text().split() == ["1", "2"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert len((tmp_path / "own.jsonl").read_text().splitlines()) == 6


def test_a_sink_that_fails_as_it_closes_leaves_the_others_closed(tmp_path):
    path = tmp_path / "failing.py"
    path.write_text(OWN.replace("{act}", "pass"))
    console = Console(file=StringIO(), width=1000)
    with Log(tmp_path, title="t", total=1, sinks=[f"{path}:Fails", f"{path}:Lines"], console=console) as log:
        log.step(1, {"loss": 1.0})
    assert "failed as it was closed: ZeroDivisionError" in console.file.getvalue()
    assert (tmp_path / "own.jsonl").read_text().endswith('"closed"\n')


def test_what_is_no_sink_is_refused_by_name(own, tmp_path):
    with pytest.raises(SteersmanError, match="has no method close"):
        open_sink(f"{own}:Half", tmp_path, 0)
    with pytest.raises(SteersmanError, match="no 'Nothing'"):
        open_sink(f"{own}:Nothing", tmp_path, 0)
    with pytest.raises(SteersmanError, match="there is no sink 'tb'"):
        open_sink("tb", tmp_path, 0)


@pytest.mark.parametrize("name", [n for n in SINKS if n != "wandb"])
def test_trackers_that_are_installed_take_numbers_offline(name, tmp_path, monkeypatch):
    if importlib.util.find_spec(name) is None:
        with pytest.raises(SteersmanError, match=rf"pip install 'steersman\[{name}\]'"):
            open_sink(name, tmp_path, 0)
        return
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    sink = open_sink(name, tmp_path, 0)
    sink.log(1, {"loss": 0.5})
    sink.close()
