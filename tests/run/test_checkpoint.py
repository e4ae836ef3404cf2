"""Checkpoints: whole or passed over, the right ones kept, random streams restored, signals obeyed."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint as distributed
from torch.distributed.checkpoint.api import CheckpointException

from steersman.distributed.ranks import Ranks
from steersman.distributed.stored import write_shards
from steersman.distributed.waiting import NoStore
from steersman.run.files.checkpoint import Checkpointer
from steersman.run.seed import rng_state, set_rng_state
from steersman.run.stop_request import StopRequest
from steersman.types import SteersmanError


def state(x: float) -> dict:
    return {"actor": {"w": torch.full((50, 50), x)}, "kl": {"coefficient": x, "name": "a", "none": None, "on": True}}


def test_round_trip_of_everything_a_run_holds(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    schedule.step()
    held = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
        "rng": rng_state(), "half": torch.ones(2, dtype=torch.bfloat16), "order": [3, 1, 2],
    }  # fmt: skip
    Checkpointer(tmp_path).save(7, held, {"reward": 1.5, "broken": float("nan")})
    found = Checkpointer(tmp_path).load()
    assert found is not None
    assert (found.step, found.metrics, found.state["order"]) == (7, {"reward": 1.5}, [3, 1, 2])
    torch.testing.assert_close(found.state["model"], dict(model.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(found.state["half"], held["half"], rtol=0, atol=0)
    optimizer.load_state_dict(found.state["optimizer"])
    schedule.load_state_dict(found.state["schedule"])
    assert schedule.last_epoch == 1


def test_random_states_continue_bit_for_bit(tmp_path):
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    random.gauss(0, 1), np.random.randn()  # leaves a cached second Gaussian in both
    Checkpointer(tmp_path).save(1, {"rng": rng_state()})

    def draw():
        return random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.randn(3).tolist()

    first = draw()
    set_rng_state(Checkpointer(tmp_path).load().state["rng"])
    assert draw() == first


@pytest.mark.parametrize("how", ["half", "flipped", "no state", "no manifest", "half manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, how):
    keeper = Checkpointer(tmp_path)
    before, last = keeper.save(1, state(1.0)), keeper.save(2, state(2.0))
    weights, manifest = last / "state.pt", last / "manifest.json"
    raw = bytearray(weights.read_bytes())
    if how == "half":
        weights.write_bytes(raw[: len(raw) // 2])
    elif how == "flipped":
        raw[len(raw) // 2] ^= 1
        weights.write_bytes(raw)
    elif how == "no state":
        weights.unlink()
    elif how == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:30])
    said = {
        "half": rf"has {len(raw) // 2} of {len(raw)} bytes", "flipped": "SHA-256", "no state": r"state\.pt is missing"
    }.get(how, "manifest is missing, cut or changed")  # fmt: skip
    again = Checkpointer(tmp_path)
    found = again.load()
    assert found is not None
    assert len(again.damaged) == 1
    assert re.search(rf"step-00000002 is damaged .*{said}.*using the one before", again.damaged[0])
    assert (found.step, found.path) == (1, before)
    assert found.state["kl"] == state(1.0)["kl"]
    assert found.state["actor"]["w"].equal(state(1.0)["actor"]["w"])
    with pytest.raises(SteersmanError, match="damaged"):
        keeper.load(last)
    # the run goes on from step 1 and writes step 2 again
    keeper.save(2, state(2.5))
    assert keeper.load().state["kl"]["coefficient"] == 2.5


def edits(manifest):
    """Each field of the manifest changed on its own, in its nested fields too, and fields gone."""
    for key, value in manifest.items():
        yield {k: v for k, v in manifest.items() if k != key}
        for other in (999, "x", None, [], {"state.pt": 3}):
            if other != value:
                yield {**manifest, key: other}
    yield {**manifest, "metrics": {"gold": 1e9}}
    yield {**manifest, "files": {}}
    yield [manifest]


def test_a_manifest_that_says_something_else_is_damage_whatever_field_it_is(tmp_path):
    keeper = Checkpointer(tmp_path, metric="gold")
    before, last = keeper.save(1, state(1.0), {"gold": 0.5}), keeper.save(2, state(2.0), {"gold": 0.25})
    file = last / "manifest.json"
    whole = file.read_text()
    for edited in edits(json.loads(whole)):
        file.write_text(json.dumps(edited))
        again = Checkpointer(tmp_path, metric="gold")
        assert again.load().path == before, edited
        assert again.best() == before
    for damage in (b"", b"\xff\xfe\x00", b"[" * 100_000, b"{}", whole.encode()[:-3], b"null"):
        file.write_bytes(damage)
        assert Checkpointer(tmp_path).load().path == before
    file.write_text(whole)
    assert Checkpointer(tmp_path).load().path == last


def test_a_checkpoint_under_another_name_is_damage(tmp_path):
    keeper = Checkpointer(tmp_path)
    before = keeper.save(1, state(1.0))
    keeper.save(2, state(2.0)).rename(before.with_name("step-00000009"))
    assert keeper.load().path == before
    assert "its manifest is of step 2" in keeper.damaged[0]


def test_where_no_checkpoint_is_whole_nothing_is_begun_again_in_silence(tmp_path):
    keeper = Checkpointer(tmp_path)
    for step in (1, 2):
        (keeper.save(step, state(1.0)) / "manifest.json").write_text("{}")
    with pytest.raises(SteersmanError, match=r"no checkpoint is whole: step-00000001: .*remove this folder"):
        keeper.load()


def test_nothing_to_resume_from(tmp_path):
    assert Checkpointer(tmp_path).load() is None
    assert Checkpointer(tmp_path).best() is None
    with pytest.raises(SteersmanError, match="keep_last"):
        Checkpointer(tmp_path, keep_last=0)


def test_a_kill_inside_a_save_leaves_rubbish_that_the_next_start_clears(tmp_path):
    Checkpointer(tmp_path).save(1, state(1.0))
    half = tmp_path / "checkpoints" / ".tmp-step-00000002"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    assert Checkpointer(tmp_path).load().step == 1
    assert not half.exists()


@pytest.mark.parametrize(("mode", "best"), [("max", 3), ("min", 5)])
def test_the_last_and_the_best_are_kept(tmp_path, mode, best):
    keeper = Checkpointer(tmp_path, keep_last=2, keep_best=1, metric="gold", mode=mode)
    for step, gold in enumerate([5.0, 3.0, 9.0, 4.0, 1.0, float("nan"), 2.0, 6.0], start=1):
        # a new process each time: what is best must be read from the disk
        keeper = Checkpointer(tmp_path, keep_last=2, keep_best=1, metric="gold", mode=mode)
        keeper.save(step, state(gold), {"gold": gold})
    steps = sorted(int(p.name.split("-")[1]) for p in (tmp_path / "checkpoints").iterdir())
    assert steps == [best, 7, 8]
    assert keeper.best().name == f"step-{best:08d}"


def test_of_equally_good_checkpoints_the_earlier_is_the_best(tmp_path):
    """As an early end chooses among its looks; a later look that is no better is no reason to take later weights."""
    keeper = Checkpointer(tmp_path, metric="gold", mode="max")
    first = keeper.save(1, state(1.0), {"gold": 0.5})
    keeper.save(2, state(2.0), {"gold": 0.5})
    assert keeper.best() == first


LOOP = """
    import sys, time
    from pathlib import Path
    from steersman.run.files.checkpoint import Checkpointer
    from steersman.run.stop_request import StopRequest
    keeper = Checkpointer(Path(sys.argv[1]))
    with StopRequest() as stop:
        for step in range(1, 1000):
            print("in", step, flush=True)
            for _ in range(20):
                time.sleep(0.01)
            print("out", step, flush=True)
            if stop:
                keeper.save(step, {"step": step})
                print("left after", stop.signal_name, flush=True)
                break
"""


def loop(tmp_path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LOOP), str(tmp_path)],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while process.stdout.readline() != "in 2\n":
        assert process.poll() is None
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves(tmp_path, number):
    process = loop(tmp_path)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out.splitlines() == ["out 2", f"left after {number.name}"]
    assert "finishing this step and saving" in err
    assert Checkpointer(tmp_path).load().step == 2


def test_a_second_interrupt_aborts(tmp_path):
    process = loop(tmp_path)
    process.send_signal(signal.SIGINT)
    assert "finishing" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert "CtrlCError" in err
    assert "out 2" not in out
    assert process.returncode != 0


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_full_disk_of_one_rank_is_named(tmp_path, monkeypatch):
    def save(*_: object, **__: object) -> None:
        raise CheckpointException("write", {1: (OSError(errno.ENOSPC, "No space left on device"), [])})  # type: ignore

    monkeypatch.setattr(distributed, "save", save)
    with pytest.raises(SteersmanError, match=r"rank 1: .*the disk is full"):
        write_shards({"weight": torch.zeros(2)}, tmp_path, Ranks(store=NoStore()))
