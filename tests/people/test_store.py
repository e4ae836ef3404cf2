"""The store on SQLite and on PostgreSQL: what is written stays, is written once, and goes to whom it should."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from people_kit import SQLITE, judge, key, pair, queue, queue_named, rater
from pydantic import ValidationError
from sqlalchemy import func, select

from steersman.people.collect.verb import CollectRecipe, QueueConfig, fill
from steersman.people.store import database, open_store, raters
from steersman.people.store.assignments import (
    Coverage,
    Progress,
    answers_of,
    coverage,
    next_item,
    own_assignment,
    progress,
    shown_item,
)
from steersman.people.store.conversations import (
    TurnText,
    add_turn,
    branch,
    messages,
    model_id,
    path,
    start,
)
from steersman.people.store.database import PIECE, StoreAwayError, read_store, store_url
from steersman.people.store.items import NewItem, add_item, add_items, make_queue
from steersman.people.store.judgements import judge_item, judge_turn, live, thumbs, undo
from steersman.people.store.opinions import model_names
from steersman.people.store.raters import find_person, forget, known_person, log_in, log_out, visitor
from steersman.people.store.schema import Assignment, Base, Forgotten, Item, JudgementRow, Login, Model, Person, Queue
from steersman.types import SteersmanError


def test_the_migrations_make_the_tables_of_the_schema(store):
    with store.engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Base.metadata)
    assert not differences


def test_a_store_is_opened_again_and_another_database_is_refused(address, store):
    rater(store, "Ada")
    again = open_store(address, create=False)
    with again.read() as session:
        assert session.scalar(select(func.count()).select_from(Person)) == 1
    again.close()
    with store.engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE alembic_version"))
    with pytest.raises(SteersmanError, match="tables of something else"):
        open_store(address)


def test_judgements_can_not_be_changed_or_deleted(store):
    of = queue(store, "compare", [pair(1)])
    judge(store, of, rater(store, "Ada"), {"choice": 0})
    for statement in ("UPDATE judgement SET verdict = '{}'", "DELETE FROM judgement"):
        with pytest.raises(sa.exc.DBAPIError, match="never changed"), store.begin() as session:
            session.execute(sa.text(statement))


def test_what_is_acknowledged_waits_for_the_disk(store):
    """Also after a transaction on the same connection that did not."""
    asks = {"sqlite": "PRAGMA synchronous", "postgresql": "SHOW synchronous_commit"}[store.engine.dialect.name]
    for flushed in (True, False, True):
        with store.begin(flushed=flushed) as session:
            assert session.execute(sa.text(asks)).scalar() in ((2, "on") if flushed else (1, "off"))


def test_a_request_that_comes_twice_is_stored_once(store):
    of, ada = queue(store, "compare", [pair(1), pair(2)]), rater(store, "Ada")
    once = key()
    with store.begin() as session:
        got = next_item(session, of, ada)
        assert got is not None
        first = judge_item(session, got, {"choice": 0}, key=once, seconds=3.0).id
    with store.begin() as session:
        assignment = own_assignment(session, got.assignment.id, ada, lock=True)
        assert judge_item(session, shown_item(session, assignment), {"choice": 1}, key=once).id == first
        # A second tab, with a key of its own: the first verdict counts.
        assert judge_item(session, shown_item(session, assignment), {"choice": 1}, key=key()).id == first
        assert session.scalars(select(JudgementRow.verdict)).all() == [{"choice": 0}]
    bob = rater(store, "Bob")
    with store.begin() as session, pytest.raises(SteersmanError, match="another judgement has this key"):
        undo(session, bob, key=once)


def test_a_key_is_a_uuid(store):
    of, ada = queue(store, "compare", [pair(1)]), rater(store, "Ada")
    with pytest.raises(SteersmanError, match="random UUID"):
        judge(store, of, ada, {"choice": 0}, key="1")


def test_everything_about_a_judgement_is_kept(store):
    of, ada = queue(store, "compare", [pair(1)]), rater(store, "Ada")
    judge(store, of, ada, lambda got: {"choice": got.assignment.sides[0]}, seconds=4.5)
    with store.read() as session:
        row = session.scalars(select(JudgementRow)).one()
        assignment = session.scalars(select(Assignment)).one()
        assert row.rater_id == ada
        assert row.sides == assignment.sides
        assert sorted(row.sides) == [0, 1]
        assert row.verdict == {"choice": row.sides[0]}
        assert row.seconds == 4.5
        assert row.task == "compare"


def test_sides_are_random(store):
    of, ada = queue(store, "compare", [pair(i) for i in range(60)]), rater(store, "Ada")
    while judge(store, of, ada, {"choice": "tie"}):
        pass
    with store.read() as session:
        first = Counter(sides[0] for sides in session.scalars(select(Assignment.sides)))
    assert 15 < first[0] < 45


def test_overlap_gives_each_item_to_so_many_raters(store):
    of = queue(store, "compare", [pair(i) for i in range(6)], overlap=2)
    raters = [rater(store, name) for name in ("Ada", "Bob", "Cyd")]
    done = Counter()
    while True:
        given = [item for r in raters if (item := judge(store, of, r, {"choice": 0}))]
        if not given:
            break
        done.update(given)
    assert sorted(done.values()) == [2] * 6


def test_two_at_once_do_not_get_an_item_that_one_shall_have(store):
    of = queue(store, "compare", [pair(i) for i in range(24)])
    raters = [rater(store, f"rater {i}") for i in range(4)]
    judged: list[str] = []

    def work(who: int) -> None:
        while item := judge(store, of, who, {"choice": 0}):
            judged.append(item)

    threads = [threading.Thread(target=work, args=(r,)) for r in raters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(judged) == len(set(judged)) == 24


def at_once(count: int, work) -> list:
    """What `work` gives for each number, all begun at the same moment."""
    gate = threading.Barrier(count)

    def one(number: int):
        gate.wait(30)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_several_who_make_the_same_thing_at_once_get_one(address, store):
    """As several processes of `collect` do, each with a connection of its own."""
    stores = [open_store(address) for _ in range(4)]
    items = [pair(i) for i in range(30)]

    def fill_and_enter(number: int) -> tuple:
        with stores[number].begin() as session:
            of = make_queue(session, "week", "compare")
            model = model_id(session, ("base", "7"))
            who = known_person(session, "Ada").rater_id
        with stores[number].begin() as session:
            add_items(session, make_queue(session, "week", "compare"), items)
        return of.id, model, who

    assert len(set(at_once(4, fill_and_enter))) == 1
    with store.read() as session:
        assert list(session.scalars(select(Item.position).order_by(Item.position))) == list(range(30))

    def add(number: int) -> str:
        try:
            rater(stores[number], "Bob")
        except SteersmanError as error:
            return str(error)
        return "made"

    assert Counter(at_once(4, add)) == {"made": 1, "Bob: there is such an account already": 3}
    for one in stores:
        one.close()


def test_a_store_is_opened_and_read_while_another_process_writes(address, store):
    queue(store, "compare", [pair(1)])
    with store.begin() as writing:
        make_queue(writing, "other", "compare")
        again = open_store(address, create=False)
        with again.read() as session:
            assert list(session.scalars(select(Queue.name))) == ["compare"]
        again.close()


@pytest.mark.parametrize("address", ["postgresql"], indirect=True)
def test_a_connection_that_is_lost_while_it_reads_is_told_by_name(address, store):
    def read() -> None:
        with read_store(address) as session:
            mine = session.scalar(sa.text("SELECT pg_backend_pid()"))
            with store.begin() as other:
                other.execute(sa.text("SELECT pg_terminate_backend(:mine)"), {"mine": mine})
            session.scalar(sa.text("SELECT 1"))

    with pytest.raises(StoreAwayError, match="can not be read"):
        read()


def test_a_queue_of_many_items_is_stored_in_pieces(store, tmp_path):
    """Each a transaction of a few statements, and nothing of a file in which a row is wrong."""
    rows = [json.dumps({"prompt": f"q {i}", "chosen": "a", "rejected": "b"}) for i in range(2 * PIECE + 1)]
    wrong, file = json.dumps({"prompt": "q", "chosen": "a", "rejected": "a"}), tmp_path / "pairs.jsonl"
    recipe = CollectRecipe(queues={"week": QueueConfig(task="compare", file=str(file))})
    file.write_text("\n".join([*rows, wrong]))
    with pytest.raises(SteersmanError, match=f"line {len(rows) + 1}: two answers are the same text"):
        fill(store, recipe)
    with store.read() as session:
        assert session.scalars(select(Queue)).all() == []
    file.write_text("\n".join(rows))
    told = Counter()
    sa.event.listen(store.engine, "commit", lambda _: told.update(commits=1))
    sa.event.listen(store.engine, "before_cursor_execute", lambda *_: told.update(statements=1))
    fill(store, recipe)
    assert told["commits"] == 3
    assert told["statements"] < 100
    fill(store, recipe)
    with store.read() as session:
        assert session.scalars(select(Item.position).order_by(Item.position)).all() == list(range(len(rows)))


def pairs_file(path, *rows):
    path.write_text("".join(json.dumps({"prompt": "q", "chosen": "x", "rejected": "y"} | row) + "\n" for row in rows))
    return str(path)


def test_a_queue_follows_the_gold_and_the_models_of_its_file(store, tmp_path, capsys):
    """A verdict that was held to be right was not: whoever gave the other one passes, and nobody is taught by it."""

    def start_with(*rows) -> list[tuple[str, object, list[str]]]:
        queue = QueueConfig(task="compare", file=pairs_file(tmp_path / "q.jsonl", *rows), overlap=2)
        fill(store, CollectRecipe(queues={"q": queue}))
        with store.read() as session:
            names, made = model_names(session), session.scalars(select(Item).order_by(Item.position)).all()
            return [
                (i.prompt, i.gold, [str(names.get(a.model_id, "")) for a in answers_of(session, i.id)]) for i in made
            ]

    named = {"prompt": "r", "models": ["a", "b"]}
    assert start_with({"gold": {"choice": 1}}, named, named | {"models": ["c", "d"]}) == [
        ("q", {"choice": 1}, ["", ""]), ("r", None, ["a", "b"]),
    ]  # fmt: skip
    ada = rater(store, "Ada")
    judge(store, queue_named(store, "q").id, ada, {"choice": 0})
    assert "another gold" not in capsys.readouterr().out
    now = start_with({"gold": {"choice": 0}}, named | {"models": ["b", "a"], "gold": {"choice": "tie"}})
    assert now == [("q", {"choice": 0}, ["", ""]), ("r", {"choice": "tie"}, ["b", "a"])]
    assert (
        "queue q: 2 items that were there have another gold verdict, other models or other ends now"
        in capsys.readouterr().out
    )
    assert start_with({}, named)[0] == ("q", None, ["", ""])
    start_with({}, named)
    assert capsys.readouterr().out.count("another gold") == 1
    with pytest.raises(SteersmanError, match=r"line 2, field 'gold': .*line 1 has the same prompt and answers"):
        start_with({}, {"gold": {"choice": 0}})


def test_a_csv_gives_gold_and_models_as_json(store, tmp_path):
    file, head = tmp_path / "c.csv", "prompt,chosen,rejected,gold,models\n"
    file.write_text(head + 'q,x,y,,\nr,x,y,"{""choice"": 0}","[""a"", ""b""]"\n')
    fill(store, CollectRecipe(queues={"q": QueueConfig(task="compare", file=str(file))}))
    with store.read() as session:
        assert [i.gold for i in session.scalars(select(Item).order_by(Item.position))] == [None, {"choice": 0}]
        assert sorted(m.name for m in session.scalars(select(Model))) == ["a", "b"]


@SQLITE
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.csv", "prompt,chosen,rejected,gold\nq,x,y,left\n", r"c\.csv, line 2, field 'gold': .*must be JSON"),
        (
            "c.jsonl",
            '{"prompt": "q", "chosen": "x", "rejected": "y", "gold": 1}',
            r"c\.jsonl, line 1, gold: compare:",
        ),
        ("c.jsonl", '{"prompt": "q", "chosen": "x", "rejected": "y", "models": ["a"]}', "one model for each answer"),
        ("c.jsonl", '{"prompt": "q", "chosen": "x", "rejected": "y", "gold": {"skip": "?"}}', "gold: a skip is no"),
    ],
)
def test_a_row_that_is_no_item_is_named(store, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(SteersmanError, match=message):
        fill(store, CollectRecipe(queues={"q": QueueConfig(task="compare", file=str(tmp_path / name))}))


def test_both_databases_take_and_refuse_the_same_names(store, tmp_path):
    """PostgreSQL has no NUL and no half of a surrogate pair in its texts, and holds to the lengths of its columns."""
    file = pairs_file(tmp_path / "q.jsonl", {"models": ["m\0", "n" * 400]})
    for name in ("", "x" * 101, "q\0", "q\ud800"):
        with pytest.raises(SteersmanError, match=r"queue .*a queue's name has 1 to 100 characters"):
            fill(store, CollectRecipe(queues={name: QueueConfig(task="compare", file=file)}))
    with pytest.raises(ValidationError, match="less than or equal to 1000000"):
        QueueConfig(task="compare", file=file, overlap=1 << 31)
    fill(store, CollectRecipe(queues={"x" * 100: QueueConfig(task="compare", file=file)}))
    with store.read() as session:
        assert sorted(m.name for m in session.scalars(select(Model))) == ["m", "n" * 300]
        assert find_person(session, "no\0body") is None  # as the form of a login may say it
        assert session.get(Assignment, "\0") is None  # or an address


def test_what_was_left_open_comes_first(store):
    of, ada = queue(store, "compare", [pair(i) for i in range(3)]), rater(store, "Ada")
    with store.begin() as session:
        first = next_item(session, of, ada)
    with store.begin() as session:
        again = next_item(session, of, ada)
        assert first is not None
        assert again is not None
        assert (again.assignment.id, again.assignment.sides) == (first.assignment.id, first.assignment.sides)


def test_an_item_that_somebody_left_is_given_to_another_after_an_hour(store):
    of, ada, bob = queue(store, "compare", [pair(1)]), rater(store, "Ada"), rater(store, "Bob")
    with store.begin() as session:
        assert next_item(session, of, ada) is not None
        assert next_item(session, of, bob) is None
        session.execute(sa.update(Assignment).values(created=Assignment.created - 4000))
        assert next_item(session, of, bob) is not None


def test_two_tabs_of_a_rater_hold_one_item(store):
    of = queue(store, "compare", [pair(i) for i in range(6)])
    raters = [rater(store, f"rater {i}") for i in range(6)]

    def take(number: int) -> tuple[int, str] | None:
        with store.begin() as session:
            got = next_item(session, of, raters[number % 6])
            return got and (number % 6, got.item.id)

    held = at_once(12, take)
    assert None not in held
    assert len(set(held)) == 6


def test_what_was_taken_back_is_held_anew(store):
    of, ada, bob = queue(store, "compare", [pair(1)]), rater(store, "Ada"), rater(store, "Bob")
    judge(store, of, ada, {"choice": 0})
    with store.begin() as session:
        session.execute(sa.update(Assignment).values(created=Assignment.created - 4000))
        assert undo(session, ada, key=key()) is not None
    with store.begin() as session:
        assert next_item(session, of, bob) is None
        assert next_item(session, of, ada) is not None


def test_a_skip_whose_place_another_took_is_not_taken_back(store):
    ada, bob = rater(store, "Ada"), rater(store, "Bob")
    of = queue(store, "compare", [pair(1)])
    assert judge(store, of, ada, {"skip": ""})
    with store.begin() as session:
        assert undo(session, ada, key=key()) is not None  # nobody has it: the skip goes, and the place is held
        assert next_item(session, of, bob) is None
    assert judge(store, of, ada, {"skip": ""})
    with store.begin() as session:
        assert next_item(session, of, bob) is not None
        assert undo(session, ada, key=key()) is None
    assert judge(store, of, bob, {"choice": 0})
    with store.begin() as session:
        assert undo(session, ada, key=key()) is None
    assert judge(store, of, ada, {"choice": 1}) is None
    with store.read() as session:
        assert session.scalars(select(Assignment.state).order_by(Assignment.rater_id)).all() == ["skipped", "judged"]


def test_a_skip_whose_place_is_taken_at_the_same_moment_gives_one_verdict(store):
    """The rater who takes the skip back, and another who takes the place, never both have it."""
    ada, bob = rater(store, "Ada"), rater(store, "Bob")
    for number in range(8):
        of = queue(store, "compare", [pair(number)], name=f"q{number}")
        assert judge(store, of, ada, {"skip": ""})

        def act(who: int, of: int = of) -> bool:
            with store.begin() as session:
                got = undo(session, ada, key=key()) if who else next_item(session, of, bob)
                return got is not None

        assert sum(at_once(2, act)) == 1


def test_a_skip_is_written_down_and_leaves_the_item_to_others(store):
    of, ada, bob = queue(store, "compare", [pair(1)]), rater(store, "Ada"), rater(store, "Bob")
    assert judge(store, of, ada, {"skip": "I know too little"})
    assert judge(store, of, ada, {"choice": 0}) is None
    assert judge(store, of, bob, {"choice": 0})
    with store.read() as session:
        said = session.scalars(select(JudgementRow.verdict).order_by(JudgementRow.id)).all()
        assert said == [{"skip": "I know too little"}, {"choice": 0}]


def test_one_of_so_many_items_is_gold_at_a_place_that_nobody_foresees(store):
    items = [pair(i) for i in range(4)] + [pair(100 + i, gold={"choice": 0}) for i in range(3)]
    of = queue(store, "compare", items, gold_every=3, overlap=30)
    places = []
    for number in range(30):
        who, order = rater(store, f"rater {number}"), list[bool]()
        while item := judge(store, of, who, {"choice": 0}):
            with store.read() as session:
                order.append(session.get_one(Item, item).gold is not None)
        assert (len(order), sum(order[:3]), sum(order[3:])) == (6, 1, 1)
        places += [order[:3].index(True), order[3:].index(True)]
    assert set(places) == {0, 1, 2}  # 60 draws: without one of three once in 10^10 times


def test_undo_is_a_new_row_and_opens_the_item_again(store):
    of, ada = queue(store, "compare", [pair(1), pair(2)]), rater(store, "Ada")
    first = judge(store, of, ada, {"choice": 0})
    again = key()
    with store.begin() as session:
        row = undo(session, ada, key=again)
        assert row is not None
        assert undo(session, ada, key=again) is row  # a retried undo takes nothing more back
        assert undo(session, ada, key=key()) is None
    assert judge(store, of, ada, {"choice": 1}) == first
    with store.read() as session:
        assert session.scalar(select(func.count()).select_from(JudgementRow)) == 3
        assert session.scalars(select(JudgementRow.verdict).where(live())).all() == [{"choice": 1}]


def test_an_assignment_is_its_raters_alone(store):
    of, ada, bob = queue(store, "compare", [pair(1)]), rater(store, "Ada"), rater(store, "Bob")
    with store.begin() as session:
        got = next_item(session, of, ada)
        assert got is not None
        assert own_assignment(session, got.assignment.id, bob) is None
        assert own_assignment(session, "x' OR 1=1", ada) is None


def test_progress(store):
    items = [pair(i) for i in range(3)] + [pair(7 + i, gold={"choice": 0}) for i in range(5)]
    of, ada, bob = queue(store, "compare", items, gold_every=2, overlap=2), rater(store, "Ada"), rater(store, "Bob")
    for given in range(1, 7):
        assert judge(store, of, ada, {"choice": 0})
        with store.read() as session:
            got = progress(session, session.get_one(Queue, of), ada)
        assert (got.given, got.most) == (given, 6)  # three items, and a gold one to each
    assert judge(store, of, ada, {"choice": 0}) is None
    judge(store, of, bob, {"skip": ""})
    with store.read() as session:
        assert progress(session, session.get_one(Queue, of), bob) == Progress(0, 6, True)
        assert coverage(session) == [Coverage("compare", 3, 6)]


def test_an_item_is_stored_once_and_a_bad_one_is_refused(store):
    with store.begin() as session:
        of = make_queue(session, "pairs", "compare")
        assert add_item(session, of, pair(1)) is not None
        assert add_item(session, of, pair(1)) is None
        with pytest.raises(SteersmanError, match="takes 2 answers, not 1"):
            add_item(session, of, NewItem("q", [TurnText("a")]))
        with pytest.raises(SteersmanError, match="same text"):
            add_item(session, of, NewItem("q", [TurnText("a"), TurnText("a")]))
        with pytest.raises(SteersmanError, match="choice must be"):
            add_item(session, of, pair(2, gold={"choice": 7}))
        with pytest.raises(SteersmanError, match="queue of compare"):
            make_queue(session, "pairs", "rank")
        with pytest.raises(SteersmanError, match="needs attributes"):
            make_queue(session, "ratings", "rate")


@pytest.mark.parametrize(
    ("task", "settings", "answers", "verdict", "stored"),
    [
        ("rank", {}, "abc", {"ranks": [3, 1, 1]}, {"ranks": [1, 0, 0]}),
        ("rate", {"attributes": {"kind": ["no", "so", "yes"]}}, "a",
         {"scores": {"kind": 3}}, {"scores": {"kind": 3}}),
        ("mark", {"labels": ["error"]}, "a", {"spans": []}, {"spans": []}),
        ("mark", {"labels": ["error"]}, "a", {"spans": [{"start": 0, "end": 1, "label": "error", "x": 1}]},
         {"spans": [{"start": 0, "end": 1, "label": "error"}]}),
        ("review", {}, "a", {"accept": False, "correction": "bet\0ter\ud800"},
         {"accept": False, "correction": "better?"}),
        ("review", {}, "a", {"accept": True, "correction": " "}, {"accept": True}),
    ],
)  # fmt: skip
def test_verdicts_of_each_task(store, task, settings, answers, verdict, stored):
    of, ada = queue(store, task, [NewItem("q", [TurnText(a) for a in answers])], **settings), rater(store, "Ada")
    judge(store, of, ada, verdict)
    with store.read() as session:
        assert session.scalars(select(JudgementRow.verdict)).one() == stored


@pytest.mark.parametrize(
    ("task", "settings", "answers", "verdict"),
    [
        ("compare", {}, "ab", {"choice": True}),
        ("compare", {}, "ab", {"choice": 2}),
        ("compare", {}, "ab", []),
        ("rank", {}, "abc", {"ranks": [0, 1]}),
        ("rank", {}, "abc", {"ranks": [0, 1, "2"]}),
        ("rate", {"attributes": {"kind": ["no", "yes"]}}, "a", {"scores": {"kind": 3}}),
        ("rate", {"attributes": {"kind": ["no", "yes"]}}, "a", {"scores": {"kind": 1, "x": 1}}),
        ("rate", {"attributes": {"kind": ["no", "yes"]}}, "a", {"scores": {}}),
        ("mark", {"labels": ["error"]}, "a", {"spans": [{"start": 0, "end": 2, "label": "error"}]}),
        ("mark", {"labels": ["error"]}, "a", {"spans": [{"start": 0, "end": 1, "label": "other"}]}),
        ("review", {}, "a", {"accept": "yes"}),
        ("review", {}, "a", {"accept": True, "correction": "x" * 50_001}),
    ],
)
def test_a_verdict_that_is_none_is_refused_and_the_item_stays_open(store, task, settings, answers, verdict):
    of, ada = queue(store, task, [NewItem("q", [TurnText(a) for a in answers])], **settings), rater(store, "Ada")
    with pytest.raises(SteersmanError, match=task if task != "review" else "accept|correction"):
        judge(store, of, ada, verdict)
    with store.read() as session:
        assert session.scalar(select(func.count()).select_from(JudgementRow)) == 0


def test_a_conversation_is_a_tree_and_its_thumbs_are_the_newest(store):
    ada = rater(store, "Ada")
    with store.begin() as session:
        chat = start(session, ada, system="Be kind.")
        asked = add_turn(session, chat, "user", TurnText("你好 \0there"))
        told = add_turn(session, chat, "assistant", TurnText("Hello", ("m", "1"), {"temperature": 0.7}, "eos", 0.2))
        branch(session, chat, told, "assistant", TurnText("Hi", ("m", "1")))
        assert [m["content"] for m in messages(path(session, chat))] == ["Be kind.", "你好 there", "Hi"]
        edited = branch(session, chat, asked, "user", TurnText("Good day"))
        assert [m["content"] for m in messages(path(session, chat))] == ["Be kind.", "Good day"]
        assert edited.parent_id == asked.parent_id
        judge_turn(session, told, ada, {"up": True, "reasons": ["clear"]}, key=key())
        judge_turn(session, told, ada, {"up": False, "correction": "Hello, you."}, key=key())
        assert thumbs(session, ada, [told.id])[told.id].verdict == {"up": False, "correction": "Hello, you."}
        assert chat.title == "你好 there"


def test_who_is_forgotten_leaves_judgements_without_a_name(store):
    of, ada = queue(store, "compare", [pair(1)]), rater(store, "Ada", password="hash")
    judge(store, of, ada, {"choice": 0})
    with store.begin() as session:
        token = log_in(session, ada)
        seen = visitor(session, token)
        assert seen is not None
        assert (seen.name, seen.role) == ("Ada", "rater")
        assert session.scalars(select(Login.token)).one() != token
    pseudonym, gone = forget(store, "Ada")
    assert gone
    assert pseudonym.startswith("r-")
    with store.read() as session:
        assert visitor(session, token) is None
        assert session.scalar(select(func.count()).select_from(Person)) == 0
        assert session.scalar(select(func.count()).select_from(JudgementRow)) == 1
        assert session.scalar(select(func.count()).select_from(Forgotten)) == 0  # nothing names this one again
    with pytest.raises(SteersmanError, match="knows nobody"):
        forget(store, "Ada")


def test_a_name_that_is_forgotten_is_in_no_file_while_the_store_is_open(tmp_path, monkeypatch):
    """Nor in the write-ahead log; where a reader needs that one, it is said, and the log goes with the last one."""
    monkeypatch.setattr(database, "LOG_SECONDS", 0)
    name = b"Adelheid-Quendolyne"

    def holders() -> list[str]:
        return [p.name for p in tmp_path.iterdir() if name in p.read_bytes()]

    made, beside = open_store(tmp_path / "f.db"), open_store(tmp_path / "f.db")
    rater(made, name.decode())
    queue(made, "compare", [pair(1)])
    assert holders() == ["f.db-wal"]
    assert forget(made, name.decode())[1]
    assert holders() == []
    rater(made, name.decode())
    with beside.read() as session:
        session.scalars(select(Person.name)).all()
        assert forget(made, name.decode())[1] is False
        with made.begin() as writing:  # writers wait for no reader afterwards
            assert writing.scalar(sa.text("PRAGMA busy_timeout")) == 1000 * database.BUSY_SECONDS
    made.close()
    beside.close()
    assert holders() == []


def test_a_store_of_the_first_tables_is_brought_up_to_date(address, store):
    judge(store, queue(store, "compare", [pair(1)]), rater(store, "Ada"), {"choice": 0})
    with store.engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE forgotten"))
        connection.execute(sa.text("ALTER TABLE answer DROP COLUMN finish"))
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0001'"))
    new = open_store(address)
    with new.engine.connect() as connection:
        assert not compare_metadata(MigrationContext.configure(connection), Base.metadata)
    with new.read() as session:
        assert session.scalars(select(JudgementRow.verdict)).all() == [{"choice": 0}]
    new.close()


def test_a_login_ends(store):
    ada = rater(store, "Ada")
    with store.begin() as session:
        token = log_in(session, ada)
        log_out(session, token)
        assert visitor(session, token) is None
        token = log_in(session, ada)
        session.execute(sa.update(Login).values(expires=0.0))
        assert visitor(session, token) is None


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://host/x", "known are sqlite"),
        ("postgresql://me:secret@host/x", "PGPASSWORD"),
        ("sqlite://", "name a file"),
        ("sqlite:////no/such/folder/x.db", "folder .* does not exist"),
        ("postgresql://nobody@127.0.0.1:1/x", "can not be opened"),
    ],
)
def test_an_address_that_is_none_is_refused_without_its_password(url, message):
    with pytest.raises(SteersmanError, match=message) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "x.db").write_text("no database, but text that is long enough to be looked at as one " * 20)
    with pytest.raises(SteersmanError, match="can not be opened"):
        open_store(tmp_path / "x.db")
    with pytest.raises(SteersmanError, match="there is no such store"):
        open_store(tmp_path / "y.db", create=False)
    assert store_url(tmp_path / "z.db").database.endswith("z.db")


@pytest.mark.parametrize(("ahead", "lasts"), [(3600, True), (365 * 24 * 3600, False)])
def test_a_login_that_a_clock_far_ahead_gave_does_not_outlast_others(store, monkeypatch, ahead, lasts):
    ada = rater(store, "Ada", password="a hash")
    with store.begin() as session:
        with monkeypatch.context() as patch:
            patch.setattr(raters, "now", lambda: time.time() + ahead)
            token = log_in(session, ada)
            assert visitor(session, token) is not None
        assert (visitor(session, token) is not None) is lasts
        assert visitor(session, log_in(session, ada)) is not None
