"""Chinese, Japanese, Korean, Thai: a metric of words reads them in their own units, or says which setting does."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.metrics import METRICS, metric
from steersman.ops.text import by_character, pieces, uncut, words
from steersman.types import SteersmanError

SENTENCES = {  # a text, and a reference that has most of it
    "zh": ("我喜欢吃苹果", "我很喜欢吃苹果"),
    "ja": ("猫が好きです", "猫がとても好きです"),
    "ko": ("나는사과를먹는다", "나는 사과를 아주 좋아한다"),
    "th": ("ฉันชอบกินข้าว", "ฉันชอบกินข้าวมาก"),
}
OF_WORDS = [
    "rouge1",
    "rouge2",
    "rougeL",
    "rougeLsum",
    "bleu",
    "sacrebleu",
    "chrf",
    "chrf++",
    "meteor",
    "token_f1",
    "ter",
]


@pytest.mark.parametrize("language", SENTENCES)
@pytest.mark.parametrize("name", OF_WORDS)
def test_the_score_is_not_silently_nought(name, language):
    """Either the default reads the script, or its refusal names a setting, and that setting reads it."""
    text, reference = SENTENCES[language]
    made, each = metric(name), {"rouge": {"tokens": "words"}, "token": {"tokens": "words"}}
    each |= {"sacre": {"tokenize": "char"}, "ter": {"asian": True, "normalized": True}}
    setting = next((s for start, s in each.items() if name.startswith(start)), None)
    if name == "chrf++" or setting is not None:
        told = "use chrf" if setting is None else "`" + ": ".join(map(str, next(iter(setting.items())))).lower() + "`"
        with pytest.raises(SteersmanError, match=rf"row 0: .* a script of which every character.*{told}"):
            made.score([text], [reference])
        reads = setting is not None and not (name == "ter" and language in ("th", "ko"))
        made = metric(name, setting) if reads else metric("chrf")
    (score,), (right,) = made.score([text], [reference]), made.score([reference], [reference])
    if made.better == "lower":
        assert right == 0
        assert 0 < score < 99
    else:
        assert 0 < score < right


@pytest.mark.parametrize(
    ("name", "setting"),
    [("sacrebleu", {"tokenize": "zh"}), ("ter", {"asian": True, "normalized": True}), ("ter", {"asian": True})],
)
def test_a_setting_that_does_not_cut_the_script_is_refused_too(name, setting):
    text, reference = SENTENCES["th"]
    with pytest.raises(SteersmanError, match="row 0: the reference is in a script of which every character"):
        metric(name, setting).score([text], [reference])


def test_what_is_cut_is_told_from_what_is_left_whole():
    assert uncut("我喜欢。", ["我喜欢", "。"])
    assert uncut("我喜欢。", ["我喜欢。"])
    assert not uncut("我喜欢。", ["我", "喜欢", "。"])
    assert not uncut("我", ["我"])  # one character is a word
    assert not uncut("a word", ["a", "word"])


def test_a_lexicon_of_english_refuses_texts_that_it_can_not_read_and_no_stray_one():
    vader = metric("vader_sentiment")
    with pytest.raises(SteersmanError, match=r"its lexicon is English.*classifier"):
        vader.score([text for text, _ in SENTENCES.values()])
    assert vader.score(["我喜欢", "I love it", ""]) == [0.0, vader.score(["I love it"])[0], 0.0]


def test_token_f1_of_characters_by_hand():
    f1 = metric("token_f1", {"tokens": "words"})
    # 6 of 6 characters agree with 6 of 7
    assert f1.score(["我喜欢吃苹果"], ["我很喜欢吃苹果"]) == [2 * 6 / 13]
    assert f1.score(["The cat sat."], ["a cat"]) == metric("token_f1").score(["The cat sat."], ["a cat"])


def test_words_of_many_scripts():
    assert words("ภาษาไทยดี") == ["ภ", "า", "ษ", "า", "ไ", "ท", "ย", "ดี"]
    assert words("हिन्दी में") == ["हिन्दी", "में"]
    assert words("cafe\u0301 Don’t") == ["cafe\u0301", "don't"]
    assert words("𠮷野家・ﾈｺ") == ["𠮷", "野", "家", "ﾈ", "ｺ"]
    assert pieces("สวัสดี, हिन्दी!") == ["ส", "วั", "ส", "ดี", ",", "हिन्दी", "!"]
    assert [by_character(t) for t in ("ภาษาไทย", "ភាសាខ្មែរ", "မြန်မာ", "我", "हिन्दी", "word", "")] == [True] * 4 + [
        False
    ] * 3


def test_words_are_found_in_linear_time():
    start = time.process_time()
    for text in ("a" * 10**5 + "\u0301" * 10**5, "a'" * 10**5, "\u0301" * 10**5, "ก\u0e31" * 10**5):
        assert words(text) is not None
        assert pieces(text) is not None
    assert time.process_time() - start < 3.0


@pytest.mark.parametrize("name", ["distinct", "unique", "entropy", "repetition", "length"])
@pytest.mark.parametrize("language", SENTENCES)
def test_variety_counts_characters(name, language):
    text = SENTENCES[language][0] * 3
    spelled = " ".join(
        f"w{ord(c[0])}x{len(c)}" if len(c) == 1 else f"w{'x'.join(str(ord(k)) for k in c)}" for c in words(text)
    )
    assert metric(name).corpus([text]).value == metric(name).corpus([spelled]).value


def test_concepts_stand_inside_a_text_without_spaces():
    assert metric("concept_coverage").score(["我喜欢吃苹果"], concepts=[["苹果", "香蕉"]]) == [0.5]


def test_every_metric_of_words_is_looked_at():
    assert set(OF_WORDS) <= set(METRICS)


@settings(max_examples=200)
@given(st.text(st.characters(max_codepoint=127), max_size=60))
def test_ascii_is_read_as_all_scripts_are(text):
    mark = "é"  # sends the text through the classes of all scripts
    assert words(f"{text} {mark}") == [*words(text), mark]
    assert pieces(f"{text} {mark}") == [*pieces(text), mark]
