"""Where else a run's numbers go: trackers by name, or a class of one's own by its path.

A sink is a class: `Sink(folder, resumed_step)` opens it, `log(step, stats)` takes a step's numbers, `close()` ends
it. One run folder is one run over there too, however often it is resumed. Every tracker here holds a run of its own
and leaves its package's active run alone, so that a loop's run goes on beside those of the loop's stages.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import uuid
from collections.abc import Callable, Sequence
from contextvars import Context
from pathlib import Path
from typing import Any, Protocol

from steersman.atomic import write_atomic
from steersman.guards.functions import load_function
from steersman.guards.raised import keep_traceback, place_of, user_errors
from steersman.guards.user_code import user_code
from steersman.run.files.folder import IDENTITY
from steersman.types import Stats, SteersmanError


class Sink(Protocol):
    """Takes a run's numbers somewhere. `stats` are plain numbers by name."""

    def log(self, step: int, stats: Stats) -> None: ...

    def close(self) -> None: ...


class Tensorboard:
    """Event files in the run folder; what a resumed run does again is purged."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def log(self, step: int, stats: Stats) -> None:
        for key, value in stats.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases, project steersman. W&B itself passes over the steps that a resumed run does again."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        wandb = importlib.import_module("wandb")
        self.run = wandb.init(
            project="steersman", name=run_name(folder), id=identity(folder), resume="allow", dir=str(folder),
            reinit="create_new",
        )  # fmt: skip

    def log(self, step: int, stats: Stats) -> None:
        self.run.log(dict(stats), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """Trackio, a local tracker with wandb's interface, project steersman.

    It takes nothing back, so the steps that a resumed run does again are passed over: their first numbers stay.
    """

    def __init__(self, folder: Path, resumed_step: int) -> None:
        trackio = importlib.import_module("trackio")
        name = f"{run_name(folder)}-{identity(folder)}"
        # `init` ends the run that is active in its context, which in a loop is the loop's: it gets an empty one.
        self.run = Context().run(trackio.init, project="steersman", name=name, resume="allow")
        self.next_step: int = self.run._next_step  # nothing public tells the last step that a run has

    def log(self, step: int, stats: Stats) -> None:
        if step >= self.next_step:
            self.run.log(dict(stats), step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """MLflow, experiment steersman, where MLFLOW_TRACKING_URI says.

    It takes nothing back, so the steps that a resumed run does again are passed over: their first numbers stay.
    """

    def __init__(self, folder: Path, resumed_step: int) -> None:
        self.mlflow = importlib.import_module("mlflow")
        self.client = self.mlflow.MlflowClient()
        name = f"{run_name(folder)}-{identity(folder)}"
        known = self.client.get_experiment_by_name("steersman")
        experiment = known.experiment_id if known else self.client.create_experiment("steersman")
        found = self.client.search_runs([experiment], f"attributes.run_name = '{name}'")
        if found:
            self.run = found[0].info.run_id
            self.client.update_run(self.run, status="RUNNING")
            self.next_step = max((metric.step for metric in found[0].data.to_proto().metrics), default=-1) + 1
        else:
            tags = importlib.import_module("mlflow.tracking.context.registry").resolve_tags()
            self.run = self.client.create_run(experiment, run_name=name, tags=tags).info.run_id
            self.next_step = 0

    def log(self, step: int, stats: Stats) -> None:
        if step >= self.next_step:
            self.mlflow.log_metrics(dict(stats), step=step, run_id=self.run)

    def close(self) -> None:
        self.client.set_terminated(self.run)


class SwanLab:
    """SwanLab, project steersman. It has one run per process, so a loop's stages log nothing there (`for_stages`)."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        swanlab = importlib.import_module("swanlab")
        self.run = swanlab.init(
            project="steersman", experiment_name=run_name(folder), id=identity(folder) * 2, resume="allow",
            logdir=str(folder / "swanlab"),
        )  # fmt: skip

    def log(self, step: int, stats: Stats) -> None:
        self.run.log(dict(stats), step=step)

    def close(self) -> None:
        self.run.finish()


SINKS: dict[str, Callable[[Path, int], Sink]] = {
    "tensorboard": Tensorboard, "wandb": Wandb, "trackio": Trackio, "mlflow": MLflow, "swanlab": SwanLab,
}  # fmt: skip

ONE_RUN_PER_PROCESS = ("swanlab",)
"""Trackers that can not log a loop and its stages side by side."""

