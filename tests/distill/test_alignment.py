"""Two real tokenizers over the same text: positions are paired where both have read the same characters."""

from __future__ import annotations

from letter_models import letters

from steersman.assets import story_model
from steersman.data import Codec
from steersman.distill.alignment import same_places, text_before_tokens
from steersman.model import load_tokenizer

TEXT = "the cat sat. look at you"


def test_words_and_letters_meet_where_words_begin():
    words, one_by_one = Codec(load_tokenizer(str(story_model()))), Codec(letters())
    mine, theirs = words.finish(TEXT), one_by_one.finish(TEXT)
    first, second = text_before_tokens(words, mine), text_before_tokens(one_by_one, theirs)
    places = same_places(first, second)
    assert all(first[i] == second[j] for i, j in places)
    # every beginning of a word's piece is also a beginning of a letter, the end among them
    assert len(places) == len(mine) == len({i for i, _ in places})
    assert (len(mine) - 1, len(theirs) - 1) in places
    assert same_places(second, first) == sorted((j, i) for i, j in places)


def test_no_place_lies_inside_of_a_character():
    assert same_places(["", "a", "a\ufffd", "aé"], ["", "a", "a\ufffd", "a\ufffd", "aé"]) == [(0, 0), (1, 1), (3, 4)]


def test_a_token_without_text_takes_no_place_twice():
    assert same_places(["", "a", "a"], ["", "", "a"]) == [(0, 0), (1, 2)]
