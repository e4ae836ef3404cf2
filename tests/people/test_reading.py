"""Judgements as rows: what the loaders make of a store, by hand-counted votes, and what a verb trains on."""

from __future__ import annotations

import json

import pytest
from people_kit import judge, key, pair, queue, rater
from sqlalchemy import select

from steersman.assets import story_model
from steersman.cli import main
from steersman.data import (
    DataConfig,
    demonstrations,
    feedback,
    preferences,
    prompts,
    rankings,
    ratings,
    recognise_kind,
)
from steersman.people.store import open_store
from steersman.people.store.conversations import TurnText, add_turn, start
from steersman.people.store.items import NewItem
from steersman.people.store.judgements import judge_turn, undo
from steersman.people.store.schema import Rater
from steersman.types import SteersmanError


def config(address: str, **more) -> DataConfig:
    return DataConfig.model_validate({"path": address} | more)


def pseudonym(store, rater_id: int) -> str:
    with store.read() as session:
        return session.scalars(select(Rater.pseudonym).where(Rater.id == rater_id)).one()


def voted(store, choices: list[list]) -> tuple[list[int], int]:
    """A queue of pairs on which rater k says choices[k][i] of pair i."""
    of = queue(store, "compare", [pair(i) for i in range(len(choices[0]))], overlap=len(choices))
    raters = [rater(store, f"rater {k}") for k in range(len(choices))]
    for who, said in zip(raters, choices, strict=True):
        for choice in said:
            judge(store, of, who, {"choice": choice})
    return raters, of


def test_votes_become_one_pair_with_a_soft_label(address, store):
    voted(store, [[0, 1, "tie"], [0, 1, 0], [1, 1, "both_bad"]])
    got = preferences(config(address)).train
    assert [(e.prompt, e.chosen, e.rejected) for e in got] == [
        ("question 0", "good 0", "bad 0"),
        ("question 1", "bad 1", "good 1"),
        ("question 2", "good 2", "bad 2"),
    ]
    assert [e.votes for e in got] == [(1.0, 1.0, 0.0), (1.0, 1.0, 1.0), (0.5, 1.0, 0.5)]
    assert [round(e.agreement, 4) for e in got] == [0.6667, 1.0, 0.6667]
    assert [e.weight for e in got] == [1.0, 1.0, 1.0]


def test_raters_are_weighted_as_the_recipe_says(address, store):
    raters, _ = voted(store, [[0], [1], [1]])
    names = [pseudonym(store, r) for r in raters]
    weights = {names[0]: 3.0, names[1]: 1.0, names[2]: 0.0}
    (got,) = preferences(config(address, judgements={"weights": weights})).train
    assert (got.chosen, got.agreement, got.votes, got.weight) == ("good 0", 0.75, (1.0, 0.0), 2.0)


def test_thumbs_of_pairs_have_their_raters_weights(address, store):
    raters, _ = voted(store, [[0], [1]])
    weights = {pseudonym(store, raters[0]): 2.0, pseudonym(store, raters[1]): 0.5}
    thumbs = feedback(config(address, judgements={"combine": "each", "weights": weights})).train
    assert [(e.completion, e.label, e.weight) for e in thumbs] == [
        ("good 0", True, 2.0), ("bad 0", False, 2.0), ("bad 0", True, 0.5), ("good 0", False, 0.5),
    ]  # fmt: skip


def test_each_judgement_may_be_a_row(address, store):
    raters, _ = voted(store, [[0], [1]])
    weights = {pseudonym(store, raters[1]): 0.5}
    got = preferences(config(address, judgements={"combine": "each", "weights": weights})).train
    assert [(e.chosen, e.agreement, e.weight) for e in got] == [("good 0", 1.0, 1.0), ("bad 0", 1.0, 0.5)]


def test_ties_obey_the_data_section(address, store):
    voted(store, [["tie", 0]])
    with pytest.raises(SteersmanError, match=r"judgement 1: the answers are tied \(data.ties"):
        preferences(config(address))
    assert len(preferences(config(address, ties="drop")).train) == 1
    assert [e.agreement for e in preferences(config(address, ties="keep")).train] == [0.5, 1.0]


def test_what_was_undone_skipped_or_gold_teaches_nothing(address, store, monkeypatch):
    monkeypatch.setattr("secrets.randbelow", lambda places: 1)  # the gold item comes last of each three
    of = queue(store, "compare", [pair(0), pair(1), pair(2, gold={"choice": 0})], gold_every=3)
    ada = rater(store, "Ada")
    judge(store, of, ada, {"choice": 1})
    with store.begin() as session:
        undo(session, ada, key=key())
    judge(store, of, ada, {"choice": 0})
    judge(store, of, ada, {"skip": ""})
    judge(store, of, ada, {"choice": 0})
    assert [e.chosen for e in preferences(config(address)).train] == ["good 0"]


