"""Reward models as rewards: what they read, over which vocabulary, and what is refused."""

from __future__ import annotations

import pytest
import torch
from reward_classifiers import WORDS, classifier, word_tokenizer
from transformers import GPT2LMHeadModel

from steersman.model import ScalarModel
from steersman.reward import ModelReward, RewardConfig, build_reward
from steersman.types import SteersmanError


def alone(model, ids: list[int]) -> float:
    """The classifier's own head on the last state of one unpadded row."""
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state
        return float(model.score(hidden[0, -1]))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_shared_vocabulary_is_read_as_sampled(family, samples, policy_tokenizer):
    model = classifier(family)
    scalar = ScalarModel(model, word_tokenizer(WORDS))
    reward = ModelReward(scalar.train(), policy_tokenizer, name="rm")
    scores = reward.score(samples)
    expected = [alone(model, s.prompt.ids + s.ids) for s in samples]
    assert max(expected) - min(expected) > 0.01
    assert scores.total.tolist() == pytest.approx(expected, abs=1e-4)
    assert list(scores.parts) == ["rm"]
    assert not scores.total.requires_grad
    assert not any(p.requires_grad for p in scalar.parameters())
    assert not model.training
    assert "policy's tokenizer" in reward.describe()


def test_another_vocabulary_goes_over_the_text_bridge_aloud(samples, policy_tokenizer, caplog):
    other, model = word_tokenizer([*WORDS[:3], *reversed(WORDS[3:])]), classifier("llama")
    reward = ModelReward(ScalarModel(model, other), policy_tokenizer, name="rm")
    assert "text bridge" in caplog.text
    assert "text bridge" in reward.describe()
    samples[0].prompt.ids = [policy_tokenizer.bos_token_id, *samples[0].prompt.ids]  # its own marks stay behind
    expected = []
    for s in samples:
        end = [other.eos_token_id] if s.finish == "eos" else []
        expected.append(alone(model, other(s.prompt.text)["input_ids"] + other(s.text)["input_ids"] + end))
    assert reward.score(samples).total.tolist() == pytest.approx(expected, abs=1e-4)
    assert expected != pytest.approx([alone(model, s.prompt.ids + s.ids) for s in samples], abs=1e-2)


def test_the_bridge_can_be_refused(policy_tokenizer):
    scalar = ScalarModel(classifier("llama"), word_tokenizer([*WORDS, "more"]))
    with pytest.raises(SteersmanError, match=r"'rm': .*vocabulary \(11 tokens\) is not the policy's \(10 tokens\)"):
        ModelReward(scalar, policy_tokenizer, name="rm", text_bridge=False)


def test_samples_beyond_the_models_context_are_refused(samples, policy_tokenizer):
    reward = ModelReward(ScalarModel(classifier("gpt2", context=8), policy_tokenizer), policy_tokenizer, name="rm")
    with pytest.raises(SteersmanError, match=r"sample 0 has 9 tokens.*context of 8"):
        reward.score(samples)


def test_broken_weights_are_named(samples, policy_tokenizer):
    model = classifier("llama")
    reward = ModelReward(ScalarModel(model, policy_tokenizer), policy_tokenizer, name="rm")
    model.score.weight.data.fill_(float("nan"))
    with pytest.raises(SteersmanError, match=r"'rm': the reward model gave nan for sample 0 \(3 of 3"):
        reward.score(samples)


def test_a_recipe_loads_a_reward_model_and_refuses_an_untrained_head(tmp_path, samples, policy_tokenizer):
    model = classifier("llama")
    model.save_pretrained(tmp_path / "rm")
    policy_tokenizer.save_pretrained(tmp_path / "rm")
    config = RewardConfig.model_validate({"parts": {"rm": {"model": str(tmp_path / "rm"), "weight": -2}}})
    total = build_reward(config, policy_tokenizer, "cpu").score(samples).total
    assert total.tolist() == pytest.approx([-2 * alone(model, s.prompt.ids + s.ids) for s in samples], abs=1e-4)

    GPT2LMHeadModel(classifier("gpt2").config).save_pretrained(tmp_path / "lm")
    policy_tokenizer.save_pretrained(tmp_path / "lm")
    config = RewardConfig.model_validate({"parts": {"rm": {"model": str(tmp_path / "lm")}}})
    with pytest.raises(SteersmanError, match=r"'rm': the head of .*lm is all zeros.*steersman reward"):
        build_reward(config, policy_tokenizer, "cpu")
