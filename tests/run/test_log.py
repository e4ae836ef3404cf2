"""The log: rows that are valid JSON, a resumed run that doubles nothing, progress that a pipe can read."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from steersman.jsonl import read_jsonl
from steersman.run.console import duration_text, new_console
from steersman.run.files import log as log_file
from steersman.run.files.log import Log
from steersman.run.health.watch import Finding
from steersman.types import SteersmanError


def log(folder, **options) -> Log:
    options = {"title": "PPO", "total": 10, "console": new_console(file=io.StringIO(), width=200)} | options
    return Log(folder, **options)


def test_rows_are_json_whatever_the_numbers(tmp_path):
    with log(tmp_path) as run:
        run.step(1, {"a": float("nan"), "b": float("-inf"), "c": 1e-30, "d": np.float32(0.5), "e": torch.tensor(2.0)})
        run.samples(1, [{"index": 0, "prompt": "a\nb", "completion": "ü", "reward": {"total": float("inf")}}])
        run.finding(Finding(1, "kl_runaway", "warning", "too far"))
        # flushed while the run is still open
        (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {k: row[k] for k in "abcde"} == {"a": "nan", "b": "-inf", "c": 1e-30, "d": 0.5, "e": 2.0}
    assert row["step"] == 1
    assert row["seconds"] >= 0
    (sample,) = read_jsonl(tmp_path / "samples.jsonl")
    assert sample == {"step": 1, "index": 0, "prompt": "a\nb", "completion": "ü", "reward": {"total": "inf"}}
    assert read_jsonl(tmp_path / "health.jsonl")[0]["code"] == "kl_runaway"


def test_resuming_drops_the_rows_after_the_checkpoint(tmp_path):
    with log(tmp_path) as run:
        run.samples(0, [{"index": 0}])
        for step in range(1, 8):
            run.step(step, {"x": step})
            run.samples(step, [{"index": 0}])
            run.finding(Finding(step, "c", "note", "t"))
    path = tmp_path / "metrics.jsonl"
    seconds = read_jsonl(path)[3]["seconds"]
    path.write_text(path.read_text() + '{"step": 8, "x": 8')  # cut by a kill
    with log(tmp_path, resumed_step=4) as run:
        for step in range(5, 7):
            run.step(step, {"x": step * 10})
    rows = read_jsonl(path)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert [r["x"] for r in rows] == [1, 2, 3, 4, 50, 60]
    assert rows[4]["seconds"] >= seconds
    assert [r["step"] for r in read_jsonl(tmp_path / "samples.jsonl")] == [0, 1, 2, 3, 4]
    assert [r["step"] for r in read_jsonl(tmp_path / "health.jsonl")] == [1, 2, 3, 4]
    with log(tmp_path) as run:  # from the start again
        run.step(1, {"x": 0})
    assert len(read_jsonl(path)) == 1
    assert read_jsonl(tmp_path / "samples.jsonl") == []


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    out = io.StringIO()
    with log(tmp_path, every=1e9, headline=("reward/total", "kl"), console=new_console(file=out, width=200)) as run:
        for step in range(1, 11):
            run.step(step, {"kl": step / 3, "reward/total": 0.25, "other": 1.0})
        run.finding(Finding(10, "kl_runaway", "warning", "too far [bold]"))
    lines = out.getvalue().splitlines()
    assert len(lines) == 3  # the first step, the last, and the finding
    assert lines[0].startswith("PPO 1/10  reward 0.25  kl 0.3333")
    assert lines[0].endswith("left")
    assert lines[1] == "PPO 10/10  reward 0.25  kl 3.333"
    assert lines[2] == "warning at step 10: too far [bold]"


def test_the_look_before_the_first_step_is_no_step_of_those_that_are_left(tmp_path, monkeypatch):
    clock = iter([0.0, 600.0, 600.0, 601.0, 601.0])
    monkeypatch.setattr(log_file, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    out = io.StringIO()
    with log(tmp_path, total=1001, console=new_console(file=out, width=200)) as run:
        run.step(0, {"kl": 0.0})
        run.step(1, {"kl": 0.0})
    assert out.getvalue().splitlines()[-1].endswith(f"{duration_text(1000)} left")


def test_a_verb_without_steps_tells_what_it_counted(tmp_path):
    out = io.StringIO()
    with log(tmp_path, title="judge", total=0, console=new_console(file=out, width=200)) as run:
        run.step(0, {"data/asked": 96, "data/labelled": 95})
    assert out.getvalue() == "judge  data/asked 96  data/labelled 95\n"


def test_a_terminal_gets_a_moving_line(tmp_path):
    out = io.StringIO()
    console = new_console(file=out, width=120, force_terminal=True)
    with log(tmp_path, console=console, resumed_step=3) as run:
        for step in range(4, 11):
            run.step(step, {"kl": 1.5})
    assert "10/10" in out.getvalue()
    assert "kl 1.5" in out.getvalue()


def test_sinks(tmp_path):
    with pytest.raises(SteersmanError, match="there is no sink 'tb'; known are tensorboard, wandb, trackio"):
        log(tmp_path, sinks=["tb"])
    for name in ("tensorboard", "wandb"):
        try:
            __import__(name)
        except ImportError:
            with pytest.raises(SteersmanError, match=rf"pip install 'steersman\[{name}\]'"):
                log(tmp_path, sinks=[name])
