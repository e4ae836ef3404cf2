"""What every training run needs around its loop: folder, log, watch, checkpoints, and leaving in order."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from steersman.atomic import write_atomic
from steersman.distributed.pieces import kept_tensor, named_shard
from steersman.distributed.ranks import ranks
from steersman.jsonl import read_jsonl
from steersman.ops.text import text_stats
from steersman.run.files.checkpoint import Checkpoint, Checkpointer
from steersman.run.files.folder import open_folder
from steersman.run.files.ledger import StoppedError
from steersman.run.files.log import Log, NoLog
from steersman.run.files.sinks import require_sinks
from steersman.run.health.limits import HealthConfig
from steersman.run.health.watch import Finding, HealthWatch
from steersman.run.report.card import write_card
from steersman.run.report.page import write_report
from steersman.run.run_config import RunConfig, device_of
from steersman.run.seed import seed_everything, seed_global
from steersman.run.stop_request import StopRequest
from steersman.types import Stats, SteersmanError
from steersman.update.optimizer import NotFiniteError


class Stateful(Protocol):
    """What a checkpoint holds: everything that a resumed run needs to go on bit for bit."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Session:
    """One run of a verb, as a context manager.

    `metric` names the number that ranks checkpoints for `keep_best`, and `mode` whether more of it is better.
    `steps` yields the number of each step still to do, and saves when it is time, when a look finds something better
    than every checkpoint has, when a signal asks for it, and at the end. The weights that training begins with are
    in no checkpoint, and so no rival, unless `keep_start` saves them. Leaving the `with` block writes the report,
    also when the run failed.
    """

    def __init__(
        self,
        verb: str,
        recipe: Any,
        *,
        resume: bool,
        metric: str,
        mode: str = "max",
        headline: Sequence[str] = (),
        health: HealthConfig | None = None,
    ) -> None:
        self.verb, self.recipe, self.metric, self.mode = verb, recipe, metric, mode
        self.headline = headline
        self.config: RunConfig = recipe.run
        seed_everything(self.config.seed, deterministic=self.config.deterministic)
        self.device = device_of(self.config)
        self.resume, self.watch = resume, HealthWatch(health)
        self.last_metrics: Stats = {}
        self.start, self.step, self.saved_step = 0, 0, 0
        self.stopped, self.begun, self.ended = False, False, False
        self._best: float | None = None
        self._is_best = False
        self._stack = ExitStack()

    def __enter__(self) -> Session:
        require_sinks(self.config.sinks)
        self.folder = self._stack.enter_context(open_folder(Path(self.config.dir), self.recipe, resume=self.resume))
        self.path = self.folder.path
        mode: Any = self.mode
        with ranks().main_first("the run folder"):
            self.checkpoints = Checkpointer(
                self.path,
                keep_last=self.config.keep_last,
                keep_best=self.config.keep_best,
                metric=self.metric,
                mode=mode,
            )
        self.signal = self._stack.enter_context(StopRequest())
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if ranks().main and (self.path / "metrics.jsonl").exists():
                # A report that can not be written must not hide why the run failed.
                with nullcontext() if error is None else suppress(Exception):
                    write_report(self.path)
                    if error is None and (self.path / "model").is_dir() and (self.path / "summary.json").exists():
                        write_card(self.path)
            if not self.begun and not self.folder.resumed:
                self.folder.forget()
        finally:
            self._stack.close()
        if isinstance(error, NotFiniteError):
            self._halt(self.step, str(error))

    def begin(self, state: Stateful, total: int) -> None:
        """Restores the newest whole checkpoint when resuming, and opens the log; `total` counts steps."""
        self.state, self.total, self.begun = state, total, True
        self._stack.callback(delattr, self, "state")  # its looks know the session: a cycle would keep its models
        found = self.checkpoints.load() if self.folder.resumed else None
        if found is not None:
            self._restore(found)
        self.log = self._stack.enter_context(self._log(self.start if found is not None else -1))
        for damage in self.checkpoints.damaged:
            self.log.note(damage, style="yellow")
        if self.folder.resumed:
            done = ", the last one: the run was done" if self.start >= total else ""
            self.log.note(
                f"resumed after step {self.start}{done}" if found else "no checkpoint to resume from: from the start"
            )
        for change in self.folder.changes:
            self.log.note(f"the recipe changed since the run began: {change}", style="yellow")

    def _log(self, resumed_step: int) -> Log | NoLog:
        """Rank 0's log; the others have none. All wait until it is open, since it cuts rows to the checkpoint."""
        opened: list[Log] = []

        def open_it() -> None:
            opened.append(
                Log(
                    self.path,
                    title=self.verb,
                    total=self.total,
                    resumed_step=resumed_step,
                    headline=self.headline,
                    sinks=self.config.sinks,
                )
            )

        ranks().from_main(open_it, "the log")
        return opened[0] if opened else NoLog()

    def _restore(self, found: Checkpoint) -> None:
        """Takes up the checkpoint's state.

        Raises SteersmanError where it does not fit the run's models, with what changed in the recipe.
        """
        try:
            self.state.load_state_dict(found.state["state"])
            self.watch.load_state_dict(found.state["health"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            changed = "; ".join(self.folder.changes) or "nothing in the recipe"
            raise SteersmanError(
                f"checkpoint {found.path}: it does not fit this run ({type(error).__name__}: {error}). Since the run "
                f"began, this changed: {changed}. Resume with what it began with, or choose another --run.dir"
            ) from error
        self.start = self.step = self.saved_step = found.step
        self._best = found.state.get("best")  # not in checkpoints of earlier versions

    def steps(self) -> Iterator[int]:
        """Step numbers from 1, after those that were done before; a checkpoint now and then, and at the end."""
        for step in range(self.start + 1, self.total + 1):
            if self.ended:
                return
            # A checkpoint is ranked by what was measured on its own weights, so a resumed run ranks alike.
            self.step, self.last_metrics, self._is_best = step, {}, False
            seed_global(self.config.seed, "step", step, ranks().rank)  # ranks share no dropout
            yield step
            ends = ranks().gather((self.signal.signal_name, self.checkpoints.failed), "the end of a step")
            came = next((name for name, _ in ends if name is not None), None)
            if any(failed for _, failed in ends):
                self.checkpoints.wait()
            self.stopped = came is not None
            due = step % self.config.save_every == 0 or step == self.total or self.ended
            if due or self.stopped or (self._is_best and self.config.keep_best > 0):
                self.save(step)
            if self.stopped:
                self.log.note(
                    f"stopped after step {step} of {self.total} by {came}; go on with --resume --run.dir {self.path}"
                )
                return

    def check(self, when: str = "before the first step") -> None:
        """For long work before the first step or after the last one: raises StoppedError, on every rank, where a
        signal asked one of them to stop; the run then counts as stopped."""
        came = next((name for name in ranks().gather(self.signal.signal_name, "a signal") if name is not None), None)
        if came is not None:
            self.stopped = True
            self.log.note(f"stopped {when} by {came}; go on with --resume --run.dir {self.path}")
            raise StoppedError

    def end(self, why: str) -> None:
        """Lets the step under way be the last one: the run is finished, though earlier than its recipe said."""
        self.ended = True
        self.log.note(f"ended after step {self.step} of {self.total}: {why}")

    def observe(self, step: int, stats: Stats, texts: Sequence[str] = ()) -> list[Finding]:
        """Logs the step's numbers and lets the watch see them; a finding of severity "stop" ends the run."""
        stats = {**stats, **text_stats(texts)}
        found = self.watch.update(step, stats)
        self.log.step(step, stats)
        if self.metric in stats:
            self._rank(stats[self.metric])
        for finding in found:
            self.log.finding(finding)
        stop = [f for f in found if f.severity == "stop"]
        if stop:
            self._halt(step, stop[0].text)
        return found

    def save(self, step: int) -> None:
        """A whole checkpoint of this step.

        Raises SteersmanError where the ranks' states are not the same, bit for bit: then they have drifted apart.
        """
        state = {"state": self.state.state_dict(), "health": self.watch.state_dict(), "best": self._best}
        require_same(state["state"])
        last = step == self.total or self.stopped or self.ended
        self.checkpoints.save(step, state, self.last_metrics, wait=not self.config.save_async or last)
        self.saved_step = step

    def keep_start(self) -> None:
        """Saves a checkpoint of step 0, which may stay the best. Where its look had no held-out value there is
        nothing to rank it by, and nothing is saved."""
        if self.last_metrics:
            self._best = self.last_metrics[self.metric]
            self.save(0)

    def best(self) -> Checkpoint | None:
        """The checkpoint whose look was best, which a note tells; None where no look measured what ranks them."""
        path = self.checkpoints.best()
        found = None if path is None else self.checkpoints.load(path)
        if found is None:
            self.log.note(f"{self.metric} was never measured, so the saved model has the last weights")
        elif found.step == 0:
            self.log.note("the saved model has the weights that training began with: no later look was better")
        else:
            self.log.note(f"the saved model has the weights of step {found.step}, the best by {self.metric}")
        return found

    def _rank(self, value: float) -> None:
        """Keeps the held-out value for the step's checkpoint, and whether it is better than every checkpoint's."""
        if not math.isfinite(value):
            return
        self.last_metrics = {self.metric: value}
        if self.step == 0:
            return
        self._is_best = self._best is None or (value > self._best if self.mode == "max" else value < self._best)
        if self._is_best:
            self._best = value

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl so far."""
        return ranks().from_main(lambda: read_jsonl(self.path / "metrics.jsonl"), "the log's rows")

    def summary(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """Writes `summary.json`: how the run ended, how long it took, and the given numbers; returns it."""
        rows = self.metrics()
        summary = {
            "verb": self.verb,
            "finished": not self.stopped,
            "steps": self.saved_step,
            "seconds": rows[-1].get("seconds", 0.0) if rows else 0.0,
            "run": str(self.path),
            **numbers,
        }
        self.write(lambda: write_atomic(self.path / "summary.json", json.dumps(summary, indent=1)))
        return summary

    def write(self, write: Callable[[], Any]) -> None:
        """Lets rank 0 write into the run folder; the others wait, and get its error."""
        ranks().from_main(lambda: (write(), None)[1], "a file")

    def _halt(self, step: int, what: str) -> None:
        kept = self.checkpoints.latest()
        where = f"the last good checkpoint is {kept}" if kept else "no checkpoint had been saved yet"
        raise SteersmanError(f"stopped at step {step}: {what.removesuffix('.')}. Nothing was saved with it; {where}")


def require_same(state: dict[str, Any]) -> None:
    """Raises SteersmanError, on every rank, where a rank's state is not rank 0's, with the first difference."""
    if ranks().world == 1:
        return
    mine = digests(state)
    every = ranks().gather(mine, "the ranks' weights")
    names = [{name.split(" piece ")[0] for name in found} for found in every]
    first: dict[str, tuple[int, str]] = {}
    for rank, found in enumerate(every):
        for name, digest in [*found.items(), *((name, "") for name in names[0] - names[rank])]:
            before, wanted = first.setdefault(name, (rank, digest))
            if digest != wanted:
                raise SteersmanError(
                    f"rank {rank} has another {name} than rank {before}: they have drifted apart, so nothing was "
                    "saved; go on from the last checkpoint, and please report this"
                )


def digests(state: Any, name: str = "") -> dict[str, str]:
    """SHA-256 of every tensor and number of a nested state, by its dotted name; that of a piece by its place too."""
    if isinstance(state, dict):
        return {k: v for key, inner in state.items() for k, v in digests(inner, f"{name}.{key}".strip(".")).items()}
    if isinstance(state, torch.Tensor):
        state, place = named_shard(state)
        name += place
        raw = state.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    else:
        raw = repr(state).encode()
    return {name: hashlib.sha256(raw).hexdigest()}


def kept_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as a checkpoint keeps them, without their gradients; those in FSDP2's pieces stay in pieces."""
    return {name: kept_tensor(tensor) for name, tensor in state.items()}
