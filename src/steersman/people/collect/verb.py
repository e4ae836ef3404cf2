"""`steersman collect`: a page on which people chat with a model and judge answers."""

from __future__ import annotations

import getpass
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from steersman.config.sections import Section
from steersman.data import read_rows
from steersman.data.rows import Row
from steersman.guards.untrusted import parse_json
from steersman.people.addresses import in_url, is_loopback, trusted_proxies
from steersman.people.collect.answering import AnsweringModel, AnsweringSampling, open_answerer
from steersman.people.collect.ending import closed_before_end
from steersman.people.store import Store, open_store
from steersman.people.store.conversations import TurnText
from steersman.people.store.database import pieces
from steersman.people.store.imported import shown
from steersman.people.store.imports import check_names, import_file
from steersman.people.store.items import CHAT, NewItem, add_items, check_item, check_queue, make_queue, revise_items
from steersman.people.store.raters import NOT_GONE_YET, add_person, forget, people
from steersman.run.device import set_threads
from steersman.types import SteersmanError

PASSWORD_ENV = "STEERSMAN_PASSWORD"
MOST = 1_000_000
"""Of what a queue counts: databases have a largest number, and nobody needs more."""


class QueueConfig(Section):
    """A file of answers that are to be judged."""

    task: Literal["compare", "rank", "rate", "mark", "review"] = Field(
        description="what raters do. compare: choose between two answers; rank: order several; rate: choose a step "
        "of each attribute; mark: label pieces of the text; review: accept or reject"
    )
    file: str = Field(
        description="rows with prompt and responses (or chosen and rejected), or completion; gold: a known verdict"
    )
    overlap: int = Field(default=1, ge=1, le=MOST, description="raters per item")
    gold_every: int = Field(
        default=0, ge=0, le=MOST, description="one of so many items of a rater is gold, at a random place; 0: none"
    )
    attributes: dict[str, list[str]] = Field(
        default_factory=dict, description="rate: each attribute with the names of its steps, lowest first"
    )
    labels: list[str] = Field(default_factory=list, description="mark: the labels that a piece of text may get")
    instructions: str = Field(default="", description="shown above every item")


class Sides(Section):
    """What an annotator of Label Studio saw: the names of two fields of a task."""

    left: str = Field(description="the field of the left answer: what the first name in the tag's toName shows")
    right: str = Field(description="the field of the right answer")


class CollectRecipe(Section):
    """A page on which people chat with a model or two and judge answers."""

    store: str = Field(default="feedback.db", description="file or address of the store")
    model: AnsweringModel | None = Field(default=None, description="who answers in chats; null: only queues")
    second: AnsweringModel | None = Field(
        default=None, description="a second model: chats then compare the two, blind"
    )
    sampling: AnsweringSampling = AnsweringSampling()
    system: str = Field(default="", description="system prompt of new chats")
    queues: dict[str, QueueConfig] = Field(default_factory=dict, description="name: what is to be judged")
    imports: list[str] = Field(
        default_factory=list, description="exports of Open WebUI or Label Studio, or data files, to take over first"
    )
    sides: dict[str, Sides] = Field(
        default_factory=dict,
        description="by the name of an import, comparisons of Label Studio whose export does not tell the sides: the "
        "fields with the left and the right answer, as in toName of the project's Pairwise tag",
    )
    host: str = Field(
        default="127.0.0.1",
        description="address to listen on; at any but this machine's own (127.0.0.1) the store must have an account",
    )
    port: int = Field(default=8080, ge=0, le=65535, description="port to listen on")
    runs: str | None = Field(default=None, description="folder with run folders, which admins see under Look")
    add_account: str | None = Field(
        default=None,
        description=f"make an account of this name and exit; its password is asked for, or in {PASSWORD_ENV}",
    )
    role: Literal["rater", "admin"] = Field(default="rater", description="with add_account: rater, or admin")
    forget: str | None = Field(
        default=None, description="delete this person's name and logins and exit; judgements stay under a pseudonym"
    )


