"""A reward model behind an information bottleneck, on pairs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from steersman.data import Preference
from steersman.loss.reward import centring, noisy_pairwise
from steersman.model import BottleneckModel
from steersman.objectives.batch import over_answers
from steersman.objectives.reward_pairs import PairwiseReward
from steersman.ops.distributions import nats_to_prior
from steersman.types import Stats, Tokens


class BottleneckReward(PairwiseReward[BottleneckModel]):
    """The objective: per pair,

        E[-log sigma(w . (z_w - z_l))] + weight * (KL(q(z_w) || N(0, I)) + KL(q(z_l) || N(0, I))) / 2

    with z ~ q = N(mu, sigma^2) of each answer. Source: arXiv 2402.09345. `held_out/nats` is that KL per
    answer: how much the model reads out of it.
    """

    def per_pair(self, tokens: Tokens, examples: Sequence[Preference]) -> tuple[Tensor, Tensor]:
        model, config = self.module, self.config
        mean, log_variance = model.latents(tokens)
        chosen, rejected = model.decoded(mean).chunk(2)
        spread = (log_variance.exp() * model.decoder.weight**2).sum(-1).chunk(2)
        target, margin = self.labels(examples, chosen)
        loss = noisy_pairwise(chosen - rejected, spread[0] + spread[1], target=target, margin=margin)
        nats = nats_to_prior(mean, log_variance).view(2, -1).mean(0)
        loss = loss + config.bottleneck_weight * nats + config.centre * centring(chosen, rejected)
        return loss, chosen - rejected

    def evaluate(self) -> Stats:
        seen, held = super().evaluate(), self.held_out
        if held is None:
            return seen
        nats = over_answers(held.groups, self.micro, lambda tokens: nats_to_prior(*self.module.latents(tokens)))
        return seen | {"held_out/nats": float(nats.mean())}
