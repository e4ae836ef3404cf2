"""What a launcher of another kind says of the ranks, in torch's words; and which rank is missing."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore

from steersman.distributed import launch, on_ray, waiting
from steersman.distributed.launched import from_slurm
from steersman.distributed.waiting import MissingRankError, WaitedInVainError, Waits
from steersman.guards.handlers import signals_kept
from steersman.guards.user_code import CtrlCError
from steersman.types import SteersmanError
from steersman.verbs.preference import PreferenceRecipe

TASK = {
    "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[003-004,007]", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8,4(x2)",
}  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-004,007]", "gpu003"),
        ("gpu003,gpu004", "gpu003"),
        ("login1,gpu[1-2]", "login1"),
        ("rack[2-3]node[10,12].x", "rack2node10.x"),
        ("alone", "alone"),
    ],
)
def test_a_task_of_srun_knows_its_rank_and_the_first_node(nodes, first):
    found = from_slurm(TASK | {"SLURM_STEP_NODELIST": nodes})
    assert found.pop("MASTER_ADDR") == first
    assert found == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_PORT": str(20_000 + 4711 * 7 % 20_000),
    }


def test_other_processes_are_left_as_they_are():
    assert from_slurm({}) == {}
    assert from_slurm(TASK | {"SLURM_STEP_NUM_TASKS": "1"}) == {}  # one task that starts its own ranks
    assert from_slurm({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}) == {}  # the batch script itself
    assert from_slurm(TASK | {"WORLD_SIZE": "2"}) == {}  # torchrun inside a step


@pytest.mark.parametrize(
    ("told", "node", "tasks"), [("4", 0, "4"), ("8(x2)", 1, "8"), ("8(x2),4", 2, "4"), ("2,3(x3),1", 3, "3")]
)
def test_a_task_of_srun_knows_how_many_are_on_its_node(told, node, tasks):
    found = from_slurm(TASK | {"SLURM_STEP_TASKS_PER_NODE": told, "SLURM_NODEID": str(node)})
    assert found["LOCAL_WORLD_SIZE"] == tasks


def test_a_missing_variable_is_named():
    with pytest.raises(SteersmanError, match="SLURM_LOCALID"):
        from_slurm({k: v for k, v in TASK.items() if k != "SLURM_LOCALID"})


@pytest.fixture
def three(monkeypatch) -> list[Waits]:
    """Three ranks over one store: rank 0 and rank 1 are in the same call, rank 2 has not come to it."""
    monkeypatch.setattr(waiting, "PATIENCE", 0.05)
    store = dist.HashStore()
    found = [Waits(rank, 3, store) for rank in range(3)]
    for rank, calls in ((0, 2), (1, 2), (2, 1)):
        for number in range(calls):
            with found[rank].call(f"call {number + 1}"):
                pass
    return found


LOST = "[pair.cc:547] gloo: Timed out waiting 5000ms for recv operation to complete"


def test_a_rank_that_does_not_wait_as_the_others_do_is_the_missing_one(three):
    three[1].others()  # it waited in vain too
    with pytest.raises(MissingRankError) as caught, three[0].layers():
        raise RuntimeError(LOST)
    text = str(caught.value)
    assert "rank 1 was last in call 2 (call 2);" in text
    assert "rank 2 was last in call 1 (call 1), behind, and is not waiting" in text


def test_errors_that_no_other_rank_is_to_blame_for_pass(three):
    """DeepSpeed's own were told as a missing rank, and the cause was hidden."""
    for around in (three[0].layers(), three[0].call("the start of DeepSpeed")):
        with pytest.raises(RuntimeError, match="shapes") as caught, around:
            raise RuntimeError("shapes can not be multiplied")
        assert type(caught.value) is RuntimeError


def test_where_every_rank_waits_in_vain_in_the_same_call_none_is_missing_and_the_cause_is_told(monkeypatch):
    monkeypatch.setattr(waiting, "PATIENCE", 30.0)  # none needs it
    store = dist.HashStore()

    def rank(number: int) -> Exception | None:
        try:
            with Waits(number, 2, store).call("a sum"):
                raise RuntimeError(LOST)
        except Exception as error:
            return error

    with ThreadPoolExecutor(2) as ranks:
        found = list(ranks.map(rank, range(2)))
    for number, error in enumerate(found):
        assert type(error) is WaitedInVainError
        assert str(error) == f"rank {number} of 2: a sum failed on every rank, so none is missing; the cause: {LOST}"


