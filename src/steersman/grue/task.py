"""What a task is: rows, a prompt layout, a reward, metrics and generation settings, in one file."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steersman.jsonl import parse_jsonl
from steersman.types import SteersmanError

Row = dict[str, Any]
"""The fields of a prompt, `references` (a list of texts) and the columns that metrics need."""

TASKS = {
    "imdb": "steersman.grue.tasks.imdb",
    "commongen": "steersman.grue.tasks.commongen",
    "summarisation": "steersman.grue.tasks.summarisation",
    "table-to-text": "steersman.grue.tasks.table_to_text",
    "narrative-qa": "steersman.grue.tasks.narrative_qa",
    "translation": "steersman.grue.tasks.translation",
    "dialogue": "steersman.grue.tasks.dialogue",
}


@dataclass(frozen=True, slots=True)
class Hub:
    """The original data set: its name and configuration on the hub, our splits as its splits, and how a row reads.

    `rows` makes the task's rows, none, one or several, of one row of the set. `belongs(row, split)` says whether a
    row of the set is in a split of ours, where two of ours share one of its. `rewards` and `metrics` stand in the
    place of the task's where the original is read. `how_to_get` says where the set is to be had if `datasets` does
    not load it by its name.
    """

    name: str
    splits: Mapping[str, str]
    rows: Callable[[Row], Iterable[Row]]
    subset: str | None = None
    how_to_get: str | None = None
    belongs: Callable[[Row, str], bool] | None = None
    rewards: Mapping[str, Mapping[str, Any]] | None = None
    metrics: Mapping[str, Mapping[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of text.

    `prompt` is a template over the fields of a row; a list in a field is joined by commas. `files(folder, split)`
    gives the rows of a split from local files: a stand-in of the original's shape, or data of one's own.
    `rewards` and `metrics` are written as in a recipe: name -> {metric: ..., args: ..., columns: ...}, for rewards
    also builtin, function, model and weight. `generation` has fields of the recipe's `rollout` section. Rows of
    one prompt become one row with all their references and the other columns of the first. `taught` says of which
    rows the references are demonstrations of the supervised cells; all are without it. `cut` names the field that
    is cut to its first `words` words.
    """

    name: str
    about: str
    prompt: str
    rewards: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, Mapping[str, Any]]
    generation: Mapping[str, Any]
    original: Hub | None = None
    files: Callable[[Path, str], Iterable[Row]] | None = None
    file_splits: tuple[str, ...] = ("train", "validation")
    answer_prefix: str = " "
    cut: str | None = None
    words: int | None = None
    taught: Callable[[Row], bool] | None = None
    notes: tuple[str, ...] = field(default=())

    def of_original(self) -> Task:
        """The task as it is where its original is read, with the original's own rewards and metrics."""
        hub = self.original
        if hub is None:
            return self
        return replace(self, rewards=hub.rewards or self.rewards, metrics=hub.metrics or self.metrics)


def load_task(name: str) -> Task:
    """The task of that name, or the `TASK` of a Python file.

    Raises SteersmanError for an unknown name (with the nearest one), a file that does not load, or one without a
    Task by that name.
    """
    if name in TASKS:
        return importlib.import_module(TASKS[name]).TASK
    if not name.endswith(".py"):
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(TASKS)}"
        raise SteersmanError(
            f"tasks: there is no task '{name}'; {hint} A task of one's own is a path such as my_task.py"
        )
    found = _from_file(name)
    if not isinstance(found, Task):
        raise SteersmanError(f"tasks: {name}: TASK is {type(found).__name__}; make it a steersman.grue.Task")
    if found.name in TASKS:
        raise SteersmanError(f"tasks: {name}: the name '{found.name}' is taken by a task of the project")
    return found


def _from_file(path: str) -> Any:
    if not Path(path).is_file():
        raise SteersmanError(f"tasks: there is no file {path} (looked from {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SteersmanError(f"tasks: {path}: {type(error).__name__}: {error}") from error
    if not hasattr(module, "TASK"):
        raise SteersmanError(f"tasks: {path}: it has no TASK; write TASK = Task(...)")
    return module.TASK


def in_split(key: str, split: str, share: float = 0.1) -> bool:
    """Whether `key` is in the split: "validation" is the share of keys of smallest hash, "train" the others.

    For data without splits of their own; a key's place depends on nothing but itself.
    """
    small = int(hashlib.sha256(key.encode()).hexdigest()[:13], 16) / 16**13 < share
    return small == (split != "train")


def json_lines(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file; raises SteersmanError where there is none, and for a line that is no JSON."""
    return (row for _, row in parse_jsonl(_there(path)))


def text_lines(path: Path) -> list[str]:
    """The lines of a text file, which a line feed ends, alone or behind a carriage return; U+2028 and its like stand
    in the text. Raises SteersmanError where there is no such file."""
    text = _there(path).read_bytes().decode("utf-8")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def text_of(path: Path) -> str:
    """The whole file; raises SteersmanError where there is none."""
    return _there(path).read_text(encoding="utf-8")


def _there(path: Path) -> Path:
    if not path.is_file():
        raise SteersmanError(
            f"there is no file {path}; point data.folder at the folder that holds {path.parent.name}/"
        )
    return path


def first_words(text: str, count: int) -> tuple[str, str]:
    """(the first `count` words, the rest), white space joined."""
    listed = text.split()
    return " ".join(listed[:count]), " ".join(listed[count:])
