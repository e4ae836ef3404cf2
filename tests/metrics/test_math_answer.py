"""math_answer: which texts are one number and which are several, and no verdict meant for another question."""

import json
import select
import subprocess
import sys
from fractions import Fraction

import pytest

from steersman.guards import asked_process
from steersman.guards.asked_process import AskedProcess
from steersman.metrics import math_process
from steersman.metrics.answers import math_equal


def judged(process, given, wanted):
    told = process.ask({"given": given, "wanted": wanted})
    assert told["has_answer"]
    return told["equal"]


@pytest.fixture
def process():
    made = AskedProcess(math_process.__file__, 20.0)
    yield made
    made.close()


@pytest.mark.parametrize("begun", [True, False])
def test_an_interrupted_question_leaves_no_reply_to_the_next(process, monkeypatch, begun):
    if begun:
        assert judged(process, r"\boxed{1}", "1")

    def interrupted(asked, until):
        assert select.select([asked.stdout], [], [], 60)[0]  # what it said is in the pipe
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(asked_process, "_line", interrupted)
        with pytest.raises(KeyboardInterrupt):
            judged(process, r"\boxed{9}", "1")
    assert judged(process, r"\boxed{1}", "1")
    assert not judged(process, r"\boxed{9}", "1")


def test_a_reply_to_another_question_is_passed_over(process):
    assert judged(process, r"\boxed{1}", "1")
    other = {"number": 0, "given": r"\boxed{9}", "wanted": "1"}
    process._process.stdin.write(json.dumps(other).encode() + b"\n")
    assert judged(process, r"\boxed{1}", "1")
    assert not judged(process, r"\boxed{9}", "1")


FORKED = r"""
import os, sys
from steersman.guards.asked_process import AskedProcess
process = AskedProcess(sys.argv[1], 20.0)
one, two = {"given": r"\boxed{1}", "wanted": "1"}, {"given": r"\boxed{2}", "wanted": "2"}
assert process.ask(one)["equal"]
child = os.fork()
if child == 0:
    sys.exit(0 if process.ask(two)["equal"] else 3)
assert os.waitpid(child, 0)[1] == 0
assert process.ask(one)["equal"]
"""


def test_a_fork_asks_a_process_of_its_own():
    subprocess.run([sys.executable, "-c", FORKED, math_process.__file__], check=True, timeout=120)


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        # a list is no number
        ("#### 23", "2, 3", False), ("#### 23", "2 3", False), ("#### 5", "2 3", False), ("#### 15", "1,5", False),
        ("#### 1,5", "15", False), ("#### 1,2,3", "123", False), ("#### 2, 300", "2300", False),
        ("#### 2, 3", "2, 3", True), ("#### 3, 2", "2, 3", True), ("#### 2 3", "2, 3", True), ("2, 3", "2,3", True),
        ("#### 2, 4", "2, 3", False), ("#### 3", "2, 3", False), (r"so \boxed{3, 2}", "2, 3", True),
        (r"so \boxed{23}", "2, 3", False), ("#### 1,5", "1,5", True),
        # a number with separators, signs and units is
        ("#### 1,200", "1200", True), ("#### 1 200", "1,200", True), ("#### $1,234,567.50.", "1234567.5", True),
        ("#### 1,200 dollars", "1200", True), ("It costs $1,200", "1200", True), ("#### - 5", "-5", True),
        ("#### 3 / 4", "0.75", True), ("#### 50", "50%", True), ("#### 1,200/4", "300", True),
        # its point in front is no full stop
        ("#### .5", "0.5", True), ("#### .5", "5", False), ("#### $.50", "1/2", True),
        # a mixed number
        ("#### 11/2", "1 1/2", False), ("#### 1.5", "1 1/2", True), ("#### 1", "1 1/2", False),
        ("It is 11/2", "1 1/2", False), ("It is 1 1/2", "3/2", True), ("It is 1", "1 1/2", False),
        ("#### -1 1/2", "-1.5", True), (r"\boxed{2 1/4}", "2.25", True),
    ],
)  # fmt: skip
def test_one_number_and_several(completion, answer, right):
    assert math_equal(completion, answer) is right


SIGNS = {"minus": "\u2212", "small minus": "\ufe63", "full width": "\uff0d", "hyphen": "\u2010", "en dash": "\u2013"}


@pytest.mark.parametrize("sign", ["-", *SIGNS.values()], ids=["ascii", *SIGNS])
@pytest.mark.parametrize("form", ["#### {}3", "The answer is {}3.", "x = {} 3", "It is {}$3", r"\boxed{{{}3}}"])
def test_a_minus_is_one_however_it_is_typed(sign, form):
    assert math_equal(form.format(sign), "-3")
    assert not math_equal(form.format(sign), "3")
    assert math_equal("#### -3", f"{sign}3")
    assert not math_equal("#### 3", f"{sign}3")


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("#### \u22121 1/2", "-3/2", True), ("#### \u22121, \u22122", "-1, -2", True),
        ("#### -€1,200", "-1200", True),
        # a range, a list's mark, a pause and a difference are no signs
        ("pages 3\u20135", "-5", False), ("- 3 apples\n- 5 pears", "5", True), ("Smith \u2013 3 apples", "3", True),
        ("10 - 7 = 3", "3", True), ("from $5 - $3 remain $2", "2", True),
    ],
)  # fmt: skip
def test_what_stands_before_a_number_is_its_sign_only_if_it_is_one(completion, answer, right):
    assert math_equal(completion, answer) is right


def test_the_last_number_counts_where_there_is_no_answer(monkeypatch):
    class Silent:
        def ask(self, question):
            return {"has_answer": False, "equal": False}

    monkeypatch.setattr("steersman.metrics.answers._math_process", Silent)
    assert math_equal("first 7, then 1,200, as I said", "1200")
    assert math_equal("of 3, 5, then", str(Fraction(5)))
    assert not math_equal("of 3,5", "35")
