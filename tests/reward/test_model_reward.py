import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast

from steersman.reward import ModelReward
from steersman.types import Prompt, Sample, SteersmanError, Tokens

WORDS = "<pad> <bos> <eos> the cat was happy sad and then".split()  # noqa: SIM905


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )


class Bag(nn.Module):
    """The contract's `score` with a number anyone can work out: 100 * prompt ids' sum + response ids' sum."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))
        self.seen: list[Tokens] = []

    def score(self, tokens: Tokens) -> torch.Tensor:
        self.seen.append(tokens)
        columns = torch.arange(tokens.prompt.shape[1]) < tokens.prompt_length[:, None]
        prompt = torch.where(columns, tokens.prompt, 0).sum(1)
        return self.one * (100 * prompt + torch.where(tokens.mask, tokens.response, 0).sum(1))


def sample(prompt: str, response: str, tokenizer, finish="eos") -> Sample:
    ids = tokenizer(response)["input_ids"] + ([tokenizer.eos_token_id] if finish == "eos" else [])
    return Sample(Prompt(tokenizer(prompt)["input_ids"], prompt), ids, [0.0] * len(ids), finish, response)


@pytest.fixture
def policy_tokenizer():
    return word_tokenizer(WORDS)


@pytest.fixture
def samples(policy_tokenizer):
    return [
        sample("the cat", "was happy and then was sad", policy_tokenizer),
        sample("cat", "was", policy_tokenizer, "length"),
        sample("the", "cat was sad", policy_tokenizer),
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_a_shared_vocabulary_is_read_as_sampled(samples, policy_tokenizer, batch_size):
    model = Bag()
    reward = ModelReward(model, word_tokenizer(WORDS), policy_tokenizer, name="rm", batch_size=batch_size)
    scores = reward.score(samples)
    assert scores.total.tolist() == [100 * sum(s.prompt.ids) + sum(s.ids) for s in samples]
    assert list(scores.parts) == ["rm"]
    assert not scores.total.requires_grad
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert all(len(t) <= batch_size for t in model.seen)
    assert "policy's tokenizer" in reward.describe()


def test_another_vocabulary_goes_over_the_text_bridge_aloud(samples, policy_tokenizer, caplog):
    other = word_tokenizer([*WORDS[:3], *reversed(WORDS[3:])])
    reward = ModelReward(Bag(), other, policy_tokenizer, name="rm")
    assert "text bridge" in caplog.text
    assert "text bridge" in reward.describe()
    expected = [
        100 * sum(other(s.prompt.text)["input_ids"])
        + sum(other(s.text)["input_ids"])
        + (other.eos_token_id if s.finish == "eos" else 0)
        for s in samples
    ]
    assert reward.score(samples).total.tolist() == expected
    assert expected != [100 * sum(s.prompt.ids) + sum(s.ids) for s in samples]


def test_the_bridge_can_be_refused(policy_tokenizer):
    with pytest.raises(SteersmanError, match=r"'rm': .*vocabulary \(11 tokens\) is not the policy's \(10 tokens\)"):
        ModelReward(Bag(), word_tokenizer([*WORDS, "more"]), policy_tokenizer, name="rm", text_bridge=False)


def test_samples_beyond_the_models_context_are_refused(samples, policy_tokenizer):
    reward = ModelReward(Bag(), policy_tokenizer, policy_tokenizer, name="rm", max_length=8)
    with pytest.raises(SteersmanError, match=r"sample 0 has 9 tokens.*context of 8"):
        reward.score(samples)


def test_broken_weights_are_named(samples, policy_tokenizer):
    model = Bag()
    reward = ModelReward(model, policy_tokenizer, policy_tokenizer, name="rm")
    model.one.data.fill_(float("nan"))
    with pytest.raises(SteersmanError, match=r"'rm': the reward model gave nan for sample 0 \(3 of 3"):
        reward.score(samples)
