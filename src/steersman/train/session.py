"""What every training run needs around its loop: folder, log, watch, checkpoints, and leaving in order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from steersman.ops.text import text_stats
from steersman.run.checkpoint import Checkpointer, StopRequest, rng_state, set_rng_state
from steersman.run.device import resolve_device, set_threads
from steersman.run.folder import RunFolder, write_atomic
from steersman.run.health import Finding, HealthWatch
from steersman.run.health_checks import HealthConfig
from steersman.run.log import Log, read_jsonl
from steersman.run.report import write_report
from steersman.run.seed import seed_everything
from steersman.train.sections import RunConfig
from steersman.types import Stats, SteersmanError
from steersman.update.optimizer import NotFiniteError


class Stateful(Protocol):
    """What a checkpoint holds: everything that a resumed run needs to go on bit for bit."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Session:
    """One run of a verb, as a context manager.

    `metric` names the number that ranks checkpoints for `keep_best`, and `mode` whether more of it is better.
    `steps` yields the number of each step still to do, and saves when it is time, when a signal asks for it, and
    at the end. Leaving the `with` block writes the report, also when the run failed.
    """

    def __init__(
        self,
        verb: str,
        recipe: Any,
        *,
        resume: bool,
        metric: str,
        mode: str = "max",
        shown: Sequence[str] = (),
        health: HealthConfig | None = None,
    ) -> None:
        self.verb, self.recipe, self.metric, self.mode, self.shown = verb, recipe, metric, mode, shown
        self.config: RunConfig = recipe.run
        set_threads(self.config.threads or None)
        seed_everything(self.config.seed, deterministic=self.config.deterministic)
        self.device = resolve_device(self.config.device)
        self.resume, self.watch = resume, HealthWatch(health)
        self.last_metrics: Stats = {}
        self.start, self.step, self.stopped, self.begun = 0, 0, False, False
        self._stack = ExitStack()

    def __enter__(self) -> Session:
        self.folder = self._stack.enter_context(RunFolder(Path(self.config.dir), self.recipe, resume=self.resume))
        self.path = self.folder.path
        mode: Any = self.mode
        self.checkpoints = Checkpointer(
            self.path, keep_last=self.config.keep_last, keep_best=self.config.keep_best, metric=self.metric, mode=mode
        )
        self.signal = self._stack.enter_context(StopRequest())
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if (self.path / "metrics.jsonl").exists():
                # A report that can not be written must not hide why the run failed.
                with nullcontext() if error is None else suppress(Exception):
                    write_report(self.path)
            if not self.begun and not self.folder.resumed:
                # What was refused before it began is no run: the mended recipe may use the folder.
                (self.path / "config.yaml").unlink(missing_ok=True)
        finally:
            self._stack.close()
        if isinstance(error, NotFiniteError):
            self._halt(self.step, str(error))

    def begin(self, state: Stateful, total: int) -> None:
        """Restores the newest whole checkpoint when resuming, and opens the log; `total` counts steps."""
        self.state, self.total, self.begun = state, total, True
        found = self.checkpoints.load() if self.folder.resumed else None
        if found is not None:
            state.load_state_dict(found.state["state"])
            self.watch.load_state_dict(found.state["health"])
            set_rng_state(found.state["rng"])
            self.start = found.step
        self.log = self._stack.enter_context(
            Log(
                self.path,
                title=self.verb,
                total=total,
                resumed_step=self.start if found is not None else -1,
                shown=self.shown,
                sinks=self.config.sinks,
            )
        )
        if self.folder.resumed:
            self.log.note(
                f"resumed after step {self.start}" if found else "no checkpoint to resume from: from the start"
            )
        for change in self.folder.changes:
            self.log.note(f"the recipe changed since the run began: {change}", style="yellow")

    def steps(self) -> Iterator[int]:
        """Step numbers from 1, after those that were done before; a checkpoint now and then, and at the end."""
        self.saved = self.start
        for step in range(self.start + 1, self.total + 1):
            # A checkpoint is ranked by what was measured on its own weights, so a resumed run ranks alike.
            self.step, self.last_metrics = step, {}
            yield step
            if self.signal:
                self.stopped = True
            due = step % self.config.save_every == 0 or step == self.total
            if due or self.stopped or self._is_best():
                self.save(step)
            if self.stopped:
                self.log.note(
                    f"stopped after step {step} of {self.total} by {self.signal.signal_name}; "
                    f"go on with --resume --run.dir {self.path}"
                )
                return

    def observe(self, step: int, stats: Stats, texts: Sequence[str] = ()) -> list[Finding]:
        """Logs the step's numbers and lets the watch see them; a finding of severity "stop" ends the run."""
        stats = {**stats, **text_stats(texts)}
        found = self.watch.update(step, stats)
        self.log.step(step, stats)
        if self.metric in stats:
            self.last_metrics = {self.metric: stats[self.metric]}
        for finding in found:
            self.log.finding(finding)
        stop = [f for f in found if f.severity == "stop"]
        if stop:
            self._halt(step, stop[0].text)
        return found

    def save(self, step: int) -> None:
        """A whole checkpoint of this step."""
        state = {"state": self.state.state_dict(), "health": self.watch.state_dict(), "rng": rng_state()}
        self.checkpoints.save(step, state, self.last_metrics)
        self.saved = step

    def _is_best(self) -> bool:
        """Whether this step measured the best held-out value so far, and the best are to be kept."""
        seen = [row[self.metric] for row in self.metrics() if self.metric in row] if self.last_metrics else []
        if self.config.keep_best == 0 or len(seen) < 2:
            return False
        return seen[-1] > max(seen[:-1]) if self.mode == "max" else seen[-1] < min(seen[:-1])

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl so far."""
        return read_jsonl(self.path / "metrics.jsonl")

    def summary(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """Writes `summary.json`: how the run ended, how long it took, and the given numbers; returns it."""
        rows = self.metrics()
        summary = {
            "verb": self.verb,
            "finished": not self.stopped,
            "steps": self.saved,
            "seconds": rows[-1].get("seconds", 0.0) if rows else 0.0,
            "run": str(self.path),
            **numbers,
        }
        write_atomic(self.path / "summary.json", json.dumps(summary, indent=1))
        return summary

    def _halt(self, step: int, what: str) -> None:
        kept = self.checkpoints.latest()
        where = f"the last good checkpoint is {kept}" if kept else "no checkpoint had been saved yet"
        raise SteersmanError(f"stopped at step {step}: {what}. Nothing was saved with it; {where}")


def to_cpu(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors copied to the CPU, so that a checkpoint does not hold what training goes on changing."""
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
