"""Sinks of one's own by path, and the trackers that are installed."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from steersman.run.files.log import Log
from steersman.run.files.sinks import SINKS, for_stages, identity, open_sink, run_name
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

class Takes:
    def __init__(self, folder, resumed_step):
        pass
    def log(self, step, stats):
        stats.clear()
    def close(self):
        pass

class NoArguments:
    pass

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
    assert told == [{"resumed": -1}, {"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, "closed",
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
    told = console.file.getvalue()
    assert "failed as it was closed: ZeroDivisionError: division by zero (" in told
    assert "failing.py, line " in told
    assert (tmp_path / "own.jsonl").read_text().endswith('"closed"\n')


def test_what_is_no_sink_is_refused_by_name(own, tmp_path):
    with pytest.raises(SteersmanError, match="has no method close"):
        open_sink(f"{own}:Half", tmp_path, 0)
    with pytest.raises(
        SteersmanError, match=r"made from \(folder, resumed_step\), which its constructor does not take"
    ):
        open_sink(f"{own}:NoArguments", tmp_path, 0)
    with pytest.raises(SteersmanError, match=r"opening it: it raised ZeroDivisionError: .*my_sinks\.py, line \d+"):
        open_sink(f"{own}:Broken", tmp_path, 0)
    with pytest.raises(SteersmanError, match="no 'Nothing'"):
        open_sink(f"{own}:Nothing", tmp_path, 0)
    with pytest.raises(SteersmanError, match="there is no sink 'tb'"):
        open_sink("tb", tmp_path, 0)


def test_a_sink_that_changes_its_numbers_takes_them_from_no_other(own, tmp_path):
    console = Console(file=StringIO(), width=1000)
    with Log(tmp_path, title="t", total=1, sinks=[f"{own}:Takes", f"{own}:Lines"], console=console) as log:
        log.step(1, {"loss": 0.5})
    assert '{"step": 1, "loss": 0.5}' in (tmp_path / "own.jsonl").read_text()
    assert "loss 0.5" in console.file.getvalue()


@pytest.fixture
def loop(tmp_path, monkeypatch) -> Path:
    """A loop's folder; what a tracker keeps outside it goes beside it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    (tmp_path / "loop" / "round-01" / "sft").mkdir(parents=True)
    for file in ("config.yaml", "inputs.json"):
        (tmp_path / "loop" / file).touch()
    return tmp_path / "loop"


def of_tensorboard(folder: Path) -> list[tuple[int, str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    return sorted((event.step, key, event.value) for key in read.Tags()["scalars"] for event in read.Scalars(key))


def of_mlflow(folder: Path) -> list[tuple[int, str, float]]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("steersman").experiment_id
    (run,) = client.search_runs([experiment], f"attributes.run_name = '{run_name(folder)}-{identity(folder)}'")
    assert run.info.status == "FINISHED"
    of_keys = [client.get_metric_history(run.info.run_id, key) for key in run.data.metrics]
    return sorted((metric.step, metric.key, metric.value) for metrics in of_keys for metric in metrics)


def of_trackio(folder: Path) -> list[tuple[int, str, float]]:
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("steersman", f"{run_name(folder)}-{identity(folder)}")
    return sorted((row["step"], key, row[key]) for row in rows for key in row if key not in ("step", "timestamp"))


def of_wandb(folder: Path) -> list[tuple[int, str, float]]:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # only then is the file on the disk
    found = []
    for file in folder.glob("wandb/offline-run-*/*.wandb"):
        for data in records_of_wandb(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            items = {"/".join(x.nested_key) or x.key: float(x.value_json) for x in record.history.item}
            found += [(int(items["_step"]), key, items[key]) for key in items if not key.startswith("_")]
    return sorted(found)


def records_of_wandb(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32_768 - at % 32_768 < 7:
            at += 32_768 - at % 32_768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


READERS = {"tensorboard": of_tensorboard, "mlflow": of_mlflow, "trackio": of_trackio, "wandb": of_wandb}


@pytest.mark.parametrize("name", SINKS)
def test_trackers_that_are_installed_take_numbers_offline(name, loop):
    if importlib.util.find_spec(name) is None:
        with pytest.raises(SteersmanError, match=rf"pip install 'steersman\[{name}\]'"):
            open_sink(name, loop, -1)
        return
    sink = open_sink(name, loop, -1)
    sink.log(1, {"loss": 0.5})
    sink.close()
    if name in READERS:
        assert READERS[name](loop) == [(1, "loss", 0.5)]


@pytest.mark.parametrize("name", SINKS)
def test_a_stages_tracker_leaves_the_loops_open_and_apart(name, loop):
    pytest.importorskip(name, reason=f"needs the tracker {name}")
    stage = loop / "round-01" / "sft"
    of_loop = open_sink(name, loop, -1)
    of_loop.log(0, {"win_rate": 0.5})
    for each in for_stages([name]):
        of_stage = open_sink(each, stage, -1)
        of_stage.log(1, {"loss": 0.5})
        of_stage.close()
    of_loop.log(1, {"win_rate": 0.75})
    of_loop.close()
    if name in READERS:
        assert READERS[name](loop) == [(0, "win_rate", 0.5), (1, "win_rate", 0.75)]
        assert READERS[name](stage) == [(1, "loss", 0.5)]


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "trackio"])
def test_steps_that_a_resumed_run_does_again_stand_once(name, loop):
    pytest.importorskip(name, reason=f"needs the tracker {name}")
    for resumed, steps in ((-1, (0, 1, 2, 3)), (1, (2, 3, 4))):
        sink = open_sink(name, loop, resumed)
        for step in steps:
            sink.log(step, {"loss": step / 2})
        sink.close()
    assert READERS[name](loop) == [(step, "loss", step / 2) for step in range(5)]


def test_a_folder_keeps_its_run_and_a_run_that_begins_anew_there_is_another(loop):
    first = identity(loop)
    assert identity(loop) == first
    (loop / "tracker-id").unlink()
    assert identity(loop) != first


def test_a_stages_run_is_named_after_its_loop(loop):
    assert run_name(loop) == "loop"
    assert run_name(loop / "round-01" / "sft") == "loop-round-01-sft"


def test_stages_log_where_a_tracker_can_have_two_runs_at_once():
    assert for_stages(["tensorboard", "swanlab", "mine.py:Lines"]) == ["tensorboard", "mine.py:Lines"]