_LONGEST = 60.0
"""Seconds that a sink may take for the numbers of one step."""


class Sinks:
    """The sinks of a run. What was trained is worth more than a tracker: one that fails is dropped, and told by
    `tell` when it does and at the end.

    Raises SteersmanError where a sink does not open: before the run begins that is cheap to mend.
    """

    def __init__(self, names: Sequence[str], folder: Path, resumed_step: int, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.open = {name: open_sink(name, folder, resumed_step) for name in names}
        self.dropped: dict[str, str] = {}

    def log(self, step: int, stats: Stats) -> None:
        """Hands a step's numbers to every sink that still works."""
        for name, sink in list(self.open.items()):
            try:
                with user_code(f"sink '{name}'", _LONGEST):
                    sink.log(step, dict(stats))
            except Exception as error:
                said = _said(name, error)
                self.dropped[name] = f"the sink '{name}' failed at step {step} and gets no more: {said}"
                self.tell(f"{self.dropped[name]}. metrics.jsonl has every number; the run goes on")
                self._close(name)

    def close(self) -> None:
        """Closes those that still work, and tells again which do not."""
        for why in self.dropped.values():
            self.tell(why)
        for name in list(self.open):
            if (why := self._close(name)) is not None:
                self.tell(f"the sink '{name}' failed as it was closed: {why}")

    def _close(self, name: str) -> str | None:
        try:
            with user_code(f"sink '{name}'", _LONGEST):
                self.open.pop(name).close()
        except Exception as error:
            return _said(name, error)
        return None


def _said(name: str, error: Exception) -> str:
    if isinstance(error, SteersmanError):
        return str(error)
    who = f"sink '{name}'"
    return f"{type(error).__name__}: {error}{place_of(error)}{keep_traceback(who, error)}"


def require_sinks(names: Sequence[str]) -> None:
    """Raises SteersmanError for a name that is unknown and for a package that is missing, so that a run is refused
    before it takes its folder."""
    for name in names:
        if ":" in name:
            continue
        if name not in SINKS:
            raise SteersmanError(f"there is no sink {name!r}; known are {', '.join(SINKS)}, or my_sinks.py:Class")
        if importlib.util.find_spec(name) is None:
            raise SteersmanError(f"the sink {name!r} is not installed: pip install 'steersman[{name}]'")


def open_sink(name: str, folder: Path, resumed_step: int) -> Sink:
    """The tracker of that name, or the class at `my_sinks.py:Class`; steps after `resumed_step` (-1: all) come again.

    Raises SteersmanError for a name that is unknown, a package that is missing, and a sink that does not open.
    """
    require_sinks([name])
    if ":" in name:
        made: Any = load_function(name)
        try:
            inspect.signature(made).bind(folder, resumed_step)
        except TypeError as error:
            raise SteersmanError(
                f"sink '{name}': it is made from (folder, resumed_step), which its constructor does not take: {error}"
            ) from error
        with user_errors(f"sink '{name}': opening it"):
            sink = made(folder, resumed_step)
        missing = [part for part in ("log", "close") if not callable(getattr(sink, part, None))]
        if missing:
            raise SteersmanError(
                f"sink '{name}' has no method {' and no '.join(missing)} (see run/files/sinks.py: Sink)"
            )
        return sink
    try:
        return SINKS[name](folder, resumed_step)
    except Exception as error:
        raise SteersmanError(f"the sink {name!r} did not open: {type(error).__name__}: {error}") from error


def for_stages(names: Sequence[str]) -> list[str]:
    """The sinks of a loop that its stages log to as well, each into a run of its own."""
    return [name for name in names if name not in ONE_RUN_PER_PROCESS]


def identity(folder: Path) -> str:
    """Twelve letters that stand for the run in a folder, kept there: one that begins anew there is another run."""
    kept = folder / IDENTITY
    if not kept.exists():
        write_atomic(kept, uuid.uuid4().hex[:12])
    return kept.read_text(encoding="utf-8").strip()


def run_name(folder: Path) -> str:
    """What a run is called over there: its folder's name, behind those from its loop's folder on where it is a
    stage, as in `arena-round-01-train`."""
    folder = folder.resolve()
    loops = [p for p in folder.parents if (p / "config.yaml").exists() and (p / "inputs.json").exists()]
    return "-".join(folder.relative_to(loops[-1].parent).parts) if loops else folder.name