def test_raters_who_miss_gold_items_are_left_out(address, store):
    items = [pair(i) for i in range(2)] + [pair(8, gold={"choice": 0}), pair(9, gold={"choice": 0})]
    of = queue(store, "compare", items, gold_every=2, overlap=2)
    for name, choice in (("Ada", 0), ("Bob", 1)):
        who = rater(store, name)
        while judge(store, of, who, {"choice": choice}):
            pass
    got = preferences(config(address, judgements={"min_gold": 0.5})).train
    assert [e.votes for e in got] == [(1.0,), (1.0,)]
    assert [e.chosen for e in got] == ["good 0", "good 1"]


def test_rankings_ratings_and_reviews(address, store):
    ada, bob = rater(store, "Ada"), rater(store, "Bob")
    three = queue(store, "rank", [NewItem("q", [TurnText("a"), TurnText("b"), TurnText("c")])], overlap=2)
    judge(store, three, ada, {"ranks": [0, 1, 2]})
    judge(store, three, bob, {"ranks": [1, 0, 2]})
    rate = queue(store, "rate", [NewItem("q", [TurnText("a")])], overlap=2, attributes={"kind": ["1", "2", "3", "4"]})
    judge(store, rate, ada, {"scores": {"kind": 4}})
    judge(store, rate, bob, {"scores": {"kind": 1}})
    review = queue(store, "review", [NewItem([{"role": "user", "content": "hi"}], [TurnText(a)]) for a in "xyz"])
    for verdict in ({"accept": True}, {"accept": False}, {"accept": False, "correction": "better"}):
        judge(store, review, ada, verdict)
    (ranked,) = rankings(config(address, ties="keep")).train
    assert (ranked.completions, ranked.ranks) == (["a", "b", "c"], [0.5, 0.5, 2.0])
    thumbs = feedback(config(address)).train
    (rated,) = ratings(config(address)).train
    assert rated.scores == {"kind": 2.5}
    assert [(e.completion if e.prompt == "q" else e.completion[0]["content"], e.label) for e in thumbs] == [
        ("x", True), ("y", False), ("z", False), ("a", True), ("c", False), ("b", True), ("c", False),
    ]  # fmt: skip
    assert [e.completion[-1]["content"] for e in demonstrations(config(address)).train] == ["better", "x"]
    pairs = preferences(config(address)).train
    assert [(e.chosen, e.rejected) for e in pairs[:2]] == [("a", "c"), ("b", "c")]
    assert (pairs[2].chosen[0]["content"], pairs[2].rejected[0]["content"]) == ("better", "z")
    assert recognise_kind(config(address), ("ranking", "rating")) == "ranking"
    assert [q.prompt for q in prompts(config(address)).train] == ["q", [{"role": "user", "content": "hi"}]]


def test_thumbs_in_chats(address, store):
    ada, bob = rater(store, "Ada"), rater(store, "Bob")
    with store.begin() as session:
        chat = start(session, ada, system="Be kind.")
        add_turn(session, chat, "user", TurnText("hi"))
        first = add_turn(session, chat, "assistant", TurnText("Hello", ("m", "7")))
        add_turn(session, chat, "user", TurnText("and?"))
        second = add_turn(session, chat, "assistant", TurnText("What?"))
        judge_turn(session, first, ada, {"up": False}, key=key())
        judge_turn(session, first, ada, {"up": True}, key=key())
        judge_turn(session, second, ada, {"up": False, "correction": "Yes?"}, key=key())
        judge_turn(session, second, bob, {"up": True}, key=key())
    got = feedback(config(address, judgements={"combine": "each"})).train
    assert [(e.prompt[-1]["content"], e.completion[0]["content"], e.label) for e in got] == [
        ("hi", "Hello", True), ("and?", "What?", False), ("and?", "What?", True),
    ]  # fmt: skip
    assert [m["role"] for m in got[1].prompt] == ["system", "user", "assistant", "user"]
    assert got[0].row.data["models"] == ["m@7"]
    # The two raters are at odds over the second answer, so it is neither a thumb nor a demonstration; its correction
    # stays one.
    with pytest.raises(SteersmanError, match="all 1 labels are true"):
        feedback(config(address))
    assert [e.completion[0]["content"] for e in demonstrations(config(address)).train] == ["Yes?", "Hello"]
    got = demonstrations(config(address, judgements={"combine": "each"})).train
    assert [e.completion[0]["content"] for e in got] == ["Yes?", "Hello", "What?"]


