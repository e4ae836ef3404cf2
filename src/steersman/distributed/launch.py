"""Starts a verb on several processes of this machine through torch's own launcher, and watches over them.

Under `torchrun`, SLURM's `srun`, or any other launcher that sets RANK and WORLD_SIZE, the ranks are there already and
nothing is started here.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

from steersman.config.dump import dump_recipe
from steersman.config.sections import Section
from steersman.distributed.join import free_port, join_ranks
from steersman.distributed.launched import ranks_launched
from steersman.distributed.parallel import ParallelConfig
from steersman.distributed.waiting import MissingRankError
from steersman.guards.handlers import signals_kept
from steersman.guards.terminal import say
from steersman.guards.user_code import CtrlCError, leave_now
from steersman.types import SteersmanError

FOLDER, STARTER = "STEERSMAN_RANKS_FOLDER", "STEERSMAN_RANKS_STARTER"
"""What a rank that was started here finds in its environment: where it leaves word, and its starter's pid."""


def must_start(devices: int, launcher: str = "torch") -> bool:
    """Whether this process is to start `devices` ranks; False where it is one of them, or alone. Ray starts a single
    one too.

    Raises SteersmanError where a launcher started another number of ranks than the recipe asks for.
    """
    there = ranks_launched()
    if there and devices > 1 and there != devices:
        raise SteersmanError(
            f"run.devices is {devices}, but the launcher started {there} ranks; leave run.devices out, or make them "
            "equal"
        )
    return not there and (devices > 1 or launcher == "ray")


def start(verb: str, recipe: Section, devices: int, *, resume: bool) -> dict[str, Any]:
    """Runs the verb on `devices` ranks and gives rank 0's summary.

    Raises SteersmanError with the first rank's error, once, and CtrlCError where Ctrl-C ended the ranks outside a
    step. No rank outlives this call.
    """
    with TemporaryDirectory(prefix="steersman-ranks-") as folder:
        place = Path(folder)
        (place / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        words = ("-m", "steersman", verb, str(place / "recipe.yaml"), *(["--resume"] if resume else []))
        with signals_kept():
            running = start_processes(
                "steersman",
                sys.executable,
                dict.fromkeys(range(devices), words),
                {rank: _environment(rank, devices, port, place) for port in [free_port()] for rank in range(devices)},
                DefaultLogsSpecs(log_dir=folder),
            )
        logging.getLogger(f"{start_processes.__module__}.api").setLevel(logging.CRITICAL)  # told here, and once
        with _signals_to(list(running.pids().values())) as seen:
            codes = _first_ends(running)
            while running.wait(0.2) is None:  # which ends the others where one failed
                pass
        if any(codes.values()):
            raise error_of(place, codes, seen)
        return json.loads((place / "summary.json").read_text(encoding="utf-8"))


def _first_ends(running: Any) -> dict[int, int]:
    """The exit codes of the ranks once all have ended, or once one has failed: of those that had ended by then."""
    processes = {rank: handler.proc for rank, handler in running.subprocess_handlers.items()}
    while True:
        codes = {rank: code for rank, one in processes.items() if (code := one.poll()) is not None}
        if len(codes) == len(processes) or any(codes.values()):
            return codes
        time.sleep(0.1)


def _environment(rank: int, devices: int, port: int, folder: Path) -> dict[str, str]:
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // devices))
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(devices), "LOCAL_WORLD_SIZE": str(devices),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": threads,
        FOLDER: str(folder), STARTER: str(os.getpid()),
    }  # fmt: skip


