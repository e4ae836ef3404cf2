"""Rules that programs check: each can be kept, compositions have a text that proves it, contradictions have none."""

from __future__ import annotations

import random

import pytest

from steersman.flywheel.instruct.compose import FORMS, compose, instruction_text, keeps_the_rules, split_kinds
from steersman.flywheel.instruct.constraints import KINDS, Constraint, again, draw
from steersman.flywheel.instruct.witness import witness
from steersman.metrics.ifeval import CHECKS
from steersman.types import SteersmanError


@pytest.mark.parametrize("name", KINDS)
def test_each_rule_can_be_kept_and_be_broken_and_is_said_with_its_settings(name):
    rng = random.Random(1)
    for _ in range(10):
        rule = draw(name, rng)
        text = witness([rule])
        assert text is not None
        assert rule.holds(text)
        assert not rule.holds("")
        assert again(rule.row()) == rule
        assert keeps_the_rules(rule.text, [rule]), "the words of a rule name all of its settings"
    assert name in CHECKS


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("detectable_format:json_format", {}), ("startend:quotation", {})),
        (("detectable_format:json_format", {}), ("detectable_format:number_bullet_lists", {"num_bullets": 2})),
        (
            ("keywords:existence", {"keywords": ["river"]}),
            ("keywords:forbidden_words", {"forbidden_words": ["river"]}),
        ),
        (
            ("length_constraints:number_words", {"relation": "less than", "num_words": 3}),
            ("keywords:frequency", {"keyword": "river", "frequency": 5, "relation": "at least"}),
        ),
        (
            ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 4}),
            ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 2}),
        ),
    ],
)
def test_contradictions_have_no_witness(one, other):
    assert witness([Constraint(*one, ""), Constraint(*other, "")]) is None


def test_compositions_are_many_and_all_of_them_can_be_kept():
    rng = random.Random(0)
    seen = set()
    for _ in range(60):
        rules = compose(list(KINDS), rng.randint(2, 4), rng)
        text = witness(rules)
        assert text is not None
        assert all(CHECKS[r.name](text, r.kwargs) for r in rules)
        assert len({r.name for r in rules}) == len(rules)
        seen |= {r.name for r in rules}
    assert len(seen) > 18


def test_kinds_that_never_go_together_are_told():
    only = ["detectable_format:json_format", "startend:quotation"]
    with pytest.raises(SteersmanError, match="no 2 rules of"):
        compose(only, 2, random.Random(0))
    with pytest.raises(SteersmanError, match="3 rules need as many kinds"):
        compose(only, 3, random.Random(0))
    with pytest.raises(SteersmanError, match="no kind 'commas'"):
        split_kinds([], ["commas"])
    train, held = split_kinds([], ["startend:quotation"])
    assert not set(train) & set(held)
    assert set(train) | set(held) == set(KINDS)


def test_an_instruction_has_its_task_and_all_rules_in_every_form():
    rules = compose(list(KINDS), 3, random.Random(3))
    forms = set()
    for seed in range(30):
        text = instruction_text("Tell of {rules} and {task}.", rules, random.Random(seed))
        assert "Tell of {rules} and {task}." in text
        assert all(r.text in text for r in rules)
        forms.add(text)
    assert len(forms) == len(FORMS)


def test_a_rephrased_instruction_that_lost_a_number_is_noticed():
    rule = Constraint("keywords:frequency", {"keyword": "river", "frequency": 3, "relation": "at least"}, "")
    assert keeps_the_rules("Please mention RIVER no fewer than 3 times.", [rule])
    assert not keeps_the_rules("Please mention river a few times.", [rule])
    assert not keeps_the_rules(" ", [])