def run(recipe: CollectRecipe) -> dict[str, Any]:
    """Serves until Ctrl-C, SIGTERM or SIGHUP, then closes the store. Raises SteersmanError before that for whatever
    can not work."""
    with closed_before_end(), closing(open_store(recipe.store)) as store:
        if recipe.add_account is not None:
            return _add_account(store, recipe.add_account, recipe.role)
        if recipe.forget is not None:
            pseudonym, gone = forget(store, recipe.forget)
            print(f"{recipe.forget} is forgotten; the judgements stay under {pseudonym}")
            if not gone:
                print(f"{store.url}: {NOT_GONE_YET}")
            return {"forgotten": pseudonym}
        return _serve(store, recipe)


def _serve(store: Store, recipe: CollectRecipe) -> dict[str, Any]:
    import uvicorn

    from steersman.people.collect.app import make_app
    from steersman.people.collect.runs import open_root
    from steersman.people.collect.visit import Site

    models = _answering(recipe)
    local, runs = is_loopback(recipe.host), open_root(recipe.runs)
    with store.read() as session:
        is_open = not people(session)
        if is_open and not local:
            raise SteersmanError(
                f"host {recipe.host}: others can reach this address, so it wants accounts; make one first: "
                f"steersman collect --store {recipe.store} --add_account NAME --role admin"
            )
    fill(store, recipe)
    set_threads(max(1, min(set_threads(None), (os.cpu_count() or 1) - 1)))  # a core is left to the pages
    site = Site(store, [open_answerer(m, recipe.sampling) for m in models], recipe.system, local, runs)
    app = make_app(site, host=recipe.host)
    link = f"/enter/{site.key}" if is_open else ""
    print(f"http://{in_url(recipe.host)}:{recipe.port}{link}  (store {store.url}; Ctrl-C ends)", flush=True)
    if is_open:
        print(
            "The store has no account, so there are no passwords: whoever has this link is an admin. For several "
            f"people make accounts: steersman collect --store {recipe.store} --add_account NAME --role admin",
            flush=True,
        )
    uvicorn.run(
        app, host=recipe.host, port=recipe.port, log_config=None, server_header=False, access_log=False,
        forwarded_allow_ips=trusted_proxies(),
    )  # fmt: skip
    return {"store": store.url}


def _answering(recipe: CollectRecipe) -> list[AnsweringModel]:
    """The models that answer. Raises SteersmanError for a second one alone, and for two that the store would not tell
    apart."""
    models = [m for m in (recipe.model, recipe.second) if m is not None]
    if recipe.second is not None and recipe.model is None:
        raise SteersmanError("second: a second model needs a first one under `model`")
    if len({m.stored_name for m in models}) < len(models):
        raise SteersmanError(
            f"model, second: both are called {models[0].stored_name!r}, so judgements of the two could not be told "
            "apart; give them different names with `model.name` and `second.name` (a model behind an address goes by "
            "the name that it is served under)"
        )
    return models


def fill(store: Store, recipe: CollectRecipe) -> None:
    """Takes over the imports and the queues' files; what is there already is not stored again."""
    check_names(recipe.imports)
    unknown = sorted(recipe.sides.keys() - {Path(path).name for path in recipe.imports})
    if unknown:
        raise SteersmanError(
            f"sides.{unknown[0]}: none of the imports is called so; write the file's name, without its folder"
        )
    if CHAT in recipe.queues:
        raise SteersmanError(f"queues.{CHAT}: this name is taken by comparisons in chats; choose another")
    for path in recipe.imports:
        sides = recipe.sides.get(Path(path).name)
        done = import_file(store, path, None if sides is None else (sides.left, sides.right))
        changed = f" ({dict(done.changed)} in the place of other verdicts)" if done.changed else ""
        stored, left_out = dict(done.stored) or "nothing new", dict(done.left_out) or "nothing"
        rounded = f", {dict(done.rounded)} taken as one whole vote" if done.rounded else ""
        print(f"{path}: {stored} stored{changed}, {left_out} left out{rounded}")
        for (left, right), count in done.sides.items():
            print(f"{path}: comparisons with {shown(left)} on the left and {shown(right)} on the right: {count}")
        for problem in done.odd:
            print(f"{path}, {problem}")
    for name, config in recipe.queues.items():
        _fill_queue(store, name, config)


