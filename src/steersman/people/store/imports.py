"""Judgements that other programs collected: Open WebUI's exports, Label Studio's, and any file of the data room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from steersman.data import DataConfig, RowError
from steersman.data.examples import Content, Demonstration, Example, Feedback, Preference, Ranking, Rating
from steersman.data.load import load, recognise_kind
from steersman.guards.untrusted import UntrustedError, parse_json
from steersman.people.store.conversations import TurnText
from steersman.people.store.database import Store, now
from steersman.people.store.imported import STARS, ImportCounts, import_item, import_judgement
from steersman.people.store.label_studio import import_task
from steersman.people.store.open_webui import import_record, is_open_webui
from steersman.people.store.raters import imported_rater
from steersman.people.store.verdicts import checked
from steersman.types import SteersmanError


def import_file(store: Store, path: str | Path) -> ImportCounts:
    """Takes over the judgements of a file; all or, where it raises, nothing.

    Raises SteersmanError, with file and record, for a file that is none of the kinds that are known.
    """
    path = Path(path)
    done = ImportCounts()
    records = _json_records(path)
    with store.begin() as session:
        if records and is_open_webui(records[0]):
            for number, record in enumerate(records, 1):
                _guarded(f"{path}, record {number}", lambda r=record: import_record(session, r, done))
        elif records and isinstance(records[0].get("annotations"), list) and isinstance(records[0].get("data"), dict):
            for number, record in enumerate(records, 1):
                where = f"{path}, task {number}"
                _guarded(where, lambda r=record, w=where: import_task(session, r, path.stem, w, done))
        else:
            _data_file(session, path, done)
    return done


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


def _guarded(where: str, work: Any) -> None:
    try:
        work()
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise SteersmanError(f"{where}: not as this program writes it ({type(error).__name__}: {error})") from error


def _data_file(session: Session, path: Path, done: ImportCounts) -> None:
    config = DataConfig(path=str(path), ties="keep")
    kind = recognise_kind(config, ("preference", "ranking", "rating", "feedback", "demonstration"))
    examples: list[Example] = load(config, kind).train
    rater = imported_rater(session, "file", path.name)
    for one in examples:
        try:
            task, answers, verdict, settings = _example(one)
        except ValueError as error:
            raise RowError("no judgement", f"{one.row.where()}: {error}") from None
        item = import_item(session, path.stem, task, one.prompt, [TurnText(a) for a in answers], settings)
        key = ("file", item.id, one.row.number)
        said = checked(task, verdict, answers, settings)
        import_judgement(session, done, task, key, rater, said, path.name, now(), item_id=item.id)


def _example(one: Example) -> tuple[str, list[str], Any, dict[str, Any]]:
    """(task, answers, verdict, settings of the queue) of a typed example."""
    if not one.prompt:
        raise ValueError("a text without a prompt is no answer that was judged")
    match one:
        case Preference():
            choice = "tie" if one.agreement == 0.5 else 0
            return "compare", [_text(one.chosen), _text(one.rejected)], {"choice": choice}, {}
        case Ranking():
            order = sorted(set(one.ranks))
            ranks = [order.index(r) for r in one.ranks]
            return "rank", [_text(c) for c in one.completions], {"ranks": ranks}, {}
        case Rating():
            if any(s != int(s) or s < 1 for s in one.scores.values()):
                raise ValueError("ratings must be whole numbers from 1 on")
            scores = {name: int(s) for name, s in one.scores.items()}
            steps = {name: [str(i + 1) for i in range(max(STARS, s))] for name, s in scores.items()}
            return "rate", [_text(one.completion)], {"scores": scores}, {"attributes": steps}
        case Feedback():
            return "review", [_text(one.completion)], {"accept": one.label}, {}
        case Demonstration():
            return "review", [_text(one.completion)], {"accept": True}, {}
    raise ValueError("rows with neither answers nor verdicts hold no judgement")


def _text(content: Content) -> str:
    if isinstance(content, str):
        return content
    if len(content) != 1:
        raise ValueError("an answer of several turns can not be judged as one")
    return str(content[0]["content"])