def test_an_answer_that_most_reject_is_no_demonstration_whatever_else_they_write(address, store):
    items = [NewItem("q", [TurnText("five")]), NewItem("q", [TurnText("4")]), NewItem("q", [TurnText("four")])]
    of = queue(store, "review", items, overlap=3)
    wrong, right = {"accept": False}, {"accept": True}
    for name, said in (
        ("Ada", ({**wrong, "correction": "Four."}, right, {**right, "correction": "Four!"})),
        (
            "Bob",
            ({**wrong, "correction": "It's four."}, {**right, "correction": "4."}, {**right, "correction": "IV"}),
        ),
        ("Cyd", (right, wrong, wrong)),
    ):
        who = rater(store, name)
        for verdict in said:
            judge(store, of, who, verdict)
    assert [(e.completion, e.label) for e in feedback(config(address)).train] == [
        ("five", False), ("4", True), ("four", True),
    ]  # fmt: skip
    got = [e.completion for e in demonstrations(config(address)).train]
    assert got == ["Four.", "Four!", "It's four.", "4.", "IV", "4"]


def test_a_chat_with_a_system_prompt_gives_its_prompt(address, store):
    ada, asked = rater(store, "Ada"), {"role": "user", "content": "What is a fox?"}
    for system in ("", "Be kind."):
        with store.begin() as session:
            chat = start(session, ada, system=system)
            add_turn(session, chat, "user", TurnText(asked["content"]))
            add_turn(session, chat, "assistant", TurnText("An animal"))
            add_turn(session, chat, "user", TurnText("And a wolf?"))
    kind = {"role": "system", "content": "Be kind."}
    assert [q.prompt for q in prompts(config(address)).train] == [[asked], [kind, asked]]


COMPARED = {
    "unanimous": [0, 0, 0], "second": [1, 1, 0], "even": [0, 1], "tie": ["tie", "tie"], "tie and one": ["tie", 1],
    "bad": ["both_bad", "both_bad"], "bad and one": ["both_bad", "both_bad", 0],
    "bad and tie": ["both_bad", "both_bad", "tie"], "half bad": ["both_bad", 0], "single": [1],
}  # fmt: skip
BY_HAND = {
    ("unanimous", "A"): True, ("unanimous", "B"): False, ("second", "B"): True, ("second", "A"): False,
    ("tie and one", "B"): True, ("tie and one", "A"): False, ("single", "B"): True, ("single", "A"): False,
    ("bad", "A"): False, ("bad", "B"): False, ("bad and one", "A"): False, ("bad and one", "B"): False,
    ("bad and tie", "A"): False, ("bad and tie", "B"): False, ("half bad", "B"): False,
}  # fmt: skip


def test_the_thumbs_of_a_comparison_do_not_depend_on_what_else_is_there(address, store, tmp_path, capsys):
    raters = [rater(store, name) for name in ("Ada", "Bob", "Cyd")]
    for name, choices in COMPARED.items():
        of = queue(store, "compare", [NewItem(name, [TurnText("A"), TurnText("B")])], name=name, overlap=3)
        for who, choice in zip(raters, choices, strict=False):
            judge(store, of, who, {"choice": choice})

    def thumbs() -> dict:
        return {(e.prompt, e.completion): e.label for e in feedback(config(address)).train}

    def exported(*more: str) -> list[dict]:
        out = tmp_path / "out.jsonl"
        assert main(["export-feedback", address, *more, "--out", str(out)]) == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    assert thumbs() == BY_HAND
    told = capsys.readouterr().err
    assert 'the feedback rows: 9 from comparisons, 6 from comparisons with "both bad"' in told
    assert "left out of the feedback rows: 5 with an answer whose raters are evenly split" in told
    for more in (("--for", "kto"), ("--for", "reward", "--shape", "thumbs")):
        rows = exported(*more)
        assert {(row["prompt"], row["completion"]): row["label"] for row in rows} == BY_HAND
        assert not any({"source", "left_out"} & set(row) for row in rows)
    each = exported("--for", "kto", "--judgements.combine", "each")
    said = [choice for choices in COMPARED.values() for choice in choices]
    assert sum(row["label"] for row in each) == sum(choice in (0, 1) for choice in said)
    assert sum(not row["label"] for row in each) == sum(
        (choice in (0, 1)) + 2 * (choice == "both_bad") for choice in said
    )
    review = queue(store, "review", [NewItem("q", [TurnText("fine")])])
    judge(store, review, raters[0], {"accept": True})
    assert thumbs() == BY_HAND | {("q", "fine"): True}


