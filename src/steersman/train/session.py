"""What every training run needs around its loop: folder, log, watch, checkpoints, and leaving in order."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from steersman.atomic import write_atomic
from steersman.distributed.pieces import kept_tensor, named_shard
from steersman.distributed.ranks import ranks
from steersman.guards.user_code import CtrlCError
from steersman.jsonl import read_jsonl
from steersman.ops.text import text_stats
from steersman.run.files.checkpoint import Checkpoint, Checkpointer
from steersman.run.files.folder import open_folder
from steersman.run.files.ledger import StoppedError
from steersman.run.files.log import Log, NoLog
from steersman.run.files.sinks import require_sinks
from steersman.run.health.limits import HealthConfig
from steersman.run.health.watch import HealthWatch, non_finite
from steersman.run.report.card import write_card
from steersman.run.report.page import write_report
from steersman.run.run_config import RunConfig, device_of
from steersman.run.seed import seed_everything, seed_global
from steersman.run.stop_request import StopRequest
from steersman.types import Stats, SteersmanError
from steersman.update.optimizer import NotFiniteError

Look = Callable[[], Stats]


class Stateful(Protocol):
    """What a checkpoint holds: everything that a resumed run needs to go on bit for bit.

    An error may end a step at any place. Until the step changes weights, the step before it can still be saved: a
    step sets `whole` to False just before it does, and the session sets it to True once the step is done. `position`
    is the part of `state_dict` that a step moves earlier than that, such as the order of the data.
    """

    whole: bool

    def position(self) -> dict[str, Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Mark:
    """How things stood when step `step` was done: what its checkpoint holds beside the weights.

    `owed` are the step's numbers where they are not written down yet: its look comes first, which may fail.
    """

    step: int
    position: dict[str, Any]
    health: dict[str, Any]
    best: float | None
    metrics: Stats
    owed: dict[str, Any] | None


class Session:
    """One run of a verb, as a context manager.

    `metric` names the number that ranks checkpoints for `keep_best`, and `mode` whether more of it is better.
    `steps` yields the number of each step still to do, and saves when it is time, when a look finds something better
    than every checkpoint has, when a signal asks for it, and at the end. The weights that training begins with are
    in no checkpoint, and so no rival, unless `keep_start` saves them. Leaving the `with` block writes the report,
    also when the run failed.

    An error that leaves the block saves the last whole step, if it is not saved yet, and its message says so. Nothing
    is saved with numbers that are not finite, while a step changes weights, after a second Ctrl-C, and where several
    ranks do not all end by an error at the same place. A step that is to be saved and looked at is saved first.
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
        self._mark: Mark | None = None
        self._owed: dict[str, Any] | None = None
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
            if error is not None:
                self._keep_last_step(error)
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
        logged = self.start if self._owed is None else self.start - 1
        self.log = self._stack.enter_context(self._log(logged if found is not None else -1))
        for damage in self.checkpoints.damaged:
            self.log.note(damage, style="yellow")
        if self.folder.resumed:
            done = ", the last one: the run was done" if self.start >= total and self._owed is None else ""
            self.log.note(
                f"resumed after step {self.start}{done}" if found else "no checkpoint to resume from: from the start"
            )
        for change in self.folder.changes:
            self.log.note(f"the recipe changed since the run began: {change}", style="yellow")
        self._set_mark(self.start, self._owed)

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
        self._owed = found.state.get("owed")

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
            due = self._due(step) or self.ended
            if self.saved_step < step and (due or self.stopped or (self._is_best and self.config.keep_best > 0)):
                self.save(step)
            if self.stopped:
                self.log.note(
                    f"stopped after step {step} of {self.total} by {came}; go on with --resume --run.dir {self.path}"
                )
                return

    def _due(self, step: int) -> bool:
        """Whether the step has a checkpoint, whatever came of it."""
        return step % self.config.save_every == 0 or step == self.total

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

    def observe(
        self,
        step: int,
        stats: Stats,
        texts: Sequence[str] = (),
        *,
        publish: Look | None = None,
        look: Look | None = None,
    ) -> Stats:
        """Logs the step's numbers, which it returns, and lets the watch see them; a finding of severity "stop" ends
        the run.

        The step's weights are final by now. What may fail comes here: `publish` hands them to whatever samples, and
        `look` measures them. Both give numbers of the step. A look that failed is made up for by a resumed run.
        """
        owed = {"stats": _plain(stats), "texts": _plain(text_stats(texts)), "look": look is not None}
        self._set_mark(step, owed)
        if publish is not None:
            stats = {**stats, **publish()}
        return self._observe(step, stats, owed["texts"], look, save_first=self._due(step))

    def make_up(self, look: Look) -> None:
        """Where the checkpoint's step had not been looked at, does so now, and logs its numbers."""
        owed, self._owed = self._owed, None
        if owed is not None:
            self._observe(self.step, owed["stats"], owed["texts"], look if owed["look"] else None)

    def _observe(
        self, step: int, stats: Stats, texts: Stats, look: Look | None, *, save_first: bool = False
    ) -> Stats:
        if look is not None:
            if save_first and non_finite(step, {**stats, **texts}) is None:
                self.save(step, settled=False)
            stats = {**stats, **look()}
        stats = {**stats, **texts}
        found = self.watch.update(step, stats)
        self.log.step(step, stats)
        if self.metric in stats:
            self._rank(stats[self.metric])
        for finding in found:
            self.log.finding(finding)
        stop = [f for f in found if f.severity == "stop"]
        if stop:
            if step and self.saved_step == step:
                self.checkpoints.drop(step)
            self._halt(step, stop[0].text)
        mark = self._set_mark(step)
        if step and self.saved_step == step:
            self.checkpoints.settle(step, _beside(mark), mark.metrics)
        return stats

    def _set_mark(self, step: int, owed: dict[str, Any] | None = None) -> Mark:
        """Marks the step as whole."""
        self.state.whole = True
        position, health = copy.deepcopy((self.state.position(), self.watch.state_dict()))
        self._mark = Mark(step, position, health, self._best, dict(self.last_metrics), owed)
        return self._mark

    def save(self, step: int, *, settled: bool = True) -> None:
        """A whole checkpoint of this step, which is the last whole one; not `settled` before its look.

        Raises SteersmanError where the ranks' states are not the same, bit for bit: then they have drifted apart.
        """
        mark, self._mark = self._mark, None  # what can not be saved is not tried again
        assert mark is not None
        last = step == self.total or self.stopped or self.ended
        self._save(mark, wait=not self.config.save_async or last, settled=settled)
        self._mark = mark

    def _save(self, mark: Mark, *, wait: bool, settled: bool) -> None:
        state = {"state": _with(self.state.state_dict(), mark.position), **_beside(mark)}
        require_same(state["state"])
        self.checkpoints.save(mark.step, state, mark.metrics, wait=wait, settled=settled)
        self.saved_step = mark.step

    def _keep_last_step(self, error: BaseException) -> None:
        """Saves the last whole step, where an error ends the run and that can be done, and adds to the error's
        message what is saved."""
        if not self.begun or isinstance(error, (StoppedError, NotFiniteError, CtrlCError)):
            return
        mark, before = self._mark, self.saved_step
        kept = f"step {before} is the last that is saved; --resume goes on from it" if before else "nothing is saved"
        if mark is None:
            told = ""
        elif mark.step == before:
            told = f"step {before} is saved: mend what failed and go on with --resume" if before else ""
        elif not self.state.whole:
            told = f"step {self.step} had begun to change the weights and can not be saved: {kept}"
        elif not ranks().waits.ends_alike(f"step {mark.step}"):
            told = f"step {mark.step} is not saved, since not every rank ended there by an error: {kept}"
        else:
            try:
                self._save(mark, wait=True, settled=mark.owed is None)
                told = f"step {mark.step} is saved: mend what failed and go on with --resume"
            except Exception as other:
                told = f"step {mark.step} could not be saved ({type(other).__name__}: {other}): {kept}"
        if told:
            told = told[0].upper() + told[1:]
            if isinstance(error, SteersmanError):
                error.args = (f"{str(error).removesuffix('.')}. {told}",)
            elif isinstance(error, Exception):
                error.add_note(told)
            else:  # an interrupt or exit, whose own words nobody shows
                self.log.note(told, style="yellow")

    def keep_start(self) -> None:
        """Saves a checkpoint of step 0, which may stay the best. Where its look had no held-out value there is
        nothing to rank it by, and nothing is saved."""
        if self.last_metrics:
            self._best = self.last_metrics[self.metric]
            self._set_mark(0)
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
        self._mark = None
        kept = self.checkpoints.latest()
        where = f"the last good checkpoint is {kept}" if kept else "no checkpoint had been saved yet"
        raise SteersmanError(f"stopped at step {step}: {what.removesuffix('.')}. Nothing was saved with it; {where}")


def _plain(stats: Stats) -> Stats:
    """The numbers as a checkpoint can hold them."""
    return {name: x if type(x) in (int, float) else float(x) for name, x in stats.items()}


def _beside(mark: Mark) -> dict[str, Any]:
    """What a checkpoint holds beside the state of the run."""
    return {"health": mark.health, "best": mark.best, "owed": mark.owed}


def _with(state: dict[str, Any], position: dict[str, Any]) -> dict[str, Any]:
    """The state with the position, which is a part of it, in the place of its own."""
    both = {name: (state[name], part) for name, part in position.items()}
    nested = {name: _with(*two) if isinstance(two[1], dict) and two[1] else two[1] for name, two in both.items()}
    return {**state, **nested}


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