def _fill_queue(store: Store, name: str, config: QueueConfig) -> None:
    """Takes over a queue's file, which is read twice: what is wrong with a row is told before any is stored. An item
    that is there already gets the gold verdict and the models that the file names now."""
    settings = {"attributes": config.attributes, "labels": config.labels, "instructions": config.instructions}
    check_queue(name, config.task, settings)
    told: dict[str, tuple[str, Any]] = {}
    for row in read_rows(config.file):
        item = _item(row)
        gold = check_item(name, config.task, item, settings)
        first, same = told.setdefault(item.digest, (row.where(), gold))
        if same != gold:
            raise row.fault("two golds", f"{first} has the same prompt and answers, and another gold verdict", "gold")
    places, revised = {first for first, _ in told.values()}, 0
    for piece in pieces(_item(row) for row in read_rows(config.file) if row.where() in places):
        with store.begin() as session:
            queue = make_queue(
                session, name, config.task, overlap=config.overlap, gold_every=config.gold_every, **settings
            )
            revised += revise_items(session, queue, piece)
            add_items(session, queue, piece)
    if revised:
        print(
            f"queue {name}: {revised} items that were there have another gold verdict, other models or other ends now"
        )


def _item(row: Row) -> NewItem:
    """A row as an item: `responses`, `chosen` and `rejected`, or `completion`; `models` names who answered,
    `finish` how each answer ended."""
    data = row.data
    prompt = data.get("prompt", data.get("messages"))
    answers = _cell(row, "responses") or [data[k] for k in ("chosen", "rejected", "completion") if data.get(k)]
    if not isinstance(prompt, str | list) or not prompt:
        raise row.fault("missing field", "an item needs a prompt (text, or a list of messages)", "prompt")
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise row.fault("wrong type", "answers must be text: responses, chosen and rejected, or completion")
    if isinstance(prompt, list) and not all(
        isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str) for m in prompt
    ):
        raise row.fault("wrong type", "a prompt of turns is a list of {role, content}", "prompt")
    named = _cell(row, "models") or []
    if not isinstance(named, list) or len(named) not in (0, len(answers)):
        raise row.fault("wrong number of models", "name one model for each answer, or none", "models")
    models = [(str(name), "") if name else None for name in named] or [None] * len(answers)
    said = [
        TurnText(answer, model, finish=finish)
        for answer, model, finish in zip(answers, models, _finishes(row, len(answers)), strict=True)
    ]
    return NewItem(prompt, said, _cell(row, "gold"), f"{Path(row.file).name}, {row.unit} {row.number}")


def _finishes(row: Row, count: int) -> list[str | None]:
    """Why each of the answers ended, as `finish` says: a text for a single one, or a list."""
    told = row.data.get("finish")
    ends = [told] if count == 1 and isinstance(told, str) else _cell(row, "finish") or [None] * count
    if not isinstance(ends, list) or len(ends) != count or not all(e is None or isinstance(e, str) for e in ends):
        raise row.fault(
            "wrong finish", f"must say of each of the {count} answers how it ended (eos, length)", "finish"
        )
    return [e and e[:20] for e in ends]


def _cell(row: Row, column: str) -> Any:
    """What a column holds that is no text: a cell of CSV has it as JSON, or is empty."""
    got = row.data.get(column)
    if not isinstance(got, str):
        return got
    try:
        return parse_json(got, row.where(column)) if got.strip() else None
    except ValueError as error:
        raise row.fault("no JSON", f"a text here must be JSON, not {got[:40]!r} ({error})", column) from None


def _add_account(store: Store, name: str, role: str) -> dict[str, Any]:
    from steersman.people.collect.security import SHORTEST_PASSWORD, hashed

    password = os.environ.get(PASSWORD_ENV, "")
    if not password and sys.stdin.isatty():
        password = getpass.getpass(f"password of {name}: ")
    if len(password) < SHORTEST_PASSWORD:
        raise SteersmanError(
            f"a password has at least {SHORTEST_PASSWORD} characters; type it when asked, or set {PASSWORD_ENV}"
        )
    with store.begin() as session:
        add_person(session, name, role=role, password=hashed(password))
    print(f"{name} may log in as {role}")
    return {"account": name, "role": role}
