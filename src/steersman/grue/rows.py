"""A task's rows, read, laid out, merged by prompt, split, counted and written as the verbs' data files."""

from __future__ import annotations

import difflib
import hashlib
import string
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steersman.atomic import write_atomic
from steersman.data import read_rows
from steersman.grue.recipe import DataSource, GrueRecipe
from steersman.grue.task import Hub, Row, Task, first_words
from steersman.jsonl import jsonl_text
from steersman.types import SteersmanError


@dataclass(frozen=True, slots=True)
class TaskRows:
    """Rows with `prompt`, `references` and the task's other fields, one per prompt; no prompt is on both sides."""

    train: list[Row]
    held_out: list[Row]
    note: str


def task_rows(task: Task, recipe: GrueRecipe) -> TaskRows:
    """Both splits of a task as the recipe asks for them.

    Of each split the prompts of smallest hash are taken, so that neighbours in a file do not crowd a small set.
    Raises SteersmanError naming the task, the split, and the row where there is one.
    """
    data, own = recipe.data, recipe.per_task.get(task.name)
    words = (own.words if own else None) or task.words
    empty: list[str] = []
    train = _merged(task, _read(task, data, data.train_split), words, empty)
    held = _merged(task, _read(task, data, data.held_out_split), words, empty)
    shared = train.keys() & held.keys()
    kept = {prompt: row for prompt, row in train.items() if prompt not in shared}
    if not kept:
        raise SteersmanError(
            f"task {task.name}: every prompt of the split {data.train_split!r} is in {data.held_out_split!r} too"
        )
    first = _smallest(kept, (own.train if own else None) or data.train)
    second = _smallest(held, (own.held_out if own else None) or data.held_out)
    note = f"{len(first)} of {len(train)} training prompts, {len(second)} of {len(held)} held out"
    note += f"; {len(shared)} training prompts are held out" if shared else ""
    note += f"; {len(empty)} empty references left out, the first in {empty[0]}" if empty else ""
    return TaskRows(first, second, note)


