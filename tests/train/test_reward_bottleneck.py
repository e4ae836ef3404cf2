"""A reward model behind an information bottleneck: its loss, what an unusual answer pays, and what is saved."""

from __future__ import annotations

import pytest
import torch
from reward_kit import settings
from scipy import integrate, stats
from test_reward_kinds import compare, interrupted, run
from train_kit import merge

from steersman.data import Encoded, EncodedSet, Preference, Row
from steersman.loss.reward import noisy_pairwise, pairwise
from steersman.model import BottleneckModel, load_reward
from steersman.objectives.reward_bottleneck import BottleneckReward
from steersman.objectives.reward_config import RewardModelConfig
from steersman.ops.distributions import nats_to_prior
from steersman.reward import ModelReward
from steersman.train.tally import Tally
from steersman.types import Prompt, Sample, SteersmanError, Tokens


def test_the_expected_loss_is_the_integral_over_the_leads_density():
    lead = torch.tensor([0.3, -2.0, 1.0, 4.0], dtype=torch.float64)
    variance = torch.tensor([0.5, 4.0, 9.0, 0.0], dtype=torch.float64)
    target = torch.tensor([1.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    margin = torch.tensor([0.0, 0.2, 0.0, 1.0], dtype=torch.float64)
    found = noisy_pairwise(lead, variance, target=target, margin=margin)
    for i in range(3):
        mean, spread = float(lead[i]), float(variance[i]) ** 0.5

        def at(d, i=i, mean=mean, spread=spread):
            one = pairwise(torch.tensor(d).double(), torch.zeros(()).double(), target=target[i], margin=margin[i])
            return float(one) * stats.norm.pdf(d, mean, spread)

        wanted = integrate.quad(at, mean - 12 * spread, mean + 12 * spread, points=[mean], limit=200)[0]
        assert float(found[i]) == pytest.approx(wanted, abs=1e-3)
    plain = pairwise(lead[3], torch.zeros(()).double(), target=target[3], margin=margin[3])
    torch.testing.assert_close(found[3], plain)


def test_nats_are_those_of_the_two_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    own = torch.distributions.Normal(mean, (log_variance / 2).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    wanted = torch.distributions.kl_divergence(own, prior).sum(-1)
    torch.testing.assert_close(nats_to_prior(mean, log_variance), wanted)


@pytest.fixture
def asked(tmp_path, mini):
    return merge(settings(tmp_path, mini, "preference"), {"train.bottleneck": 3})


def test_it_runs_and_resumes_bit_for_bit_and_an_unusual_answer_pays(asked, tmp_path, monkeypatch):
    summary = run(asked)
    assert summary["held_out/nats"] > 0
    interrupted(merge(asked, {"run.dir": str(tmp_path / "cut")}), monkeypatch, 2)
    compare(tmp_path / "run", tmp_path / "cut")
    model = load_reward(summary["model"])
    assert isinstance(model, BottleneckModel)
    same = load_reward(tmp_path / "cut" / "model")
    assert isinstance(same, BottleneckModel)
    assert torch.equal(model.decoder.weight, same.decoder.weight)
    tokens = Tokens.from_ids([[3, 4]] * 3, [[5 + i, 6, 7] for i in range(3)])
    samples = [Sample(Prompt([3, 4], "a"), [5 + i, 6, 7], [0.0] * 3, "eos", "b") for i in range(3)]
    mean, log_variance = model.outputs(tokens).split(3, dim=-1)
    score = (mean * model.decoder.weight).sum(-1)
    nats = ((mean**2 + log_variance.exp() - 1 - log_variance) / 2).sum(-1)
    reward = ModelReward(model, model.tokenizer, pessimism=0.5)
    torch.testing.assert_close(reward.score(samples).total, score - 0.5 * nats)
    assert "3 latents, its score less 0.5 times their nats" in reward.describe()


def test_the_objective_is_its_equation_however_the_batch_is_split(mini):
    names = tuple(f"{what} {i}" for what in ("mean", "log variance") for i in (1, 2))
    loaded = load_reward(mini, attributes=names)
    model = BottleneckModel(loaded.model, loaded.tokenizer, names)
    model.begin(torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.output.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(2))
    data: EncodedSet[Preference] = EncodedSet()
    for i in range(4):
        data.groups.append([Encoded([3, 4], [5 + i + side, 6], [True] * 2) for side in (0, 3)])
        data.examples.append(Preference("x", "a", "b", Row({}, "f", i), agreement=0.5 + i / 8, weight=1.0 + i))
    config = RewardModelConfig(bottleneck=2, bottleneck_weight=0.3)
    made = BottleneckReward(model, data, data, config, 1000)
    rows, denominator = list(range(4)), made.denominator(list(range(4)))
    whole = made.loss(rows, denominator, Tally())
    torch.testing.assert_close(whole, sum(made.loss([i], denominator, Tally()) for i in rows))
    total = 0.0
    for i in rows:
        pair = data.groups[i]
        out = model.outputs(Tokens.from_ids([e.prompt for e in pair], [e.response for e in pair]))
        mean, log_variance = out[:, :2], out[:, 2:]
        w = model.decoder.weight[0]
        lead, variance = ((mean[0] - mean[1]) * w).sum(), (log_variance.exp() * w**2).sum()
        target = lead.new_tensor([data.examples[i].agreement])
        bt = noisy_pairwise(lead[None], variance[None], target=target, margin=lead.new_zeros(1))[0]
        total = total + data.examples[i].weight * (bt + 0.3 * nats_to_prior(mean, log_variance).mean())
    torch.testing.assert_close(whole, total / denominator)


def test_what_it_can_not_be_is_refused(asked, tmp_path, mini):
    thumbs = merge(settings(tmp_path, mini, "feedback"), {"train.bottleneck": 3, "run.dir": str(tmp_path / "x")})
    with pytest.raises(SteersmanError, match=r"train.bottleneck is 3, but the data is of kind feedback"):
        run(thumbs)
    with pytest.raises(ValueError, match="two kinds of reward model"):
        run(merge(asked, {"train.heads": 2}))
    with pytest.raises(ValueError, match="no file of adapters holds"):
        run(merge(asked, {"model.lora": {"r": 2}, "model.merge": False}))