def test_both_bad_of_equal_or_cut_answers_is_a_thumb_down_and_a_choice_between_them_none(address, store):
    cut = TurnText("cu", None, None, "length")
    items = [[TurnText("same"), TurnText("same ")]] * 2 + [[TurnText("whole"), cut]] * 2
    of = queue(store, "compare", [NewItem(f"q{i}", answers) for i, answers in enumerate(items)])
    who = rater(store, "Ada")
    for choice in (0, "both_bad", 0, "both_bad"):
        judge(store, of, who, {"choice": choice})
    judge(store, queue(store, "compare", [pair(9)], name="more"), who, {"choice": 0})
    got = [(e.prompt, e.completion, e.label) for e in feedback(config(address)).train]
    assert got == [
        ("q1", "same", False), ("q1", "same ", False), ("q3", "whole", False), ("q3", "cu", False),
        ("question 9", "good 9", True), ("question 9", "bad 9", False),
    ]  # fmt: skip


def test_an_answer_that_one_rater_compared_and_gave_a_thumb_gets_one_thumb(address, store):
    ada, bob = rater(store, "Ada"), rater(store, "Bob")
    of = queue(store, "compare", [pair(0)], overlap=2)
    review = queue(store, "review", [NewItem("question 0", [TurnText("good 0")])])
    judge(store, of, ada, {"choice": 0})
    judge(store, review, ada, {"accept": True})
    got = feedback(config(address)).train
    assert [(e.completion, e.label) for e in got] == [("good 0", True), ("bad 0", False)]
    judge(store, of, bob, {"choice": 1})
    got = feedback(config(address)).train
    assert [(e.completion, e.label) for e in got] == [("good 0", True), ("good 0", False)]


def test_only_some_queues(address, store):
    voted(store, [[0]])
    other = queue(store, "compare", [pair(7)], name="other")
    judge(store, other, rater(store, "Ada"), {"choice": 0})
    got = preferences(config(address, judgements={"queues": ["other"]})).train
    assert [e.prompt for e in got] == ["question 7"]


def test_a_store_without_what_is_wanted_is_refused(address, store):
    voted(store, [[0]])
    with pytest.raises(SteersmanError, match=r"nothing that gives demonstration rows.*what it has: preference"):
        demonstrations(config(address))
    with pytest.raises(SteersmanError, match="no judgements that can be learned"):
        recognise_kind(config(address), ("rating",))


def test_a_file_beside_a_store(address, store, tmp_path):
    voted(store, [[0]])
    (tmp_path / "more.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n")
    got = preferences(config([str(tmp_path / "more.jsonl"), address])).train
    assert [e.chosen for e in got] == ["c", "good 0"]


@pytest.mark.parametrize("verb", ["dpo", "kto", "sft", "reward"])
def test_an_exported_file_is_read_as_the_store_is(address, store, tmp_path, verb, capsys):
    voted(store, [[0, 1, "tie"], [0, 1, "tie"]])
    review = queue(store, "review", [NewItem("q", [TurnText(a)]) for a in "xy"])
    ada = rater(store, "Ada Lovelace")
    judge(store, review, ada, {"accept": True})
    judge(store, review, ada, {"accept": False})
    out = tmp_path / "out.jsonl"
    assert main(["export-feedback", address, "--for", verb, "--out", str(out)]) == 0
    reader = {"dpo": preferences, "kto": feedback, "sft": demonstrations, "reward": preferences}[verb]
    plain, stored = reader(DataConfig(path=str(out))).train, reader(config(address, ties="drop")).train
    for one in [*plain, *stored]:
        one.row = None  # type: ignore[assignment]
    assert plain == stored
    assert "Lovelace" not in out.read_text()
    assert "1 ties left out" in capsys.readouterr().out or verb in ("kto", "sft")


def test_a_verb_that_reads_no_examples_says_what_to_do(tmp_path, capsys):
    open_store(tmp_path / "f.db").close()
    assert main(["evaluate", f"sqlite:///{tmp_path / 'f.db'}", "--metrics", "[rougeL]"]) == 2
    assert "export-feedback" in capsys.readouterr().err


@pytest.mark.slow
def test_dpo_trains_on_a_store(tmp_path):
    made = open_store(tmp_path / "f.db")
    voted(made, [[0, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0]])
    made.close()
    words = [
        "dpo", "--model.path", str(story_model()), "--data.path", f"sqlite:///{tmp_path / 'f.db'}",
        "--data.ties", "drop", "--loss.soft_labels", "true", "--train.epochs", "1",
        "--run.dir", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(words) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"] is not False
