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
from steersman.guards.untrusted import UntrustedError, first_fault, parse_suspect
from steersman.people.store.conversations import TurnText
from steersman.people.store.database import Store, now
from steersman.people.store.imported import (
    MOST_STEPS,
    STARS,
    ImportCounts,
    Told,
    odd_left_out,
    store_told,
    told_of_item,
)
from steersman.people.store.label_studio import Sides, is_json_min, is_label_studio, read_task
from steersman.people.store.open_webui import NO_CONVERSATION, ToldChat, is_open_webui, read_record, store_chats
from steersman.people.store.raters import imported_name
from steersman.types import SteersmanError

CHOICES: dict[float, int | str] = {1.0: 0, 0.5: "tie", 0.0: 1}
"""A vote for the chosen one of two answers as a choice."""


def import_file(store: Store, path: str | Path, sides: Sides | None = None) -> ImportCounts:
    """Takes over the judgements of a file, which is read to its end before the first one is stored.

    `sides` are the fields that a comparison of Label Studio showed on the left and on the right. A record that can
    not be read is counted and left out. Raises SteersmanError, with file and record, where nothing can be read, for a
    wrong row of a data file, and for a file that is none of the kinds that are known.
    """
    path = Path(path)
    done = ImportCounts()
    records, suspect = _json_records(path)
    as_of = _written(path)
    objects = [r for r in records if isinstance(r, dict)]
    is_webui, is_tasks = any(map(is_open_webui, objects)), any(map(is_label_studio, objects))
    if sides is not None and not is_tasks:
        raise SteersmanError(f"{path}: `sides` is for Label Studio's JSON exports, and this is none; leave it out")
    told = list[Told]()
    if is_webui:
        told = _webui(store, path, records, done, suspect=suspect, as_of=as_of)
    elif is_tasks:
        for number, record in enumerate(records, 1):
            where = f"task {number}"
            with odd_left_out(done, where):
                _require_sound(record, suspect)
                told += read_task(record, done, name=path.stem, where=where, as_of=as_of, sides=sides)
        _require_any(path, bool(told), done)
    elif any(map(is_json_min, objects)):
        raise SteersmanError(
            f'{path}: this is Label Studio\'s export "JSON-MIN", which does not say what a choice was made between; '
            'export the project as "JSON"'
        )
    else:
        told = _data_file(path, as_of, done)
    store_told(store, told, done)
    return done


def _webui(
    store: Store, path: Path, records: list[Any], done: ImportCounts, *, suspect: bool, as_of: float
) -> list[Told]:
    """What was said in chats of Open WebUI, which are stored."""
    chats = list[ToldChat]()
    for number, record in enumerate(records, 1):
        with odd_left_out(done, f"record {number}"):
            _require_sound(record, suspect)
            chat = read_record(record, as_of, done)
            if chat is not None:
                chats.append(chat)
    _require_any(path, bool(chats), done)
    store_chats(store, chats)
    return [one for chat in chats for one in chat.told]


def _require_sound(record: Any, suspect: bool) -> None:
    fault = first_fault(record) if suspect else None
    if fault is not None:
        raise SteersmanError(f"field {fault.field}: {fault.problem}")


def _require_any(path: Path, is_any: bool, done: ImportCounts) -> None:
    """Raises SteersmanError for an export of which nothing could be read."""
    if not is_any and done.odd:
        raise SteersmanError(f"{path}, {done.odd[0]}")
    if not is_any and done.left_out[NO_CONVERSATION]:
        raise SteersmanError(f"{path}: none of its records has a conversation, so there is nothing that was judged")


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


def _json_records(path: Path) -> tuple[list[Any], bool]:
    """The records of a JSON list, and whether `first_fault` may find something in them; none where the file is
    something else, which the data room then reads."""
    if path.suffix.lower() != ".json":
        return [], False
    try:
        got = parse_suspect(path.read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        raise SteersmanError(f"{path}: it can not be read ({error.strerror})") from None
    except (UntrustedError, ValueError) as error:
        raise SteersmanError(f"{path}: no JSON that can be read ({error})") from None
    return (got.value, got.suspect) if isinstance(got.value, list) else ([], False)


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
            if any(s not in range(1, MOST_STEPS + 1) for s in one.scores.values()):
                raise ValueError(
                    f"ratings must be whole numbers from 1 to {MOST_STEPS}, not {dict(one.scores)}; means of several "
                    "raters are none: `export-feedback --judgements.combine each` writes each rater's own"
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
