"""The folder of a flywheel: rounds, the data that each made with where it came from, and going on after a kill.

    config.yaml, metrics.jsonl (one row a round), samples.jsonl, summary.json, report.html, judge.jsonl
    round-01/samples.jsonl, samples.provenance.json, ..., round-01/sft/ (a verb's run folder), round-01/round.json

A table is written whole or not at all, and is not made again once it is there; a long one is made in parts that
are kept. A stage that is a verb has the verb's own checkpoints. So a killed run goes on within its round.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from steersman.atomic import write_atomic
from steersman.distributed.ranks import ranks
from steersman.jsonl import jsonl_text, read_jsonl
from steersman.run.files.folder import open_folder
from steersman.run.files.log import Log, NoLog
from steersman.run.files.pieces import Pieces, Rows
from steersman.run.files.sinks import for_stages, require_sinks
from steersman.run.progress import ProgressLine
from steersman.run.report.page import write_report
from steersman.run.run_config import RunConfig, device_of
from steersman.run.seed import seed_everything
from steersman.run.stop_request import StopRequest
from steersman.types import Progress, Stats, SteersmanError

REPLIES = ("judge.jsonl", "replies.jsonl")
"""Files in which judges and writers keep replies as they come, before there is any table."""


class StoppedError(Exception):
    """A signal ended the run early; everything made so far is whole and `--resume` goes on."""


class Ledger:
    """One run of a flywheel, as a context manager that swallows `StoppedError` (then `stopped` is True).

    `rounds` counts the rounds to come; round 0 is the look at the model before any.
    """

    def __init__(self, verb: str, recipe: Any, *, resume: bool, rounds: int, headline: Sequence[str] = ()) -> None:
        self.verb, self.recipe, self.resume, self.rounds, self.headline = verb, recipe, resume, rounds, headline
        self.config: RunConfig = recipe.run
        seed_everything(self.config.seed, deterministic=self.config.deterministic)
        self.device = device_of(self.config)
        self.stopped, self.began = False, False
        self.shared: dict[str, Any] = {}
        """Sections that every stage's recipe gets."""
        self._stack, self._hashes, self._replies = ExitStack(), dict[str, str](), 0

    def __enter__(self) -> Ledger:
        require_sinks(self.config.sinks)
        self.folder = self._stack.enter_context(open_folder(Path(self.config.dir), self.recipe, resume=self.resume))
        self.path = self.folder.path
        self._replies = self._bytes_of_replies()
        self.signal = self._stack.enter_context(StopRequest())
        logged = {row.get("step") for row in self.metrics()}
        whole = [r for r in range(self.rounds + 1) if r in logged and self._there(self._round_file(r))]
        self.done = next((r - 1 for r in range(self.rounds + 2) if r not in whole), self.rounds)
        self.log: Log | NoLog = NoLog()
        if ranks().main:
            self.log = Log(
                self.path, title=self.verb, total=self.rounds, resumed_step=self.done, headline=self.headline,
                sinks=self.config.sinks,
            )  # fmt: skip
        self.log = self._stack.enter_context(self.log)
        if self.folder.resumed and self.done >= 0:
            done = ", the last one: the run was done" if self.done >= self.rounds else ""
            self.log.note(f"resumed after round {self.done}{done}")
        for change in self.folder.changes:
            self.log.note(f"the recipe changed since the run began: {change}", style="yellow")
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self.stopped = isinstance(error, StoppedError)
        holds_work = self.began or self.folder.resumed or self._bytes_of_replies() > self._replies
        if self.stopped:
            how = f"; go on with --resume --run.dir {self.path}" if holds_work else " before anything was made"
            self.log.note(f"stopped by {self.signal.signal_name}{how}")
        elif error is not None and holds_work:
            self.log.note(
                "an error ends the run; what was made before it is kept, and --resume goes on", style="yellow"
            )
        try:
            # A report that can not be written must not hide why the run failed.
            with nullcontext() if error is None else suppress(Exception):
                if ranks().main:
                    write_report(self.path)
            if error is not None and not holds_work and ranks().main:
                self.folder.forget()
        finally:
            self._stack.close()
        return self.stopped

    def at_end(self, action: Callable[[], object]) -> None:
        """Has something done when the run ends, however it ends."""
        self._stack.callback(action)

    def table(self, name: str, make: Callable[[], Rows], **about: Any) -> Rows:
        """The rows of `<name>.jsonl`: read where the file is there, else made, written whole, and returned.

        Of several ranks all make it, sharing out what they can, and rank 0 writes. `about` goes into
        `<name>.provenance.json` beside it, with the file's rows and SHA-256.
        """
        self.check()
        if not self._has(name):
            rows = make()
            self.check()
            self.began = True
            ranks().from_main(lambda: self._write(name, rows, about), "a table")
        return self.rows(name)

    def rows(self, name: str) -> Rows:
        """The rows of a table that was made, none where it was not.

        Raises SteersmanError where the file is another one than was written.
        """
        return ranks().from_main(lambda: self._read(name), "a table") if self._has(name) else []

    def provenance(self, name: str) -> dict[str, Any]:
        """What stands beside a table of where it came from; nothing where it was not made, or can not be read."""
        return ranks().from_main(lambda: self._told(name), "a table's provenance") if self._has(name) else {}

    def parts(
        self, name: str, count: int, make: Callable[[range, Progress], Rows], *, size: int = 1, **about: Any
    ) -> Rows:
        """`table` for what takes long: the rows of `count` items, made for up to `size` items at a time and kept as
        soon as they are there (`Pieces.fill`).

        Of a run that was ended meanwhile, the rows that are kept stay where `about` is still the same; where it is
        not, they are made anew, and a note says why.
        """
        pieces = Pieces(self.path / f"{name}.parts", count, about)

        def between() -> None:
            self.check()
            self.began = True

        def joined() -> Rows:
            if changes := pieces.changes():
                self.log.note(f"{name} is made anew, since the recipe changed: {'; '.join(changes)}", style="yellow")
            pieces.begin()
            return pieces.fill(size, make, ProgressLine(name), between)

        rows = self.table(name, joined, **about)
        pieces.remove()
        return rows

    def stage(self, name: str, run: Callable[..., dict[str, Any]], recipe: Callable[[Any], Any], values: Any) -> dict:
        """Runs a verb in the folder `name`, on from its newest checkpoint, or gives the summary of its finished run.

        It logs where the loop does, into runs of its own (`for_stages`). Its checkpoints go once it is finished: its
        model and summary are what the next stage needs.

        Raises SteersmanError where the verb's recipe refuses the values.
        """
        self.check()
        folder = self.path / name
        summary = ranks().from_main(lambda: _finished(folder), "a stage's summary")
        if summary is None:
            settings = self.config.model_dump() | {"sinks": for_stages(self.config.sinks)}
            values = {**values, **self.shared, "run": {**settings, **values.get("run", {}), "dir": str(folder)}}
            try:
                made = recipe(values)
            except ValidationError as error:
                raise SteersmanError(
                    f"{name}: this stage's verb refuses its settings: {refusal(error)}. Change the recipe and go on "
                    f"with --resume; everything before this stage is kept in {self.path}"
                ) from error
            summary = run(made, resume=True)
            gc.collect()  # a library's own cycles, such as DeepSpeed's engine, would keep the stage's models
            if not summary["finished"]:
                self.signal.signal_name = self.signal.signal_name or "a signal"
                raise StoppedError
        ranks().from_main(lambda: shutil.rmtree(folder / "checkpoints", ignore_errors=True), "a stage's checkpoints")
        return summary

    def finish_round(self, number: int, stats: Stats, samples: Rows) -> None:
        """Writes down the round: one row of metrics.jsonl, and the held-out answers into samples.jsonl."""
        if number > self.done:

            def write() -> None:
                self._round_file(number).parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self._round_file(number), json.dumps(stats, indent=1))
                self.log.samples(number, samples)
                self.log.step(number, stats)

            ranks().from_main(write, "a round")
        self.check()

    def check(self) -> None:
        """Raises StoppedError, on every rank, where a signal asked one of them to stop."""
        came = [name for name in ranks().gather(self.signal.signal_name, "a signal") if name is not None]
        if came:
            self.signal.signal_name = came[0]
            raise StoppedError

    def metrics(self) -> Rows:
        """The rows of metrics.jsonl so far."""
        return ranks().from_main(lambda: read_jsonl(self.path / "metrics.jsonl"), "the log's rows")

    def summary(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """Writes `summary.json`, and returns it."""
        rows = self.metrics()
        seconds = rows[-1].get("seconds", 0.0) if rows else 0.0
        told = {
            "verb": self.verb, "finished": not self.stopped, "rounds": max((r["step"] for r in rows), default=0),
            "seconds": seconds, "run": str(self.path), **numbers,
        }  # fmt: skip
        ranks().from_main(lambda: write_atomic(self.path / "summary.json", json.dumps(told, indent=1)), "a summary")
        return told

    def model(self, path: str) -> dict[str, str]:
        """A model for provenance: its path (within the run folder where it lies there) and its weights' SHA-256."""
        folder = Path(path)
        inside = folder.resolve().is_relative_to(self.path.resolve())
        shown = str(folder.resolve().relative_to(self.path.resolve())) if inside else path
        if path not in self._hashes:
            digest, files = hashlib.sha256(), sorted(folder.glob("*.safetensors"))
            for file in files:
                with file.open("rb") as opened:
                    hashlib.file_digest(opened, lambda: digest)
            self._hashes[path] = digest.hexdigest() if files else "not a local folder"
        return {"path": shown, "sha256": self._hashes[path]}

    def sources(self, *names: str) -> dict[str, str]:
        """Tables for provenance: name and SHA-256."""
        return ranks().from_main(lambda: {n: _sha256(self.path / f"{n}.jsonl") for n in names}, "tables' digests")

    def _write(self, name: str, rows: Rows, about: Mapping[str, Any]) -> None:
        path = self.path / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, jsonl_text(rows))
        told = {"file": path.name, "rows": len(rows), "sha256": _sha256(path), "seed": self.config.seed, **about}
        write_atomic(self._about(name), json.dumps(told, indent=1, ensure_ascii=False))

    def _read(self, name: str) -> Rows:
        path = self.path / f"{name}.jsonl"
        if self._told(name).get("sha256") != _sha256(path):
            raise SteersmanError(
                f"{path}: it is not what the run wrote there, by the SHA-256 in {self._about(name).name}; put both "
                "files back as they were, or remove both and run again with --resume, which makes the table anew"
            )
        return read_jsonl(path)

    def _told(self, name: str) -> dict[str, Any]:
        with suppress(ValueError):
            return json.loads(self._about(name).read_text(encoding="utf-8"))
        return {}

    def _bytes_of_replies(self) -> int:
        files = [self.path / name for name in REPLIES]
        return sum(file.stat().st_size for file in files if file.exists())

    def _has(self, name: str) -> bool:
        """Whether the table is there with where it came from, which is written last."""
        return self._there(self.path / f"{name}.jsonl", self._about(name))

    @staticmethod
    def _there(*paths: Path) -> bool:
        return ranks().from_main(lambda: all(path.exists() for path in paths), "what is there already")

    def _about(self, name: str) -> Path:
        return self.path / f"{name}.provenance.json"

    def _round_file(self, number: int) -> Path:
        return self.path / f"round-{number:02d}" / "round.json"


def refusal(error: ValidationError) -> str:
    """What a recipe refuses, in its own words, with the key where the words do not name it."""
    told = []
    for fault in error.errors():
        key = ".".join(map(str, fault["loc"]))
        what = fault["msg"].removeprefix("Value error, ")
        told.append(f"{key}: {what}" if key else what)
    return "; ".join(told)


def _finished(folder: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return summary if summary["finished"] else None
    return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
