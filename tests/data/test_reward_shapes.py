"""What reward models are trained on beyond pairs: votes, steps, ratings with gaps, rows that rank by a column."""

from __future__ import annotations

import json

import pytest

from steersman.data import DataConfig, preferences, rankings, ratings, recognise_kind, steps
from steersman.types import SteersmanError

KINDS = ("preference", "ranking", "rating", "feedback", "steps")


def load(folder, fn, rows, **given):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return fn(DataConfig(path=str(path), **given))


def kind(folder, row, **given):
    return load(folder, lambda config: recognise_kind(config, KINDS), [row], **given)


STEPS = {"prompt": "2+2+2?", "steps": ["2+2=4", "4+2=7"], "labels": [True, 0.25]}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


def test_the_kind_is_that_of_the_rows(tmp_path):
    assert kind(tmp_path, PAIR) == "preference"
    assert kind(tmp_path, {"prompt": "q", "responses": ["a", "b"], "ranks": [0, 1]}) == "ranking"
    assert kind(tmp_path, {"prompt": "q", "completion": "a", "label": 1}) == "feedback"
    assert kind(tmp_path, {"question": "q", "answer": "a", "score": 1}) == "rating"
    assert kind(tmp_path, {"prompt": "q", "completion": "a", "x": 1, "y": 2}, scores=["x", "y"]) == "rating"
    assert kind(tmp_path, {"prompt": "q", "completion": "a", "x": 1}, rank_by=["x"]) == "ranking"
    assert kind(tmp_path, STEPS) == "steps"
    with pytest.raises(SteersmanError, match=r"these rows are prompt and completion.*preference pairs, which need"):
        kind(tmp_path, {"prompt": "q", "completion": "a"})


def test_votes_become_a_soft_label(tmp_path):
    (e,) = load(tmp_path, preferences, [PAIR | {"votes": [1, 1, 0.5, 0]}]).train
    assert (e.agreement, e.votes) == (0.625, (1, 1, 0.5, 0))
    with pytest.raises(SteersmanError, match=r"line 1, field 'votes': must lie between 0 and 1, not 2"):
        load(tmp_path, preferences, [PAIR | {"votes": [1, 2]}])
    voted = {
        "instruction": "i",
        "response1": "a",
        "response2": "b",
        "annotator1": 2,
        "annotator2": 2,
        "annotator3": 0,
    }
    (e,) = load(tmp_path, preferences, [voted]).train
    assert (e.chosen[0]["content"], e.votes) == ("b", (1, 1, 0.5))
    assert e.agreement == pytest.approx(5 / 6)


def test_steps(tmp_path):
    (e,) = load(tmp_path, steps, [STEPS]).train
    assert (e.labels, e.completion) == ([1.0, 0.25], "2+2=4\n4+2=7")
    (e,) = load(tmp_path, steps, [STEPS], step_separator=" ; ", completion_prefix=" ").train
    assert e.completion == " 2+2=4 ; 4+2=7"


@pytest.mark.parametrize(("bad", "message"), [
    ({"labels": [1]}, r"field 'labels': 2 steps but 1 labels"),
    ({"labels": [1, 3]}, r"field 'labels': must lie between 0 and 1, not 3"),
    ({"steps": ["a", " "]}, r"field 'steps': step 2 must be text that is not empty"),
    ({"steps": ["a\nb", "c"]}, r"field 'steps': the step 'a\\nb' holds data.step_separator"),
])  # fmt: skip
def test_step_labels_that_do_not_fit(tmp_path, bad, message):
    with pytest.raises(SteersmanError, match=rf"rows.jsonl, line 2, {message}"):
        load(tmp_path, steps, [STEPS, STEPS | bad])


def test_ratings_may_have_gaps_but_an_attribute_must_be_rated_somewhere(tmp_path):
    rows = [
        {"prompt": "q", "completion": c, "x": x, "y": y} for c, x, y in (("a", 1, None), ("b", "", 2), ("c", 1, 3))
    ]
    loaded = load(tmp_path, ratings, rows, scores=["x", "y"])
    assert [e.scores for e in loaded.train] == [{"x": 1}, {"y": 2}, {"x": 1, "y": 3}]
    with pytest.raises(
        SteersmanError, match=r"rows.jsonl: no training row rates 'yy'; rated are 'x'.*did you mean 'y'"
    ):
        load(tmp_path, ratings, rows[::2], scores=["x", "yy"])
    with pytest.raises(SteersmanError, match=r"line 4, field 'scores': the row rates no attribute"):
        load(tmp_path, ratings, [*rows, {"prompt": "q", "completion": "d"}], scores=["x", "y"])


def test_texts_without_a_prompt_can_be_held_out_one_by_one(tmp_path):
    loaded = load(tmp_path, ratings, [{"text": f"t{i}", "score": i} for i in range(20)], held_out=5)
    assert (len(loaded.train), len(loaded.held_out)) == (15, 5)


def test_rows_of_one_prompt_become_a_ranking(tmp_path):
    given = [("q", "a", 1), ("r", "x", 3), ("q", "b", "2.5"), ("q", "a", 9), ("s", "only", 1), ("r", "y", 3)]
    rows = [{"prompt": p, "completion": c, "good": g} for p, c, g in given]
    loaded = load(tmp_path, rankings, rows, rank_by=["good"], ties="drop")
    (e,) = loaded.train
    assert (e.prompt, e.completions, e.ranks) == ("q", ["a", "b"], [-1, -2.5])
    twice = load(tmp_path, rankings, [r | {"fine": "1"} for r in rows], rank_by=["good", "fine"], ties="drop").train
    assert twice[0].ranks == [-2, -3.5]
    assert loaded.left_out.counts == {"answer given twice": 1, "prompt with one answer only": 1, "tie": 1}
    with pytest.raises(SteersmanError, match=r"line 1, field 'god': .*did you mean 'good'"):
        load(tmp_path, rankings, rows, rank_by=["god"])


def test_one_text_under_two_ranks(tmp_path):
    row = {"prompt": "q", "responses": ["a", "b", " a"], "ranks": [0, 1, 2]}
    with pytest.raises(SteersmanError, match=r"line 1, field 'responses': responses 1 and 3 are the same text"):
        load(tmp_path, rankings, [row])


def test_rated_lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("1_1\t-0.9\tno picture.\n1_2\t2\tgreat\n")
    loaded = ratings(DataConfig(path=str(path)))
    assert [(e.prompt, e.completion, e.scores) for e in loaded.train] == [
        ("", "no picture.", {"rating": -0.9}), ("", "great", {"rating": 2.0})]  # fmt: skip
    path.write_text("1_1\t-0.9\tno picture.\n1_2\tmuch\tgreat\n")
    with pytest.raises(SteersmanError, match=r"line 2, field 'text': must be a number, not 'much'"):
        ratings(DataConfig(path=str(path)))
