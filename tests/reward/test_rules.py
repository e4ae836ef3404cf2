import json
import re

import pytest
from reward_samples import make_samples

from steersman.reward.core import CallableReward
from steersman.reward.rules import BUILTINS, math_answer, word_coverage
from steersman.types import SteersmanError

EMPTY = [""]


def rule(name, completion, **keywords):
    return BUILTINS[name](EMPTY, [completion], **keywords)[0]


def test_vader_is_the_packages_own_compound():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    texts = ["She was very happy!", "It was bad.", "", "friend " * 60, "Ein Satz."]
    own = SentimentIntensityAnalyzer()
    assert BUILTINS["vader_sentiment"](EMPTY * 5, texts) == [own.polarity_scores(t)["compound"] for t in texts]


def test_length_counts_words_and_measures_distance_to_a_target():
    assert rule("length", "one two three") == 3
    assert rule("length", "one two three", target=4) == -0.25
    with pytest.raises(SteersmanError, match="target is 0"):
        rule("length", "a", target=0)


def test_exact_match_contains_and_regex():
    assert rule("exact_match", " The  Cat ", answer=["the cat"]) == 1
    assert rule("exact_match", "The Cat", answer=["the cat"], ignore_case=False) == 0
    assert rule("exact_match", "72", answer=[72]) == 1
    assert rule("contains", "A red ball", strings=["red", "blue"]) == 0.5
    assert rule("regex", "it is 12 o'clock", pattern=r"\d+") == 1
    with pytest.raises(SteersmanError, match="not a regular expression"):
        rule("regex", "", pattern="(")
    with pytest.raises(SteersmanError, match="list of one string"):
        rule("contains", "", strings="red")


@pytest.mark.parametrize("name", ["exact_match", "math_answer"])
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"style": "rule", "ground_truth": "72"}, "of type dict with the fields style, ground_truth"),
        (["72"], "of type list"),
        (None, "missing"),
    ],
)
def test_an_answer_that_is_no_text_or_number_is_refused(name, answer, said):
    with pytest.raises(SteersmanError, match=f"reward {name}, sample 1: its answer is {said}"):
        BUILTINS[name](EMPTY * 2, ["72", "72"], answer=["72", answer])


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("48 / 2 = 24, so 48 + 24 = 72.\n#### 72", "She sold 24.\n#### 72", 1),
        ("#### 72\nThanks!", "#### 72", 1),
        ("#### 71", "#### 72", 0),
        ("#### 1,200.00", "#### 1200", 1),
        ("#### $18", "#### 18", 1),
        ("It is 24 or 72. #### 24", "#### 72", 0),
        ("The answer is 72", "#### 72", 1),
        ("I think it was 72 apples", "72", 1),
        ("so we get \\boxed{\\frac{1}{2}}", "0.5", 1),
        ("$\\frac{2}{4}$", "\\frac{1}{2}", 1),
        ("no idea", "#### 72", 0),
        ("", "#### 72", 0),
        ("####", "#### 72", 0),
    ],
)
def test_math_answers(completion, answer, right):
    assert math_answer(EMPTY, [completion], answer=[answer]) == [right]


def test_math_accepts_every_gsm8k_reference_and_refuses_its_neighbour(shared):
    rows = [json.loads(line) for line in (shared / "gsm8k/train.jsonl").open()][:400]
    answers = [row["answer"] for row in rows]
    assert math_answer(answers, answers, answer=answers) == [1.0] * len(rows)
    wrong = [re.sub(r"#### .*", "#### 123457", answer) for answer in answers]
    assert math_answer(answers, wrong, answer=answers) == [0.0] * len(rows)


def test_word_coverage_compares_stems():
    assert rule("word_coverage", "The dogs were running home.", concepts=["dog run frisbee"]) == pytest.approx(2 / 3)
    assert rule("word_coverage", "nothing", concepts=[["dog", "run"]]) == 0
    with pytest.raises(SteersmanError, match="empty"):
        rule("word_coverage", "x", concepts=[""])


def test_commongen_references_cover_their_concepts(shared):
    folder = shared / "commongen"
    (source,) = folder.glob("*dev.src_alpha.txt")
    (target,) = folder.glob("*dev.tgt.txt")
    concepts, sentences = source.read_text().splitlines(), target.read_text().splitlines()
    covered = word_coverage(sentences, sentences, concepts=concepts)
    assert sum(covered) / len(covered) > 0.9
    assert sum(word_coverage(sentences, sentences[1:] + sentences[:1], concepts=concepts)) / len(covered) < 0.8


@pytest.mark.parametrize("name", BUILTINS)
def test_every_builtin_is_a_reward_like_a_users_own(name):
    settings = {"contains": {"strings": ["cat"]}, "regex": {"pattern": "cat"}}
    row = {"answer": "a cat", "concepts": "cat", "unused": 1}
    samples = make_samples(["a cat", "", "ein Hund, ü", "cat " * 30], [row] * 4)
    scores = CallableReward(BUILTINS[name], name, settings.get(name)).score(samples)
    assert scores.total.shape == (4,)
    assert scores.total.isfinite().all()
    assert list(scores.parts) == [name]


def test_diversity_is_what_others_do_not_say():
    texts = ["a b c", "a b d", "x y", "", "a b c"]
    found = BUILTINS["diversity"](EMPTY * 5, texts)
    grams = [{("a", "b"), ("b", "c")}, {("a", "b"), ("b", "d")}, {("x", "y")}, set(), {("a", "b"), ("b", "c")}]
    for i, own in enumerate(grams):
        others = [g for j, g in enumerate(grams) if j != i]
        shares = [len(own & g) / len(own) for g in others] if own else [1.0]
        assert found[i] == pytest.approx(1 - sum(shares) / len(shares))
    assert BUILTINS["diversity"](EMPTY * 3, ["the same"] * 3) == [0, 0, 0]
    assert BUILTINS["diversity"](EMPTY, ["alone here"]) == [1.0]


@pytest.mark.usefixtures("ends_soon")
def test_a_regex_that_does_not_end_on_one_completion_is_worth_nothing_there(capsys):
    """Of the others each keeps its worth; it is told once."""
    pattern = r"<answer>(\d+\s?)+</answer>"
    texts = ["<answer>12</answer>", "<answer>" + "1" * 60 + "x", "<answer>", "<answer>3</answer> \ud800"]
    assert BUILTINS["regex"](EMPTY * 4, texts, pattern=pattern) == [1, 0, 0, 1]
    assert BUILTINS["regex"](EMPTY, texts[1:2], pattern=pattern) == [0]
    assert BUILTINS["regex"](EMPTY, ["a" * 300_000 + "b"], pattern="b$") == [1]
    assert capsys.readouterr().err.count("took more than 1 s of processor time") == 1
