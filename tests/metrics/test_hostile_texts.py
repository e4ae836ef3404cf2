"""Whatever a text holds, a metric answers soon: with a number, or with an error of its own that names the row."""

import json
import math
import re
import time
from typing import Any

import pytest
from hostile_texts import hostile_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.guards.asked_process import AskedProcess
from steersman.metrics import METRICS, Scorer, math_process, metric
from steersman.metrics.answers import math_equal
from steersman.metrics.ifeval import CHECKS, _bullets, _placeholders, _titles
from steersman.reward.rules import BUILTINS
from steersman.types import SteersmanError

HEAVY = {"bertscore", "classifier", "perplexity", "meteor1.5", "spice"}
PLAIN = sorted(set(METRICS) - HEAVY - {"ifeval", "math_answer"})
SOON = 3.0
"""Seconds of work, in which other processes do not count; what is mended here took minutes, or for ever."""

EVERY_KWARG = {
    "keywords": ["(a+)+$", "["], "keyword": "(a+)+$", "forbidden_words": ["(a+)+$", "C++"], "relation": "at least",
    "frequency": 1, "letter": "a", "let_relation": "at least", "let_frequency": 1, "language": "en",
    "num_sentences": 1, "num_paragraphs": 1, "num_words": 1, "nth_paragraph": 1, "first_word": "a",
    "num_placeholders": 1, "postscript_marker": "(a+)+$", "num_bullets": 1, "num_highlights": 1,
    "section_spliter": "(a+)+$", "num_sections": 1, "prompt_to_repeat": "a", "end_phrase": "x",
    "capital_relation": "at least", "capital_frequency": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=12, deadline=None)
@given(text=hostile_texts(2000))
def test_a_metric_answers_soon(name, text):
    made = metric(name, {"segment": 1} if name == "msttr" else {})
    extra = {"concepts": [["a"]] * 2, "table": [[["a", "b c"]]] * 2}
    score = made.score if made.per_sample else made.corpus
    start = time.process_time()
    try:
        score([text, "a b c"], [["a b c d"], ["1"]], **{k: v for k, v in extra.items() if k in made.needs})
    except SteersmanError as error:
        assert "row 0" in str(error)  # noqa: PT017
    assert time.process_time() - start < SOON


@pytest.mark.parametrize("name", sorted(CHECKS))
@settings(max_examples=12, deadline=None)
@given(text=hostile_texts(20_000))
def test_an_instruction_is_checked_soon(name, text):
    start = time.process_time()
    metric("ifeval").score([text], instruction_id_list=[[name]], kwargs=[[EVERY_KWARG]])
    assert time.process_time() - start < SOON


@pytest.mark.parametrize("name", sorted(CHECKS))
@settings(max_examples=15, deadline=None)
@given(value=st.none() | st.integers(-3, 3) | st.text(max_size=3) | st.lists(st.text(max_size=2), max_size=2))
def test_kwargs_of_a_wrong_kind_name_row_and_instruction(name, value):
    columns: dict[str, Any] = {"instruction_id_list": [[name]], "kwargs": [[dict.fromkeys(EVERY_KWARG, value)]]}
    try:
        metric("ifeval").score(["a text\n\nof two"], **columns)
    except SteersmanError as error:
        assert re.search(rf"row 0: the instruction {name}", str(error))  # noqa: PT017


def test_keywords_are_text_and_no_pattern():
    def follows(name, text, **kwargs):
        return metric("ifeval").score([text], instruction_id_list=[[name]], kwargs=[[kwargs]]) == [1.0]

    assert follows("keywords:existence", "I write C++ daily.", keywords=["c++"])
    assert not follows("keywords:existence", "I write C daily.", keywords=["C."])
    assert not follows("keywords:forbidden_words", "I write C++ daily.", forbidden_words=["C++"])
    assert follows("keywords:forbidden_words", "concatenate", forbidden_words=["cat"])
    start = time.process_time()
    assert not follows("keywords:existence", "a" * 40 + "!", keywords=["(a+)+$"])
    assert time.process_time() - start < SOON


