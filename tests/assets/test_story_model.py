"""The shipped story model: what loads, how it reads and writes text, and that it has learned English."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.assets import openings, story_model

STORY = (
    'One day, a girl named Lily went to the park with her mom. She saw a big dog. "Can I play with it?" she asked. '
    'Her mom said, "Yes, but be careful." Lily and the dog played all day.\nThey were very happy.'
)


@pytest.fixture(scope="module")
def shipped():
    model = AutoModelForCausalLM.from_pretrained(story_model()).eval()
    return model, AutoTokenizer.from_pretrained(story_model())


def nats_per_character(model, tokenizer, text: str) -> float:
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logp = model(ids).logits[0, :-1].log_softmax(-1)
    return -float(logp.gather(1, ids[0, 1:, None]).sum()) / len(text)


def test_it_is_small_and_loads_in_float32(shipped):
    assert sum(f.stat().st_size for f in story_model().iterdir()) < 6_000_000
    assert shipped[0].dtype == torch.float32
    assert (story_model() / "README.md").exists()


def test_special_tokens_are_distinct_and_agree_with_the_model(shipped):
    model, tokenizer = shipped
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert len({*ids}) == 3
    assert ids == [getattr(model.generation_config, f"{n}_token_id") for n in ("pad", "bos", "eos")]
    assert len(tokenizer) == model.config.vocab_size


@pytest.mark.parametrize("text", [STORY, " two  spaces\n\n\ttab ", "naïve 10% \U0001f600 it's <eos>", ""])
def test_text_comes_back_exactly(shipped, text):
    tokenizer = shipped[1]
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_a_prompt_and_its_continuation_encode_as_the_whole_does(shipped):
    tokenizer = shipped[1]
    whole = tokenizer(STORY)["input_ids"]
    for cut in [m.start() for m in re.finditer(r" \w", STORY)]:
        completion = tokenizer.encode(STORY[cut:], add_special_tokens=False)
        assert tokenizer(STORY[:cut])["input_ids"] + completion == whole


def test_it_expects_stories_and_not_their_words_in_another_order(shipped):
    told = nats_per_character(*shipped, STORY)
    words = STORY.split(" ")
    turned = nats_per_character(*shipped, " ".join(words[::-1]))
    assert told < 0.345  # 0.332 as shipped; one layer without its attention gives 0.370
    assert turned > 5 * told


def test_openings_are_short_varied_and_leave_the_mood_open():
    found = openings()
    assert len(found) == len({*found}) >= 200
    assert all(4 <= len(line.split()) <= 12 and line == line.strip() for line in found)
    assert len({tuple(line.split()[:2]) for line in found}) > 150
    assert sum(line[-1] in ".!?" for line in found) == 0
