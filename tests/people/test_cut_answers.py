"""An answer that the length limit cut has no end to learn: what sft, kto, dpo and the wheel make of it."""

from __future__ import annotations

import json

import pytest
from people_kit import judge, key, queue, rater

from steersman.cli import main
from steersman.data import DataConfig, Row, demonstrations, feedback, preferences, rankings
from steersman.people.collect.verb import QueueConfig, _fill_queue
from steersman.people.filters import FilterConfig, sift
from steersman.people.judgements import judgement, plain
from steersman.people.sources import StoredJudgements
from steersman.people.store.conversations import TurnText, add_turn, start
from steersman.people.store.items import NewItem
from steersman.people.store.judgements import judge_turn
from steersman.people.wheel.lessons import lessons
from steersman.types import SteersmanError


def said(text: str, finish: str | None = "eos") -> TurnText:
    return TurnText(text, ("m", ""), None, finish)


def text(answer) -> str:
    """Of an answer in a chat."""
    return answer[0]["content"]


def thumbs(store, rows) -> None:
    """A chat for each (answer, finish, verdict)."""
    who = rater(store, "Ada")
    with store.begin() as session:
        for number, (text, finish, verdict) in enumerate(rows):
            chat = start(session, who)
            asked = add_turn(session, chat, "user", TurnText(f"question {number}"))
            answer = add_turn(session, chat, "assistant", said(text, finish), asked.id)
            judge_turn(session, answer, who, verdict, key=key())


CHATS = [
    ("It lies on the river Sei", "length", {"up": True}),
    ("It is Paris.", "eos", {"up": True}),
    ("I do not kn", "length", {"up": False}),
    ("Par", "length", {"up": False, "correction": "Paris."}),
    ("Nobody knows how this ended", None, {"up": True}),
]


def test_praise_of_a_cut_answer_teaches_no_end(address, store, tmp_path, capsys):
    thumbs(store, CHATS)
    taught = [text(e.completion) for e in demonstrations(DataConfig(path=address)).train]
    assert sorted(taught) == ["It is Paris.", "Nobody knows how this ended", "Paris."]
    told = {text(e.completion): e.label for e in feedback(DataConfig(path=address)).train}
    assert told == {"It is Paris.": True, "Nobody knows how this ended": True, "I do not kn": False, "Par": False}
    assert "left out of the feedback rows: 1 with an answer that the length limit cut" in capsys.readouterr().err
    out = tmp_path / "sft.jsonl"
    assert main(["export-feedback", address, "--for", "sft", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(row["completion"] for row in rows) == sorted(taught)
    assert not any("cut" in row for row in rows)


def test_a_store_with_praise_of_cut_answers_alone_says_so(address, store):
    thumbs(store, CHATS[:1])
    with pytest.raises(SteersmanError, match=r"holds nothing that gives demonstration rows .* the length limit cut"):
        demonstrations(DataConfig(path=address))


def test_the_wheel_learns_from_cut_answers_what_speaks_against_them(address, store):
    thumbs(store, CHATS)
    rows = list(StoredJudgements(address))
    assert [one.cut for one in rows] == [True, False, True, True, False]
    assert [judgement(Row(plain(one), "f", i)) for i, one in enumerate(rows)] == rows
    kept, left_out = sift(rows, FilterConfig())
    assert [(one.answers[0], why) for one, why in left_out] == [(CHATS[0][0], "answer cut by the length limit")]
    assert sorted(r["completion"] for r in lessons(kept, "sft")) == [
        "It is Paris.", "Nobody knows how this ended", "Paris."
    ]  # fmt: skip
    assert CHATS[0][0] not in [r["completion"] for r in lessons(kept, "kto")]


def test_pairs_and_rankings_are_of_whole_answers(address, store):
    """A file of answers says how they ended; a comparison with a cut one is left out, whoever won."""
    pairs = [NewItem("p", [said("whole"), said("cu", "length")]), NewItem("q", [said("good"), said("bad", None)])]
    of = queue(store, "compare", pairs)
    ranked = queue(store, "rank", [NewItem("r", [said("one"), said("tw", "length"), said("three")])])
    few = queue(store, "rank", [NewItem("s", [said("x", "length"), said("y")])], name="few")
    who = rater(store, "Ada")
    judge(store, of, who, {"choice": 1})
    judge(store, of, who, {"choice": 0})
    judge(store, ranked, who, {"ranks": [1, 0, 2]})
    judge(store, few, who, {"ranks": [0, 1]})
    assert [(e.chosen, e.rejected) for e in preferences(DataConfig(path=address)).train] == [
        ("good", "bad"), ("one", "three"),
    ]  # fmt: skip
    assert [e.completions for e in rankings(DataConfig(path=address)).train] == [["one", "three"]]
    kept, left_out = sift(list(StoredJudgements(address)), FilterConfig())
    assert [(one.prompt, why) for one, why in left_out] == [("p", "answer cut by the length limit")]
    assert [one.prompt for one in kept] == ["q"]


def test_a_queue_takes_over_how_the_answers_of_its_file_ended(address, store, tmp_path):
    file, who = tmp_path / "samples.jsonl", rater(store, "Ada")

    def fill(finishes) -> None:
        rows = [
            {"prompt": f"p{i}", "completion": f"answer {i}"} | ({} if finish is None else {"finish": finish})
            for i, finish in enumerate(finishes)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        _fill_queue(store, "review", QueueConfig(task="review", file=str(file)))

    fill([None, None, None])
    for _ in range(3):
        judge(store, queue(store, "review", []), who, {"accept": True})
    assert len(demonstrations(DataConfig(path=address)).train) == 3
    fill(["eos", "length", "stop"])  # items that are there already learn it, too
    assert [e.prompt for e in demonstrations(DataConfig(path=address)).train] == ["p0", "p2"]
    file.write_text(json.dumps({"prompt": "p", "responses": ["a", "b"], "finish": ["eos"]}) + "\n")
    with pytest.raises(SteersmanError, match=r"line 1.*finish.*each of the 2 answers"):
        _fill_queue(store, "two", QueueConfig(task="compare", file=str(file)))
