"""Reward models of steps, of attributes and gated ones, as rewards of sampled responses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from letter_models import letters
from reward_classifiers import WORDS, classifier, word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from steersman.model import AttributeModel, GatedModel, Meaning, ScalarModel, save, step_ends
from steersman.reward import ModelReward, RewardConfig, build_reward
from steersman.types import SteersmanError


def state(model, ids):
    with torch.no_grad():
        return model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]


def steps_model(tokenizer, separator="and"):
    scalar = ScalarModel(classifier("llama"), tokenizer)
    scalar.means(Meaning(kind="steps", shift=(0.5,), scale=(2.0,), separator=separator))
    return scalar


def test_where_steps_end(policy_tokenizer):
    ids = policy_tokenizer("was happy and then was sad")["input_ids"]
    assert step_ends(policy_tokenizer, ids, "and") == [2, 5]
    assert step_ends(policy_tokenizer, [*ids, policy_tokenizer.eos_token_id], "and") == [2, 6]
    assert step_ends(policy_tokenizer, ids[:3], "and") == [2]
    assert step_ends(policy_tokenizer, [*ids[:3], policy_tokenizer.eos_token_id], "and") == [2]
    assert step_ends(policy_tokenizer, [], "and") == []


def test_a_step_of_the_separators_letters_is_a_step():
    tokenizer = letters()
    assert step_ends(tokenizer, tokenizer.encode("anandb"), "and") == [4, 5]


def test_separators_that_begin_with_a_space_or_part_characters_are_found():
    words = Tokenizer(models.Unigram([("<unk>", 0.0), *((w, -1.0) for w in ("\u2581a", "\u2581ki", "\u2581b"))], 0))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    pieces = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert step_ends(pieces, pieces.encode("a ki b ki a"), " ki") == [1, 3, 4]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    split = PreTrainedTokenizerFast(tokenizer_object=inner)
    ids = split.encode("aкиbкиc")
    assert step_ends(split, ids, "ки") == [4, 9, 10]
    assert step_ends(split, ids[:-2], "ки") == [4, 8]  # its last character is cut


@pytest.mark.parametrize("steps", ["mean", "sum", "min"])
def test_steps_are_paid_where_they_end(steps, samples, policy_tokenizer):
    scalar = steps_model(policy_tokenizer)
    scores = ModelReward(scalar, policy_tokenizer, steps=steps).score(samples)
    ends = [[2, 6], [0], [3]]  # the third response ends with a separator: the end token behind it is no step
    expected = torch.zeros(3, 7)
    for row, (s, at) in enumerate(zip(samples, ends, strict=True)):
        hidden = state(scalar.model, s.prompt.ids + s.ids)[[len(s.prompt.ids) + t for t in at]]
        p = torch.sigmoid(2 * scalar.model.score(hidden)[:, 0] + 0.5).detach()
        if steps == "mean":
            expected[row, at] = p / len(at)
        elif steps == "sum":
            expected[row, at] = p
        else:
            expected[row, at[int(p.argmin())]] = p.min()
    torch.testing.assert_close(scores.per_token, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.total, expected.sum(1), rtol=1e-4, atol=1e-5)


def test_steps_over_the_text_bridge_stand_at_the_policys_tokens(samples, policy_tokenizer):
    scalar = steps_model(word_tokenizer([*WORDS[:3], *reversed(WORDS[3:])]))
    scores = ModelReward(scalar, policy_tokenizer, steps="sum").score(samples)
    assert [row.nonzero().flatten().tolist() for row in scores.per_token] == [[2, 6], [0], [3]]


def several(tokenizer, gated: bool):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, num_labels=2,
    )  # fmt: skip
    meaning = Meaning(
        kind="rating", attributes=("kind", "true"), shift=(3.0, 100.0), scale=(0.5, 20.0),
        gating={"hidden": 4, "layers": 1, "verbosity": "length"} if gated else {},
    )  # fmt: skip
    meaning.write(config)
    model = LlamaForSequenceClassification(config).eval()
    nn.init.normal_(model.score.weight)
    made = (GatedModel if gated else AttributeModel)(model, tokenizer, ("kind", "true"))
    if isinstance(made, GatedModel):
        for p in made.gating.parameters():
            nn.init.normal_(p)
        made.gating.penalty.copy_(torch.tensor([0.3, -0.7]))
        made.gating.verbosity_units.copy_(torch.tensor([4.0, 2.0]))
        made.gating.mean.normal_()
    return made


def numbers(model, s):
    ids = s.prompt.ids + s.ids
    hidden = state(model.model, ids)
    return model.model.score(hidden[-1]).detach(), hidden[len(s.prompt.ids) - 1]


def test_attributes_alone_and_together(samples, policy_tokenizer):
    model = several(policy_tokenizer, gated=False)
    raw = torch.stack([numbers(model, s)[0] for s in samples])
    torch.testing.assert_close(ModelReward(model, policy_tokenizer).score(samples).total, raw.mean(1))
    one = ModelReward(model, policy_tokenizer, attribute="true")
    torch.testing.assert_close(one.score(samples).total, 20 * raw[:, 1] + 100, rtol=1e-4, atol=1e-4)
    assert "of true" in one.describe()
    with pytest.raises(SteersmanError, match=r"has no attribute 'big'; it has: kind, true"):
        ModelReward(model, policy_tokenizer, attribute="big")


def test_a_gated_model_is_saved_and_loaded_as_a_reward(samples, policy_tokenizer, tmp_path):
    model = several(policy_tokenizer, gated=True)
    expected = []
    for s in samples:
        raw, prompt = numbers(model, s)
        g = model.gating
        hidden = torch.relu(g.network[0](prompt - g.mean))
        weights = torch.softmax(g.network[2](hidden), -1)
        corrected = raw - torch.tensor([0.3, -0.7]) * (len(s.ids) - 4.0) / 2.0
        expected.append(float((g.log_beta.exp() * (weights * corrected).sum()).detach()))
    save(model, None, tmp_path / "rm")
    config = RewardConfig.model_validate({"parts": {"taste": {"model": str(tmp_path / "rm")}}})
    total = build_reward(config, policy_tokenizer, "cpu").score(samples).total
    assert total.tolist() == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.01


def test_meaning_survives_saving_and_is_forgotten_by_a_new_head(policy_tokenizer, tmp_path):
    from steersman.model import load_reward, load_scalar

    scalar = steps_model(policy_tokenizer)
    save(scalar, None, tmp_path / "rm")
    assert load_reward(tmp_path / "rm", device="cpu").meaning == scalar.meaning
    assert load_scalar(tmp_path / "rm", init="fresh", device="cpu").meaning == Meaning()
    assert replace(scalar.meaning, separator="") != scalar.meaning
