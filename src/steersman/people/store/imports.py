"""Judgements that other programs collected: Open WebUI's exports, Label Studio's, and any file of the data room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steersman.data import DataConfig, RowError
from steersman.data.examples import Content, Demonstration, Example, Feedback, Preference, Ranking, Rating
from steersman.data.load import load, recognise_kind
from steersman.data.read import local_files
from steersman.guards.untrusted import UntrustedError, parse_json
from steersman.people.store.conversations import TurnText
from steersman.people.store.database import Store, now
from steersman.people.store.imported import STARS, ImportCounts, Told, store_told, told_of_item
from steersman.people.store.label_studio import read_task
from steersman.people.store.open_webui import is_open_webui, read_record, store_chats
from steersman.people.store.raters import imported_name
from steersman.types import SteersmanError

CHOICES: dict[float, int | str] = {1.0: 0, 0.5: "tie", 0.0: 1}
"""A vote for the chosen one of two answers as a choice."""


def import_file(store: Store, path: str | Path) -> ImportCounts:
    """Takes over the judgements of a file, which is read to its end before the first one is stored.

    Raises SteersmanError, with file and record, for a file that is none of the kinds that are known.
    """
    path = Path(path)
    done = ImportCounts()
    records, as_of = _json_records(path), _written(path)
    told: list[Told] = []
    if records and is_open_webui(records[0]):
        chats = []
        for number, record in enumerate(records, 1):
            with _guarded(f"{path}, record {number}"):
                chat = read_record(record, as_of, done)
            if chat is not None:
                chats.append(chat)
                told += chat.told
        store_chats(store, chats)
    elif records and isinstance(records[0].get("annotations"), list) and isinstance(records[0].get("data"), dict):
        for number, record in enumerate(records, 1):
            with _guarded(f"{path}, task {number}"):
                told += read_task(record, done, stem=path.stem, as_of=as_of)
    else:
        told = _data_file(path, as_of, done)
    store_told(store, told, done)
    return done


def check_names(paths: list[str]) -> None:
    """Raises SteersmanError for two imports of one name: a file's rows and their rater are known by it."""
    for name, count in Counter(Path(path).name for path in paths).items():
        if count > 1:
            raise SteersmanError(
                f"imports: {count} files are called {name}, and an import is known by its name: a second one is the "
                "first one's later state; give them different names"
            )


def _written(path: Path) -> float:
    """When the file, or the newest of a folder's or pattern's, was written; now for a hub data set."""
    return max((file.stat().st_mtime for file in local_files(path) or []), default=now())


def _json_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list; none where the file is something else, which the data room then reads."""
    if path.suffix.lower() != ".json":
        return []
    try:
        got = parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        raise SteersmanError(f"{path}: it can not be read ({error.strerror})") from None
    except (UntrustedError, ValueError) as error:
        raise SteersmanError(f"{path}: no JSON that can be read ({error})") from None
    return got if isinstance(got, list) and got and all(isinstance(r, dict) for r in got) else []


@contextmanager
def _guarded(where: str) -> Iterator[None]:
    try:
        yield
    except SteersmanError as error:
        raise SteersmanError(f"{where}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise SteersmanError(f"{where}: not as this program writes it ({type(error).__name__}: {error})") from error


def _data_file(path: Path, as_of: float, done: ImportCounts) -> list[Told]:
    """What a data file says: of a pair with `votes` each vote, as that of the file's first, second, ... rater."""
    config = DataConfig(path=str(path), ties="keep")
    kind = recognise_kind(config, ("preference", "ranking", "rating", "feedback", "demonstration"))
    examples: list[Example] = load(config, kind).train
    told = []
    for one in examples:
        try:
            task, answers, verdicts, settings = _example(one, done)
        except ValueError as error:
            raise RowError("no judgement", f"{one.row.where()}: {error}") from None
        said = [TurnText(a) for a in answers]
        with _guarded(one.row.where()):
            for number, verdict in enumerate(verdicts, 1):
                who = imported_name("file" if number == 1 else f"file, vote {number}", path.name)
                told.append(
                    told_of_item(
                        path.stem, task, one.prompt, said, verdict, settings=settings,
                        who=who, source=path.name, when=as_of, as_of=as_of,
                    )
                )  # fmt: skip
    return told


def _example(one: Example, done: ImportCounts) -> tuple[str, list[str], list[Any], dict[str, Any]]:
    """(task, answers, verdicts, settings of the queue) of a typed example."""
    if not one.prompt:
        raise ValueError("a text without a prompt is no answer that was judged")
    match one:
        case Preference():
            shares = one.votes or (one.agreement,)
            if not set(shares) <= set(CHOICES):
                done.rounded["an agreement without votes"] += 1
            said = [{"choice": CHOICES.get(share, int(share < 0.5))} for share in shares]
            return "compare", [_text(one.chosen), _text(one.rejected)], said, {}
        case Ranking():
            order = sorted(set(one.ranks))
            ranks = [order.index(r) for r in one.ranks]
            return "rank", [_text(c) for c in one.completions], [{"ranks": ranks}], {}
        case Rating():
            if any(s != int(s) or s < 1 for s in one.scores.values()):
                raise ValueError(
                    f"ratings must be whole numbers from 1 on, not {dict(one.scores)}; means of several raters are "
                    "none: `export-feedback --judgements.combine each` writes each rater's own"
                )
            scores = {name: int(s) for name, s in one.scores.items()}
            steps = {name: [str(i + 1) for i in range(max(STARS, s))] for name, s in scores.items()}
            return "rate", [_text(one.completion)], [{"scores": scores}], {"attributes": steps}
        case Feedback():
            return "review", [_text(one.completion)], [{"accept": one.label}], {}
        case Demonstration():
            return "review", [_text(one.completion)], [{"accept": True}], {}
    raise ValueError("rows with neither answers nor verdicts hold no judgement")


def _text(content: Content) -> str:
    if isinstance(content, str):
        return content
    if len(content) != 1:
        raise ValueError("an answer of several turns can not be judged as one")
    return str(content[0]["content"])