def test_a_rank_whose_store_is_gone_with_rank_0_says_so():
    """It was a traceback of torch's store, found before the call had begun."""
    found = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    there = TCPStore("127.0.0.1", found.port, is_master=False, timeout=timedelta(seconds=2))
    del found
    waits = Waits(1, 2, there)

    def calls() -> None:
        for _ in range(1000):  # the first is sent before anyone could know that nobody reads it
            with waits.call("a sum"):
                time.sleep(0.01)

    with pytest.raises(MissingRankError, match=r"a sum failed.* rank 0 can no longer be asked"):
        calls()


def test_handlers_that_another_package_puts_in_the_place_of_ours_are_put_back():
    """Ray's for SIGTERM ended a run in the middle of its step: one in Python, and one that Python can not see."""
    came, c = [], ctypes.CDLL(None)
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    own = signal.getsignal(signal.SIGTERM)
    try:
        with signals_kept():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
            c.signal(int(signal.SIGTERM), ctypes.c_void_p(1))  # SIG_IGN, past Python
        assert signal.getsignal(signal.SIGTERM) is own
        os.kill(os.getpid(), signal.SIGTERM)
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_signals_do_what_they_did_while_ranks_run_and_after_them(monkeypatch):
    """Torch's launcher puts its own handlers there for good: `nohup` was in vain, Ctrl-C afterwards a traceback."""
    ended, during = launch._first_ends, []

    def watched(running):
        during.append(signal.getsignal(signal.SIGHUP))
        return ended(running)

    monkeypatch.setattr(launch, "_first_ends", watched)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    terminal = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        before = [signal.getsignal(number) for number in numbers]
        values = {"model": {"path": "no/such/folder"}, "data": {"path": "none.jsonl"}}
        recipe = PreferenceRecipe.model_validate(values)
        with pytest.raises(SteersmanError, match=r"none\.jsonl|no/such/folder"):
            launch.start("dpo", recipe, 2, resume=False)
        assert during == [signal.SIG_IGN]
        assert [signal.getsignal(number) for number in numbers] == before
    finally:
        signal.signal(signal.SIGHUP, terminal)


@pytest.fixture
def two_ranks():
    """One that has ended and one that has not, each in a session of its own, as torch's launcher starts them."""
    ends = ("pass", "import time; time.sleep(600)")
    ranks = [subprocess.Popen([sys.executable, "-c", end], start_new_session=True) for end in ends]
    ranks[0].wait()
    yield ranks
    ranks[1].kill()
    ranks[1].wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_ranks_that_run_where_others_have_ended(two_ranks, number):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with launch._signals_to([rank.pid for rank in two_ranks]):
            os.kill(os.getpid(), number)
            assert two_ranks[1].wait(20) != 0
    finally:
        signal.signal(number, before)


def test_a_second_ctrl_c_ends_the_ranks_that_run_where_others_have_ended(two_ranks):
    with pytest.raises(CtrlCError), launch._signals_to([rank.pid for rank in two_ranks]):
        raise CtrlCError
    assert two_ranks[1].wait(20) == -signal.SIGKILL


@pytest.mark.parametrize("codes", [{0: 130}, {1: -signal.SIGINT}, {0: -signal.SIGTERM}, {0: 130, 1: 1}])
def test_ranks_that_ctrl_c_ended_outside_a_step_were_interrupted(codes, tmp_path):
    lost = {"rank": 1, "at": 1.0, "crash": False, "own": False, "text": "rank 0 did not come"}
    (tmp_path / "error-1.json").write_text(json.dumps(lost))
    (tmp_path / "interrupt-0.json").write_text(json.dumps("; its files are in runs/a"))
    assert type(launch.error_of(tmp_path, codes, [])) is SteersmanError
    assert type(launch.error_of(tmp_path, codes, [signal.SIGTERM])) is SteersmanError
    stop = launch.error_of(tmp_path, codes, [signal.SIGINT])
    assert type(stop) is CtrlCError
    assert str(stop) == "; its files are in runs/a"
    own = {"rank": 0, "at": 2.0, "crash": False, "own": True, "text": "no such column"}
    (tmp_path / "error-0.json").write_text(json.dumps(own))
    assert str(launch.error_of(tmp_path, codes, [signal.SIGINT])) == "no such column"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_ranks_on_ray_are_told_of_every_signal_that_ends_a_step(number):
    """A terminal that is closed sends SIGHUP: the starter must not end by it and leave its ranks behind."""
    before, got = signal.signal(number, signal.SIG_DFL), []
    try:
        # a rank is asked as Ray's handle of an actor is
        with on_ray._signals_to([SimpleNamespace(signal=SimpleNamespace(remote=got.append))]):
            assert signal.getsignal(number) is not signal.SIG_DFL
            os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)
    assert got == [signal.SIGTERM]
