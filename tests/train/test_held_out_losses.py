"""What held-out losses are of: the last token that counts, and a reward model's labels with their margins."""

from __future__ import annotations

import math

import pytest
import torch
from letter_models import WORDS, save_chat_mini, save_mini, write_jsonl

from steersman.data import DataConfig, demonstrations, encode, layout, preferences
from steersman.model import load_policy, load_scalar
from steersman.objectives.reward_config import RewardModelConfig
from steersman.objectives.reward_pairs import PairwiseReward
from steersman.objectives.supervised import SFT
from steersman.train.tally import Tally


@torch.no_grad()
def test_the_last_token_is_one_that_counts(tmp_path):
    """Conversations that the limit cuts inside a user's turn, and one that it does not cut."""
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "tell me a long story"), ("assistant", "no")]
    cut = [{"role": role, "content": text} for role, text in turns]
    rows = [{"messages": cut}, {"messages": [*cut[:1], {"role": "assistant", "content": "so it is"}]}]
    config = DataConfig(path=str(write_jsonl(tmp_path / "d.jsonl", rows)), max_length=24, on_too_long="truncate")
    policy = load_policy(save_chat_mini(tmp_path / "m", 64)).double()
    data = encode(demonstrations(config).train, layout(policy, config), config, 64)
    assert data.cut == 1
    assert [e.mask[-1] for e in data.first] == [False, True]
    expected = 0.0
    for e in data.first:
        logp = policy.model(torch.tensor([e.prompt + e.response])).logits[0].log_softmax(-1)
        last = max(t for t, counts in enumerate(e.mask) if counts)
        expected -= float(logp[len(e.prompt) + last - 1, e.response[last]]) / 2
    assert SFT(policy, data, data, 4096).evaluate()["held_out/loss_last_token"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("use_margin", [True, False])
def test_the_held_out_loss_of_pairs_has_their_margins_and_no_centring(use_margin, tmp_path):
    rows = [
        {"prompt": WORDS[i], "chosen": WORDS[i + 1], "rejected": WORDS[i + 2], "agreement": 1 - i / 10}
        | ({} if i == 2 else {"margin": i / 2})
        for i in range(8)
    ]
    config = DataConfig(path=str(write_jsonl(tmp_path / "p.jsonl", rows)), ties="keep")
    model = load_scalar(save_mini(tmp_path / "m")).double()
    torch.nn.init.normal_(model.output.weight, generator=torch.Generator().manual_seed(1))
    data = encode(preferences(config).train, layout(model, config), config, 64)
    losses, scores = [], []
    for row, group in zip(rows, data.groups, strict=True):
        ids = [torch.tensor([e.prompt + e.response]) for e in group]
        first, second = (float(model.output(model.model.model(x).last_hidden_state)[0, -1, 0].detach()) for x in ids)
        margin, share = row.get("margin", 0.0) if use_margin else 0.0, row["agreement"]
        scores.append((first, second))
        losses.append(
            share * math.log1p(math.exp(margin - first + second))
            + (1 - share) * math.log1p(math.exp(margin + first - second))
        )
    made = PairwiseReward(model, data, data, RewardModelConfig(use_margin=use_margin, centre=0.5), 4096)
    assert made.evaluate()["held_out/loss"] == pytest.approx(sum(losses) / 8, rel=1e-5)
    tally = Tally()
    made.loss(range(8), 8.0, tally)
    centring = sum(0.5 * (a + b) ** 2 for a, b in scores) / 8
    assert tally.means()["loss"] == pytest.approx(sum(losses) / 8 + centring, rel=1e-5)
