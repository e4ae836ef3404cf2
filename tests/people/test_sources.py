"""The store's judgements as experiments and the wheel read them, in SQLite and PostgreSQL."""

from __future__ import annotations

from people_kit import judge, key, pair, queue, rater

from steersman.cli import main
from steersman.data import Row
from steersman.people.filters import FilterConfig, sift
from steersman.people.judgements import judgement, plain
from steersman.people.sources import open_judgements
from steersman.people.store.conversations import TurnText, add_turn, start
from steersman.people.store.items import NewItem
from steersman.people.store.judgements import judge_turn
from steersman.people.store.schema import Rater
from steersman.people.wheel.lessons import lessons


def test_comparisons_and_gold_items(store, address):
    items = [pair(0), pair(1), pair(2), pair(3, gold={"choice": 0})]
    name = queue(store, "compare", items, overlap=2, gold_every=2)
    ada, bob = rater(store, "ada"), rater(store, "bob")
    for who, said in ((ada, ["tie", 0, 0]), (bob, ["both_bad", 0, 0])):
        plain = iter(said)
        while judge(store, name, who, lambda got, p=plain: {"choice": 0 if got.item.gold else next(p)}, seconds=3.0):
            pass
    found = list(open_judgements(address))
    assert len(found) == 8
    gold = [one for one in found if one.expected is not None]
    assert len(gold) == 2
    assert {one.expected for one in gold} == {"first"}
    assert {one.models for one in found} == {("base", "tuned")}
    assert all(one.seconds == 3.0 for one in found)
    kept, left_out = sift(found, FilterConfig())
    assert len(lessons(kept, "pairs")) >= 1
    assert any(why == "gold item" for _, why in left_out)


def test_an_experiment_reads_the_store(store, address, capsys):
    name = queue(store, "compare", [pair(i) for i in range(6)], overlap=20)
    for i in range(15):
        who = rater(store, f"r{i}")
        for _ in range(3):
            judge(store, name, who, {"choice": 1})
    assert main(["ab", address, "--experiment.control", "base", "--experiment.treatment", "tuned"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "tuned against base" in said
    assert "take tuned" in said
    assert main(["leaderboard", address, "--draws", "20"]) == 0


def test_a_rater_is_one_sided_who_presses_one_side_and_not_who_finds_one_answer_better(store, address):
    name = queue(store, "compare", [pair(i) for i in range(24)], overlap=2)
    left, honest = rater(store, "left"), rater(store, "honest")
    for _ in range(24):
        judge(store, name, left, lambda got: {"choice": got.assignment.sides[0]}, seconds=3.0)
        judge(store, name, honest, {"choice": 0}, seconds=3.0)
    with store.read() as session:
        names = {session.get_one(Rater, one).pseudonym: word for one, word in ((left, "left"), (honest, "honest"))}
    found = list(open_judgements(address))
    kept, left_out = sift(found, FilterConfig())
    assert [names[one.user] for one in kept] == ["honest"] * 24
    assert {(names[one.user], why) for one, why in left_out} == {("left", "rater always says the same")}
    assert [judgement(Row(plain(one), "kept", 1)) for one in found] == found


def test_models_of_one_name_are_told_apart_by_their_versions(store, address, capsys):
    """As two runs' folders `model` are; the others go by their names, an @ in them or not."""
    pairs = (
        [("model", "aaa"), ("model", "bbb")],
        [("@cf/meta/llama-3", ""), ("org/m@v1", "")],
        [("x", "1"), ("y", "1")],
    )
    items = [
        NewItem(f"q{i} {models}", [TurnText("good", models[0]), TurnText("bad", models[1])])
        for models in pairs
        for i in range(2)
    ]
    name = queue(store, "compare", items, overlap=20)
    for i in range(4):
        who = rater(store, f"r{i}")
        while judge(store, name, who, {"choice": 0}):
            pass
    met = {one.models for one in open_judgements(address)}
    assert met == {("model@aaa", "model@bbb"), ("@cf/meta/llama-3", "org/m@v1"), ("x", "y")}
    arms = ["--experiment.control", "model@bbb", "--experiment.treatment"]
    assert main(["ab", address, *arms, "model@aaa"]) == 0
    assert "model@aaa against model@bbb" in " ".join(capsys.readouterr().out.split())
    assert main(["ab", address, *arms, "model"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "models found: @cf/meta/llama-3, model@aaa, model@bbb, org/m@v1, x, y" in said


def test_a_thumb_that_its_rater_replaced_counts_for_no_arm(store, address, capsys):
    """Every user of the new model slipped at first: in the end each model has 30 thumbs up and none down."""
    for i in range(60):
        who = rater(store, f"u{i}")
        with store.begin() as session:
            chat = start(session, who)
            add_turn(session, chat, "user", TurnText(f"q{i}"))
            turn = add_turn(session, chat, "assistant", TurnText("a", ("new" if i % 2 else "old", "1")))
            for up in (False, True) if i % 2 else (True,):
                judge_turn(session, turn, who, {"up": up}, key=key())
    assert [one.label for one in open_judgements(address)] == [True] * 60
    words = ["--experiment.control", "old", "--experiment.treatment", "new", "--experiment.metric", "thumb"]
    assert main(["ab", address, *words]) == 0
    assert "go on collecting" in capsys.readouterr().out
