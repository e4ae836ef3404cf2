import pytest

from steersman.ops import text


def test_words_keep_apostrophes_and_drop_punctuation():
    assert text.words("“Don’t!” said Mia's mom, twice...") == ["don't", "said", "mia's", "mom", "twice"]


def test_sentences_end_at_marks_with_quotes_and_at_lines():
    assert text.sentences('He ran. "Stop!" she said\nThe end') == ["He ran.", '"Stop!', "she said", "The end"]
    assert text.sentences(" \n ") == []


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b a b"], 2, 2 / 3),  # ab ba ab
        (["a b", "a b"], 2, 1 / 2),  # n-grams don't cross texts
        (["a b", "c d"], 1, 1.0),
        (["a"], 2, 0.0),
        ([], 2, 0.0),
    ],
)
def test_distinct_n_counts_by_hand(texts, n, expected):
    assert text.distinct_n(texts, n) == pytest.approx(expected)


def test_repetition_by_hand():
    assert text.repetition("x y z x y z", 3) == pytest.approx(1 / 4)  # xyz yzx zxy xyz
    assert text.repetition("x y", 3) == 0.0
    assert text.repetition("friend " * 60, 3) > 0.98


def test_scripts_without_spaces_are_read_by_character():
    assert text.words("猫が 好きcats") == ["猫", "が", "好", "き", "cats"]
    assert text.distinct_n(["猫猫猫"], 1) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("said", "whole"),
    [
        ("It rained. It costs 3.14 euros and the", "It rained."),
        ("It costs 3.14 euros and the", ""),
        ("Done! See https://example.com/a for", "Done!"),
        ('She said "Go." Then he', 'She said "Go."'),
        ("第一句话。第二句话没有写", "第一句话。"),
        ("First: yes.\n2. The", "First: yes."),
        ("All of it.", "All of it."),
    ],
)
def test_whole_sentences_end_where_a_reader_would_say_so(said, whole):
    assert text.whole_sentences(said) == whole