@settings(max_examples=300)
@given(text=st.text("[]<>*- \n\na\r", max_size=40))
def test_linear_checks_find_what_the_authors_patterns_find(text):
    assert _placeholders(text) == len(re.findall(r"\[.*?\]", text))
    assert _titles(text) == re.findall(r"<<[^\n]+>>", text)
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    assert _bullets(text, {"num_bullets": len(stars) + len(dashes)})


def test_json_of_any_depth_and_length_is_judged():
    check = CHECKS["detectable_format:json_format"]
    assert check(json.dumps({"n": 1}).replace("1", "1" * 6000), {})
    assert not check("[" * 100_000, {})
    assert not check("[" * 100_000 + "]" * 100_000, {})


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("#### 1e10000000", "#### 1", False), ("1e10000000", "1", False), ("#### 7", "1e10000000", False),
        ("#### 1e１0000000", "#### 1", False), ("#### 1e٠9٩999999", "1", False),
        ("1e1_0000", "1", False), ("#### " + "9" * 5000, "9", False), ("9" * 5000, "#### 9", False),
        ("In file1999 there are 5", "5", True), ("#### 1e3", "1000", True), ("#### -2.5e-3", "-0.0025", True),
        ("x" * 30_000 + " so the answer is $\\frac{1}{2}$", "0.5", True), ("(" * 5000 + "1" + ")" * 5000, "2", False),
    ],
)  # fmt: skip
def test_a_number_of_any_size_is_judged_soon(completion, answer, right):
    math_equal("$1$", "1")  # the process has started
    start = time.perf_counter()
    assert math_equal(completion, answer) is right
    assert time.perf_counter() - start < SOON


def test_an_answer_that_takes_for_ever_ends_and_the_next_is_judged():
    process = AskedProcess(math_process.__file__, 1.0)
    try:
        assert process.ask({"given": "$1/2$", "wanted": "0.5"}) is not None
        start = time.perf_counter()
        assert process.ask({"given": "$9^{9^{9^9}}$", "wanted": "3"}) is None
        assert time.perf_counter() - start < SOON
        process.limit = 20.0
        verdict = process.ask({"given": r"so it is \boxed{\frac{1}{2}}", "wanted": "0.5"})
        assert verdict is not None
        assert (verdict["has_answer"], verdict["equal"]) == (True, True)
    finally:
        process.close()


@pytest.mark.parametrize("name", sorted(METRICS.keys() - HEAVY))
def test_half_a_surrogate_pair_is_named(name):
    made = metric(name, {"segment": 1} if name == "msttr" else {})
    assert isinstance(made, Scorer)
    columns = {need: [["a"]] * 2 for need in made.needs if need != "references"}
    with pytest.raises(
        SteersmanError, match=rf"'{re.escape(made.name)}', row 1: the text holds a lone surrogate.*D800"
    ):
        made.checked(["a", "b \ud800"], [["a"], ["a"]], None, columns)
    if "references" in made.needs:
        with pytest.raises(SteersmanError, match="row 0: a reference holds a lone surrogate"):
            made.checked(["a", "b"], [["\udc00"], ["a"]], None, columns)


@pytest.mark.parametrize("name", sorted(BUILTINS.keys() - {"happy_story", "regex", "math_answer"}))
@settings(max_examples=10, deadline=None)
@given(text=hostile_texts(2000))
def test_a_builtin_reward_answers_soon(name, text):
    extra = {"exact_match": {"answer": ["1"]}, "contains": {"strings": ["a"]}, "word_coverage": {"concepts": ["a"]}}
    start = time.process_time()
    (score,) = BUILTINS[name](["p"], [text], **extra.get(name, {}))
    assert math.isfinite(score)
    assert time.process_time() - start < SOON
