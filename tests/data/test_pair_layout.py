"""Prompts and answers of an encoder-decoder: each a text of its own, with the tokenizer's own ends."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import Metaspace
from transformers import PreTrainedTokenizerFast

from steersman.data import DataConfig, Demonstration, Preference, Query, Row, encode, encode_prompts, layout
from steersman.data.describe import spans
from steersman.data.encoder_decoder import PairLayout
from steersman.types import SteersmanError

WORDS = ["<pad>", "</s>", "<unk>", "<s>", *(f"▁{w}" for w in ("summarize:", *"abcdefgh", "User:"))]


def tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Words behind a space mark; an end token after every text as T5's, with `bos` also one in front as BART's."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = Metaspace()
    ends = [("</s>", 1), ("<s>", 3)]
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if bos else "$A </s>", special_tokens=ends
    )
    more = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", **more
    )


def words(text: str) -> list[int]:
    return [WORDS.index(f"▁{w}") for w in text.split()]


def demonstration(prompt, completion) -> Demonstration:
    return Demonstration(prompt, completion, Row({}, "d.jsonl", 3))


def config(**fields) -> DataConfig:
    return DataConfig(path="d.jsonl", **fields)


@pytest.mark.parametrize("bos", [False, True])
def test_a_source_is_what_the_tokenizer_makes_of_it_and_a_target_opens_a_text(bos):
    own = tokenizer(bos)
    laid = PairLayout(own, start=1)
    prompt, response, mask = laid.answer("summarize: a b", "c d")
    assert prompt == own("summarize: a b").input_ids
    assert response == [*words("c d"), 1]
    assert mask == [True] * 3
    assert laid.prompt("summarize: a b") == (prompt, "summarize: a b")
    assert laid.codec.decode(response, after=False) == "c d"


def test_a_policy_chooses_the_layout():
    pair = SimpleNamespace(tokenizer=tokenizer(), decoder_start=(0,))
    causal = SimpleNamespace(tokenizer=tokenizer(), decoder_start=())
    assert isinstance(layout(pair, config()), PairLayout)
    assert layout(causal, config()).joined
    assert layout(tokenizer(), config()).joined


def test_conversations_end_in_one_reply():
    laid = PairLayout(tokenizer(), start=1)
    talk = [{"role": "user", "content": "a b"}]
    prompt, response, _ = laid.answer(talk, [{"role": "assistant", "content": "c"}])
    assert prompt[-1] == 1
    assert prompt[:2] == words("User: a")
    assert response == [*words("c"), 1]
    with pytest.raises(SteersmanError, match="completion has 3 turns"):
        laid.answer(talk, [{"role": "assistant", "content": "c"}, *talk, {"role": "assistant", "content": "c"}])
    with pytest.raises(SteersmanError, match="text alone"):
        laid.answer("", "a b c")


@pytest.mark.parametrize(("side", "kept"), [("auto", "a b c"), ("right", "a b c"), ("left", "f g h")])
def test_sources_are_cut_at_the_stated_side_and_keep_their_ends(side, kept):
    laid, settings = (
        PairLayout(tokenizer(True), start=1),
        config(max_prompt_tokens=5, on_too_long="truncate", cut=side),
    )
    query = Query("a b c d e f g h", Row({}, "d.jsonl", 1))
    (prompt,), dropped, cut = encode_prompts([query], laid, settings)
    assert prompt.ids == [3, *words(kept), 1]
    assert prompt.text == kept
    assert (dropped, cut) == (0, 1)
    done = encode([demonstration("a b c d e f g h", "d")], laid, settings)
    assert done.first[0].prompt == prompt.ids
    assert done.cut == 1


def test_each_side_has_a_context_of_its_own():
    laid, context = PairLayout(tokenizer(), start=1), 6
    both = encode([demonstration("a b c d e", "a b c d")], laid, config(), context)
    assert len(both.first[0]) == 11  # more than the context, but neither side is
    with pytest.raises(SteersmanError, match=r"d\.jsonl.*7 prompt tokens .* exceed 6 of prompt, 5 of response"):
        encode([demonstration("a b c d e f", "a")], laid, config(), context)
    with pytest.raises(SteersmanError, match="2 prompt tokens and 6 response tokens exceed"):
        encode([demonstration("a", "a b c d e")], laid, config(), context)
    cut = encode([demonstration("a b c d e f", "a b c d e")], laid, config(on_too_long="truncate"), context).first[0]
    assert (cut.prompt, cut.response) == ([*words("a b c d e"), 1], words("a b c d e"))
    with pytest.raises(SteersmanError, match="6 new tokens do not fit the decoder's context, which has room for 5"):
        encode_prompts([Query("a", Row({}, "d", 1))], laid, config(), context, 6)
    both = encode([demonstration("a b c d e f", "a b")], laid, config(max_length=7, on_too_long="truncate"))
    assert both.first[0].prompt == [*words("a b c"), 1]


def test_pairs_share_their_source_and_both_sides_are_shown():
    laid = PairLayout(tokenizer(), start=1)
    (group,) = encode([Preference("a b", "c", "d e", Row({}, "p.jsonl", 1))], laid, config()).groups
    assert [e.prompt for e in group] == [[*words("a b"), 1]] * 2
    assert spans(laid, group[0]) == [("source: a b</s>\ntarget: ", False), ("c</s>", True)]