def passed_on() -> list[signal.Signals]:
    """The signals that a starter passes on to its ranks: those that this process was not started to ignore."""
    wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    return [number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def forwarding(send: Callable[[int], None], impatient: Collection[int]) -> Iterator[list[int]]:
    """The first signal is handed to `send`; a later one raises CtrlCError where it is one of `impatient`. Gives the
    signals that have come, in order; outside the main thread none come."""
    seen: list[int] = []

    def forward(number: int, _frame: Any) -> None:
        if seen and number in impatient:
            raise CtrlCError
        seen.append(number)
        if len(seen) == 1:
            send(number)

    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = {number: signal.signal(number, forward) for number in passed_on()}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _signals_to(pids: list[int]) -> Iterator[list[int]]:
    """The first signal goes to every rank, which ends its step and saves; a second Ctrl-C ends them at once. Gives
    the signals that have come."""

    def send(number: int) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):  # some ranks end before others
                os.kill(pid, number)

    with forwarding(send, [signal.SIGINT]) as seen:
        try:
            yield seen
        except KeyboardInterrupt:
            for pid in pids:
                with suppress(ProcessLookupError, PermissionError):  # macOS refuses a group of which nobody runs
                    os.killpg(pid, signal.SIGKILL)
            raise


ENDED_AT_ONCE = (130, -signal.SIGINT, -signal.SIGTERM)
"""Exit codes of a rank that a signal found in no step, at whose end it could have saved and stopped in order."""


def error_of(folder: Path, codes: dict[int, int], seen: Sequence[int]) -> BaseException:
    """What the first rank that failed left word of; else how it ended. `seen` are the signals that were passed on."""
    left = sorted((json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("error-*.json")),
                  key=lambda word: word["at"])  # fmt: skip
    own = any(word["own"] for word in left)
    if signal.SIGINT in seen and not own and any(code in ENDED_AT_ONCE for code in codes.values()):
        told = (json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("interrupt-*.json")))
        return CtrlCError(next((how for how in told if how), ""))
    killed = [rank for rank, code in codes.items() if code < 0]
    if killed and not own:
        name = signal.Signals(-codes[killed[0]]).name
        return SteersmanError(
            f"rank {killed[0]} was ended by {name}, so all were ended; a run that saves goes on with --resume"
        )
    if not left:
        rank, code = next((rank, code) for rank, code in codes.items() if code)
        return SteersmanError(f"rank {rank} ended with exit code {code} and without a word, so all were ended")
    first = next((word for word in left if word["own"]), left[0])
    if first["crash"]:
        say(first["text"])
        return RuntimeError(f"rank {first['rank']} failed; its traceback stands above")
    return SteersmanError(first["text"])


@contextmanager
def as_rank(parallel: ParallelConfig) -> Iterator[None]:
    """What a verb that may have ranks runs in: they find each other, and rank 0 alone writes to the terminal."""
    if FOLDER in os.environ and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which had ended the rank at once (cli.py)
    with join_ranks(parallel) as here:
        if here.main:
            yield
            return
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            yield


def leave_error(error: BaseException) -> None:
    """Leaves word of the error for the starter, which tells the first one."""
    rank, known = os.environ["RANK"], isinstance(error, SteersmanError)
    word = {
        "rank": int(rank), "at": time.time(), "crash": not known, "own": not isinstance(error, MissingRankError),
        "text": str(error) if known else "".join(traceback.format_exception(error)),
    }  # fmt: skip
    Path(os.environ[FOLDER], f"error-{rank}.json").write_text(json.dumps(word), encoding="utf-8")


def leave_interrupt(how: str) -> None:
    """Leaves word for the starter, which tells it, of how to go on after Ctrl-C."""
    Path(os.environ[FOLDER], f"interrupt-{os.environ['RANK']}.json").write_text(json.dumps(how), encoding="utf-8")


def leave_summary(summary: dict[str, Any]) -> None:
    """Leaves rank 0's summary for the starter."""
    if os.environ["RANK"] == "0":
        Path(os.environ[FOLDER], "summary.json").write_text(json.dumps(summary), encoding="utf-8")


def end_with_starter(every: float = 1.0, grace: float = 60.0) -> None:
    """A rank whose starter is gone saves and ends: nobody would watch over it."""
    starter = int(os.environ[STARTER])

    def watch() -> None:
        while os.getppid() == starter:
            time.sleep(every)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        leave_now(1)

    threading.Thread(target=watch, daemon=True, name="starter watch").start()