def write_rows(folder: Path, task: Task, rows: TaskRows) -> None:
    """The data files of a task's cells: demonstrations and prompts, of both sides.

    Raises SteersmanError where files of other rows are there, from which other cells were made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "demonstrations": demonstrations(task, rows.train),
        "held-out-demonstrations": demonstrations(task, rows.held_out),
        "prompts": rows.train,
        "held-out": rows.held_out,
    }
    for name, table in tables.items():
        text = jsonl_text(table)
        path = folder / f"{name}.jsonl"
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise SteersmanError(
                f"task {task.name}: {path} holds other rows than the recipe asks for now; its cells can not be "
                "compared with new ones: take the data settings back, or choose another --run.dir"
            )
        if not path.exists():
            write_atomic(path, text)


def demonstrations(task: Task, rows: Iterable[Row]) -> list[Row]:
    """What the supervised cells learn: each reference of the rows that are taught."""
    taught = [row for row in rows if task.taught is None or task.taught(row)]
    return [{"prompt": row["prompt"], "completion": text} for row in taught for text in row["references"]]


def _smallest(rows: dict[str, Row], count: int) -> list[Row]:
    return [rows[p] for p in sorted(rows, key=lambda p: hashlib.sha256(p.encode()).hexdigest())[:count]]


def _read(task: Task, data: DataSource, split: str) -> Iterable[Row]:
    if data.source == "files":
        if task.files is None:
            raise SteersmanError(f"task {task.name}: it reads no local files; set data.source: hub")
        _check_split(task, split, task.file_splits)
        folder = Path(data.folder or ".")
        if not folder.is_dir():
            raise SteersmanError(f"task {task.name}: data.folder {folder}: there is no such folder")
        count = 0
        try:
            for row in task.files(folder, split):
                count += 1
                yield row
        except SteersmanError as error:
            raise SteersmanError(f"task {task.name}: {error}") from error
        except Exception as error:
            raise SteersmanError(
                f"task {task.name}: reading split {split!r} in {folder}, after {count} rows: "
                f"{type(error).__name__}: {error}"
            ) from error
        return
    if task.original is None:
        raise SteersmanError(f"task {task.name}: it names no original set; set data.source: files")
    _check_split(task, split, task.original.splits)
    yield from _original(task, task.original, split, data.folder)


def _check_split(task: Task, split: str, known: Iterable[str]) -> None:
    if split not in known:
        near = difflib.get_close_matches(split, list(known), n=1)
        hint = f"did you mean {near[0]}?" if near else ""
        raise SteersmanError(
            f"task {task.name}: it has no split '{split}'; it has {', '.join(known)}. {hint}".rstrip(" .")
        )


def _original(task: Task, hub: Hub, split: str, folder: str | None) -> Iterable[Row]:
    """Rows of a saved copy under `folder`, else of the hub."""
    place: str | list[str] = hub.name
    if folder is not None:
        copy = Path(folder) / task.name
        if not copy.is_dir():
            raise SteersmanError(f"task {task.name}: there is no copy {copy}.{_how(task, hub)}")
        saved = any((copy / name).exists() for name in ("dataset_dict.json", "dataset_info.json"))
        place = str(copy) if saved else [str(p) for p in sorted(copy.glob(f"{hub.splits[split]}*"))]
        if not place:
            raise SteersmanError(f"task {task.name}: {copy} has no file {hub.splits[split]}*.{_how(task, hub)}")
    try:
        for row in read_rows(place, subset=hub.subset, hub_split=hub.splits[split]):
            try:
                if hub.belongs is None or hub.belongs(row.data, split):
                    yield from hub.rows(row.data)
            except (KeyError, TypeError, IndexError, ValueError) as error:
                raise SteersmanError(
                    f"{row.where()}: not a row of {hub.name}: {type(error).__name__} {error}; it has the columns "
                    f"{', '.join(row.data)}"
                ) from error
    except SteersmanError as error:
        more = _how(task, hub) if folder is None else ""
        raise SteersmanError(f"task {task.name}: {error}{more}") from error


def _how(task: Task, hub: Hub) -> str:
    if hub.how_to_get is not None:
        return f" {hub.how_to_get}, then data.folder: sets. Or read stand-ins: data.source: files"
    arguments = ", ".join(repr(a) for a in (hub.name, hub.subset) if a)
    return (
        f' Where there is network: python -c "import datasets; datasets.load_dataset({arguments})'
        f".save_to_disk('sets/{task.name}')\", then data.folder: sets. Or read stand-ins: data.source: files"
    )


def _merged(task: Task, rows: Iterable[Row], words: int | None, empty: list[str]) -> dict[str, Row]:
    """Rows by prompt; `empty` gets the places of references that are left out."""
    out: dict[str, Row] = {}
    for number, given in enumerate(rows, 1):
        where = f"task {task.name}, row {number}"
        row = _laid_out(task, given, words, where)
        empty += [f"row {number}"] * (len(given.get("references", [])) - len(row["references"]))
        before = out.setdefault(row["prompt"], row)
        if before is not row:
            before["references"] = list(dict.fromkeys([*before["references"], *row["references"]]))
    if not out:
        raise SteersmanError(f"task {task.name}: a split without rows; look at the task's reader or the files")
    return out


def _laid_out(task: Task, given: Any, words: int | None, where: str) -> Row:
    if not isinstance(given, dict):
        raise SteersmanError(f"{where}: the reader gives {type(given).__name__}; give a dict of fields")
    references = given.get("references", [])
    if not isinstance(references, list) or not all(isinstance(r, str) for r in references):
        raise SteersmanError(f"{where}: references must be a list of texts")
    fields = {name: ", ".join(map(str, v)) if isinstance(v, list | tuple) else v for name, v in given.items()}
    if task.cut is not None and words is not None and isinstance(fields.get(task.cut), str):
        lines = fields[task.cut]
        fields[task.cut] = lines if len(lines.split()) <= words else first_words(lines, words)[0]
    wanted = [name for _, name, _, _ in string.Formatter().parse(task.prompt) if name is not None]
    for name in wanted:
        if name not in fields:
            raise SteersmanError(f"{where}: the prompt needs '{name}', and the row has {', '.join(fields)}")
    prompt = task.prompt.format_map(fields)
    if not prompt.strip():
        raise SteersmanError(f"{where}: the prompt is empty")
    return {**given, "prompt": prompt, "references": [r for r in references if r.strip()]}
