"""Who is not believed, what becomes a lesson, how tables are mixed, and what gates let through."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from letter_models import write_jsonl

from steersman.data import DataConfig, Row
from steersman.data.load import demonstrations, feedback, preferences
from steersman.people.filters import FilterConfig, sift
from steersman.people.judgements import Judgement, judgement
from steersman.people.wheel.evaluation import guard_metrics, human_metrics
from steersman.people.wheel.gates import Gate, check
from steersman.people.wheel.lessons import MixConfig, is_held_out, lessons, mix_rows
from steersman.statistics.estimates import Estimate
from steersman.types import SteersmanError


def pair(i: int, user: str = "a", choice: str = "first", answers=("x", "y"), prompt: str = "p", **more) -> Judgement:
    return Judgement(f"{user}-{i}", user, float(i), prompt, answers, choice=choice, **more)  # type: ignore


def thumb(i: int, label: bool, answer: str = "x", user: str = "a", **more) -> Judgement:
    return Judgement(f"{user}-{i}", user, float(i), f"p{i}", (answer,), label=label, **more)


def reasons(rows, config=None) -> dict[str, str]:
    return {one.id: why for one, why in sift(rows, config or FilterConfig())[1]}


def test_spam_gold_and_disagreement_are_left_out():
    lazy = [pair(i, "lazy", "second", prompt=f"q{i}", sides=(0, 1)) for i in range(20)]
    blind = [thumb(i, True, user="blind", expected=False) for i in range(3)] + [thumb(9, True, user="blind")]
    fine = [thumb(i, i > 0, user="fine", expected=True) for i in range(4)] + [thumb(8, True, user="fine")]
    hasty = [pair(50, "hasty", seconds=0.1, prompt="h")]
    split = [pair(60, "b", "first", prompt="s"), pair(61, "c", "first", ("y", "x"), prompt="s")]
    agreed = [pair(70, "b", "first", prompt="t"), pair(71, "c", "second", ("y", "x"), prompt="t")]
    rows = [*lazy, *blind, *fine, *hasty, *split, *agreed]
    kept, _ = sift(rows, FilterConfig())
    assert [one.id for one in kept] == ["fine-8", "b-70", "c-71"]
    told = reasons(rows)
    assert told["lazy-0"] == "rater always says the same"
    assert told["blind-9"] == "rater failed gold items"
    assert told["blind-0"] == told["fine-0"] == "gold item"
    assert told["hasty-50"] == "too fast to have been read"
    assert told["b-60"] == told["c-61"] == "raters disagree"
    assert "lazy-3" not in reasons(lazy, FilterConfig(one_sided=1.0))


def test_a_rater_is_one_sided_by_the_screen_alone():
    """Files whose answers stand in one order, the better one first, say nothing of sides."""
    assert reasons([pair(i, prompt=f"q{i}") for i in range(40)]) == {}
    turned = [pair(i, prompt=f"q{i}", sides=(0, 1) if i % 2 else (1, 0)) for i in range(40)]
    assert reasons(turned) == {}
    left = [pair(i, choice="first" if i % 2 else "second", prompt=f"q{i}", sides=(0, 1) if i % 2 else (1, 0))
            for i in range(40)]  # fmt: skip
    assert set(reasons(left).values()) == {"rater always says the same"}
    ties = [pair(i, choice="tie", prompt=f"q{i}") for i in range(40)]
    assert set(reasons(ties).values()) == {"rater always says the same"}
    assert reasons(ties[:20] + [pair(i, prompt=f"q{i}") for i in range(40, 60)]) == {}
    with pytest.raises(SteersmanError, match=r"field 'sides': must be \[0, 1\] or \[1, 0\]"):
        judgement(Row({"user": "a", "prompt": "p", "answers": ["x", "y"], "choice": 0, "sides": ["left"]}, "f", 1))


def test_the_last_word_of_a_rater_counts():
    rows = [pair(1, choice="first"), pair(2, choice="second"), pair(3, choice="second", answers=("y", "x"), user="b")]
    assert reasons(rows)["a-1"] == "judged again later"
    assert reasons([pair(1, choice="tie")]) == {}  # one undecided rater disagrees with nobody


def test_lessons_are_what_the_verbs_read(tmp_path):
    rows = [
        pair(1, "a", "first"), pair(2, "b", "first", ("y", "x")), pair(3, "c", "first"),
        pair(4, "d", "both_bad", ("u", "v"), prompt="q"), pair(5, "e", "tie", ("u", "v"), prompt="r"),
        thumb(6, True, "good"), thumb(7, False, "poor", correction="better"),
    ]  # fmt: skip
    made = {kind: lessons(rows, kind) for kind in ("sft", "kto", "pairs")}
    assert [(r["prompt"], r["completion"]) for r in made["sft"]] == [("p6", "good"), ("p7", "better")]
    assert [(r["chosen"], r["rejected"], r["judgements"]) for r in made["pairs"]] == [
        ("x", "y", ["a-1", "b-2", "c-3"]), ("better", "poor", ["a-7"]),
    ]  # fmt: skip
    assert math.isclose(made["pairs"][0]["agreement"], 2 / 3)
    told = [(r["completion"], r["label"]) for r in made["kto"]]
    assert told[-5:] == [("u", False), ("v", False), ("good", True), ("poor", False), ("better", True)]
    paths = {kind: str(write_jsonl(tmp_path / f"{kind}.jsonl", rows)) for kind, rows in made.items()}
    assert len(demonstrations(DataConfig(path=paths["sft"])).train) == 2
    assert len(feedback(DataConfig(path=paths["kto"])).train) == len(made["kto"])
    assert math.isclose(preferences(DataConfig(path=paths["pairs"])).train[0].agreement, 2 / 3)


def test_an_answer_that_most_reject_is_no_demonstration():
    labels = {"a": False, "b": False, "c": True}
    rows = [Judgement(user, user, 1.0, "p", ("five",), label=label) for user, label in labels.items()]
    assert sift(rows, FilterConfig())[0] == rows
    assert lessons(rows, "sft") == []


def test_tables_are_mixed_at_the_shares():
    new, earlier, anchor = ([{"prompt": f"{s}{i}"} for i in range(100)] for s in "nea")
    rows = mix_rows(new[:60], earlier, anchor, MixConfig(new=0.6, earlier=0.3, anchor=0.1), 0)
    sources = [row["source"] for row in rows]
    assert (sources.count("new"), sources.count("earlier"), sources.count("anchor")) == (60, 30, 10)
    assert rows == mix_rows(new[:60], earlier[::-1], anchor, MixConfig(new=0.6, earlier=0.3, anchor=0.1), 0)
    assert mix_rows(new[:60], earlier, anchor, MixConfig(new=0.6, earlier=0.3, anchor=0.1), 1) != rows
    assert len(mix_rows(new[:60], earlier[:4], [], MixConfig(), 0)) == 64  # what is missing is not copied


def test_a_prompt_stays_on_its_side():
    rows = [pair(i, prompt=f"prompt {i}") for i in range(2000)]
    out = [is_held_out(one, 0.2) for one in rows]
    assert abs(sum(out) / 2000 - 0.2) < 0.04
    assert [is_held_out(replace(one, user="z", answers=("b", "c")), 0.2) for one in rows] == out


@pytest.mark.parametrize(
    ("gate", "estimate", "passed"),
    [
        (Gate(at_least=0.5), (0.6, 0.4, 0.8), True), (Gate(at_least=0.5, sure=True), (0.6, 0.4, 0.8), False),
        (Gate(at_least=0.5, sure=True), (0.6, 0.51, 0.8), True), (Gate(at_most=1.5), (1.6, 1, 2), False),
        (Gate(at_most=1.5, sure=True), (1.4, 1, 2), False), (Gate(at_least=0), (math.nan, 0, 1), False),
        (Gate(at_least=0.5, sure=True), (0.9, -math.inf, math.inf), False),
    ],
)  # fmt: skip
def test_gates(gate, estimate, passed):
    assert check({"m": gate}, {"m": Estimate(*estimate, 9)})[0].passed is passed


def test_what_was_not_measured_does_not_pass():
    told = check({"m": Gate(at_least=0)}, {})[0]
    assert not told.passed
    assert "could not be measured" in told.reason
    with pytest.raises(ValueError, match="lets everything through"):
        Gate()


def test_the_implicit_reward_by_hand():
    rows = [
        pair(1, choice="first", answers=("b", "a"), prompt="p"),
        pair(2, choice="second", answers=("a", "b"), prompt="q"),
        pair(3, choice="tie", prompt="r"), thumb(4, True), thumb(5, False), thumb(6, False),
    ]  # fmt: skip
    gains = {"a-1": (2.0, 1.0), "a-2": (3.0, -1.0), "a-3": (0, 0), "a-4": (1.0,), "a-5": (2.0,), "a-6": (0.0,)}
    readings = [
        {"id": i, "answer": k, "logp": x + 3.0 * k, "logp_current": 3.0 * k}
        for i, v in gains.items()
        for k, x in enumerate(v)
    ]
    found = human_metrics(rows, readings)
    assert found["human/pairs"].value == 0.5  # the first is as people say, the second is not
    assert found["human/thumbs"].value == 0.5
    assert found["human/accuracy"] == found["human/pairs"]


def test_guards_by_hand():
    def row(i, text, tokens, logp, finish="eos"):
        return {"index": i, "completion": text, "tokens": tokens, "logp_current": logp, "finish": finish}

    mine = [row(0, "a a a a", 4, -8.0), row(1, "a a a a", 8, -16.0, "length")]
    theirs = [row(0, "a b c d", 2, -2.0), row(1, "e f g h", 2, -2.0), row(7, "x", 1, -1.0)]
    found = guard_metrics(mine, theirs)
    assert found["length"].value == 3.0
    assert math.isclose(found["distinct"].value, (2 / 6) / (6 / 6))
    assert math.isclose(found["perplexity"].value, math.exp(2.0 - 1.0))
    assert math.isclose(found["ended"].value, 2 / 3)
