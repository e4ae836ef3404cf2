"""A metric of one's own that gives what is no score is refused by its name."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from steersman.metrics import Corpus, Scorer, metric
from steersman.metrics.workers import Parallel
from steersman.types import SteersmanError


def giving(rows=None, over=None):
    class Own(Scorer):
        name = "own"
        implementation = "mine"  # type: ignore[assignment]

        def rows(self, batch):
            return rows(batch.texts)

        def over(self, batch):
            return super().over(batch) if over is None else over

    return Own()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            lambda texts: dict.fromkeys(range(len(texts)), 5.0),
            "rows gave dict; give a list of one number for each text",
        ),
        (lambda texts: 1.0, "rows gave float"),
        (lambda texts: None, "rows gave NoneType"),
        (lambda texts: (1.0 for _ in texts), "rows gave generator"),
        (lambda texts: ["1.0" for _ in texts], "row 0: the score is '1.0', not a finite number"),
        (lambda texts: torch.tensor(1.0), "rows gave float"),
    ],
)
def test_scores_are_a_list_of_numbers(rows, said):
    for ask in (giving(rows).score, giving(rows).corpus):
        with pytest.raises(SteersmanError, match=f"metric 'own'.*{said}"):
            ask(["a", "b"])


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_a_list_a_tuple_an_array_and_a_tensor_are_scores(kind):
    assert giving(lambda texts: kind([1.0, 2.0])).score(["a", "b"]) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("over", "said"),
    [
        (3.0, r"over gave float; give steersman\.metrics\.Corpus\(value, low, high, count\)"),
        (Corpus(float("nan"), 0.0, 0.0, 1), "the value over 2 texts is nan, not a finite number"),
        (Corpus(None, 0.0, 1.0, 1), "over gave a Corpus whose value is None; give a number"),
        (Corpus(0.5, None, None, 1), "over gave a Corpus whose low is None; give a number, and NaN for low"),
        (Corpus(0.5, 0.0, "1", 1), "over gave a Corpus whose high is '1'"),
        (Corpus(torch.ones(2), 0.0, 1.0, 1), "over gave a Corpus whose value is tensor"),
        (Corpus(0.5, 0.0, 1.0, None), "over gave a Corpus whose count is None"),
    ],
)
def test_the_value_of_a_set_is_a_corpus_with_a_finite_value(over, said):
    with pytest.raises(SteersmanError, match=f"metric 'own': {said}"):
        giving(over=over).corpus(["a", "b"])


@pytest.mark.parametrize("kind", [np.float32, torch.tensor])
def test_the_numbers_of_a_set_come_as_plain_floats(kind):
    found = giving(over=Corpus(kind(0.5), kind(0.25), kind(0.75), np.int64(2))).corpus(["a", "b"])
    assert found == Corpus(0.5, 0.25, 0.75, 2)
    assert json.loads(json.dumps(asdict(found)))["high"] == 0.75


OWN = """
from steersman.metrics import Scorer

class Base(Scorer):
    name = "own"
    implementation = "mine"
    def rows(self, batch):
        return {i: 1.0 for i in range(len(batch.texts))}

class Smaller(Base):
    better = "smaller"

class Word(Base):
    needs = "references"

def counted(texts):
    return [len(text) for text in texts]
"""


def test_what_a_class_says_of_itself_is_checked(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    with pytest.raises(SteersmanError, match="better is 'smaller'; it is one of higher, lower, neither"):
        metric(f"{path}:Smaller")
    with pytest.raises(SteersmanError, match="needs is 'references'; give a tuple of names"):
        metric(f"{path}:Word")
    with pytest.raises(SteersmanError, match="setting texts; it is a function, and a metric is a subclass of"):
        metric(f"{path}:counted")
    with pytest.raises(SteersmanError, match="rows gave dict"):
        Parallel(f"{path}:Base", workers=1).score(["a", "b"])
