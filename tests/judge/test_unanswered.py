"""A question to a judge that gets no reply costs that question, and no other."""

from __future__ import annotations

import json

import pytest
from judge_server import longer_wins, serving
from letter_models import rows_of, write_jsonl

from steersman.assets import story_model
from steersman.judge import Judge, JudgeConfig
from steersman.judge.label import LabelRecipe, run
from steersman.types import SteersmanError

REFUSED = (400, {}, json.dumps({"error": {"code": "content_filter"}}))
CUT = (200, {"transfer-encoding": "chunked"}, "no chunk")


def section(server, **extra):
    endpoint = {"url": server.url, "model": "m", "retries": 1, "timeout": 0.4, "max_wait": 0.02, "concurrency": 2}
    return {"endpoint": endpoint, **extra}


def pairs(count, bad=()):
    return [(f"{'BAD' if i in bad else 'good'} {i}", "a b c", "a") for i in range(count)]


def label(tmp_path, judge, resume=False):
    rows = [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in pairs(6, bad=(3,))]
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    recipe = {"data": {"path": str(path)}, "judge": judge, "run": {"dir": str(tmp_path / "run"), "threads": 1}}
    return run(LabelRecipe.model_validate(recipe), resume=resume)


@pytest.mark.parametrize("trouble", [REFUSED, (422, {}, ""), (500, {}, "it crashed"), CUT, (200, {}, "<html>")])
def test_one_row_is_left_out_named_and_counted(tmp_path, capfd, trouble):
    with serving(lambda n, text: trouble if "BAD" in text else longer_wins(n, text)) as server:
        summary = label(tmp_path, section(server))
    assert [r["row"] for r in rows_of(tmp_path / "run/labelled.jsonl")] == [1, 2, 3, 5, 6]
    assert summary["judge/failed"] > 0
    assert summary["judge/unjudged"] == 0
    told = " ".join("".join(capfd.readouterr()).split())
    assert "in.jsonl row 4: not labelled" in told
    assert "question on the prompt 'BAD 3'" in told


def test_a_run_that_was_to_stop_names_the_prompt_and_a_resumed_one_gets_past_it(tmp_path):
    with serving(lambda n, text: REFUSED if "BAD" in text else longer_wins(n, text)) as server:
        with pytest.raises(SteersmanError, match=r"status 400.*'BAD 3'.*judge\.on_failed to drop.*--resume"):
            label(tmp_path, section(server, on_failed="stop"))
        summary = label(tmp_path, section(server), resume=True)
        assert summary["data/labelled"] == 5
        asked = [text for text in server.seen if "BAD" not in text]
        assert len(asked) == len(set(asked)) == 10, "what was answered is not asked again"


@pytest.mark.parametrize("trouble", [None, (500, {}, "")])
def test_a_judge_that_went_away_stops_the_run(tmp_path, trouble):
    with serving(lambda n, text: longer_wins(n, text) if n < 6 else trouble) as server:
        judge = Judge(JudgeConfig.model_validate(section(server)), tmp_path / "judge.jsonl")
        with pytest.raises(SteersmanError, match=r"6 of 40 questions are answered and kept"):
            judge.compare(pairs(20))
        assert len(server.seen) <= 6 + 2 * (10 + 2)


def test_a_judge_that_refuses_everything_stops_the_run_soon(tmp_path):
    with serving(lambda n, text: REFUSED) as server:
        judge = Judge(JudgeConfig.model_validate(section(server)), tmp_path / "judge.jsonl")
        with pytest.raises(SteersmanError, match=r"status 400.*0 of 2 questions"):
            judge.compare(pairs(1))
        with pytest.raises(SteersmanError, match=r"status 400.*0 of 100 questions"):
            judge.compare(pairs(50))
        assert len(server.seen) < 16


def test_twelve_refused_questions_in_a_row_are_twelve_questions(tmp_path):
    with serving(lambda n, text: REFUSED if "BAD" in text else longer_wins(n, text)) as server:
        judge = Judge(JudgeConfig.model_validate(section(server)), tmp_path / "judge.jsonl")
        found = judge.compare(pairs(12, bad=range(3, 9)))
    assert [i for i, c in enumerate(found) if c is None] == list(range(3, 9))
    assert judge.stats()["judge/failed"] == 0.5


def test_a_question_without_reply_takes_nothing_from_the_budget(tmp_path):
    with serving(lambda n, text: REFUSED if "BAD" in text else longer_wins(n, text)) as server:
        config = JudgeConfig.model_validate(section(server, max_calls=6))
        found = Judge(config, tmp_path / "judge.jsonl").compare(pairs(4, bad=(1,)))
    assert [c is None for c in found] == [False, True, False, False]


@pytest.mark.parametrize("read", ["logp", "text"])
def test_a_question_too_long_for_a_local_judge_costs_itself(tmp_path, capfd, read):
    local = {"path": str(story_model()), "read": read, "max_tokens": 4, "batch": 2}
    config = JudgeConfig.model_validate({"local": local, "grade": "{prompt} {answer} Grade:", "scale": [1, 3]})
    items = [("A cat", "sat."), ("LONG " + "word " * 3000, "ran."), ("A dog", "ran."), ("word " * 3000, "sat.")]
    judge = Judge(config, tmp_path / "judge.jsonl")
    found = judge.grade(items)
    assert len(judge.cache.replies) == 2
    assert judge.stats()["judge/failed"] == 0.5
    assert "more than the model's context" in (told := capfd.readouterr().err)
    assert "LONG word" in told
    if read == "logp":
        assert [g is None for g in found] == [False, True, False, True]
    same = Judge(config, None).grade([items[0], items[2]])
    assert [found[0], found[2]] == pytest.approx(same, abs=1e-4) if read == "logp" else same == [None, None]
