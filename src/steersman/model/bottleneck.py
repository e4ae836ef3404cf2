"""A reward model that reads an answer through few noisy numbers, and can tell when they are unlike any it knew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from steersman.model.attributes import AttributeModel
from steersman.ops.distributions import nats_to_prior
from steersman.types import Tokens

BOTTLENECK = "bottleneck"
"""The kind in a model's meaning."""
DECODER_FILE = "decoder.safetensors"
"""Weights of the layer from latents to the score, beside the model's own."""


def latent_names(count: int) -> tuple[str, ...]:
    """What the head's outputs are called: `count` means, then as many log variances."""
    return tuple(f"{what} {i + 1}" for what in ("mean", "log variance") for i in range(count))


class BottleneckModel(AttributeModel):
    """r(x, y) = w . mu(x, y), where training saw w . z with z ~ N(mu, sigma^2), held near N(0, I).

    What people did not go by costs nats and earns nothing, so it is left out; and an answer whose latents lie far
    from N(0, I) is unlike those that the model was trained on, which `bound` makes it pay for. Source: InfoRM, arXiv
    2402.09345 (the bottleneck; outliers in its space are over-optimised answers), and arXiv 2510.13694 (a
    penalty on them in RL). Departures: the decoder is linear; the penalty is the nats of the latents against the
    prior, and not the Mahalanobis distance to the supervised model's answers.
    """

    runs = (*AttributeModel.runs, "bound")

    def __init__(
        self, model: Any, tokenizer: Any, attributes: Sequence[str], *, max_tokens: int | None = 8192
    ) -> None:
        super().__init__(model, tokenizer, attributes, max_tokens=max_tokens)
        dtype = torch.promote_types(self.output.weight.dtype, torch.float32)
        self.decoder = nn.Linear(len(attributes) // 2, 1, bias=False, device=self.device, dtype=dtype)
        self.means(replace(self.meaning, kind=BOTTLENECK))

    def begin(self, generator: torch.Generator) -> None:
        """Means N(0, 1 / width) of the trunk's state, variances 1, a decoder N(0, 1 / latents)."""
        head, latents = self.output, self.decoder.in_features
        with torch.no_grad():
            head.weight.zero_()
            head.weight[:latents] = torch.randn(latents, head.in_features, generator=generator) / math.sqrt(
                head.in_features
            )
            if head.bias is not None:
                nn.init.zeros_(head.bias)
            self.decoder.weight.copy_(torch.randn(1, latents, generator=generator) / math.sqrt(latents))

    def files_beside(self) -> dict[str, dict[str, Tensor]]:
        return {DECODER_FILE: self.decoder.state_dict()}

    def read_beside(self, folder: Path) -> None:
        self.decoder.load_state_dict(load_file(folder / DECODER_FILE, device=str(self.device)))

    def latents(self, tokens: Tokens) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B L"]]:
        """Means and log variances of each answer's latents."""
        mean, log_variance = self.outputs(tokens).chunk(2, dim=-1)
        return mean, log_variance

    def decoded(self, latents: Float[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """The score that the latents stand for."""
        return self.decoder(latents.to(self.decoder.weight.dtype))[:, 0]

    def score(self, tokens: Tokens) -> Float[Tensor, " B"]:
        """The score of the latents' means."""
        return self.decoded(self.latents(tokens)[0])

    def bound(self, tokens: Tokens, pessimism: float = 0.0) -> Float[Tensor, " B"]:
        """The score less `pessimism` times the nats between the answer's latents and the prior."""
        mean, log_variance = self.latents(tokens)
        return self.decoded(mean) - pessimism * nats_to_prior(mean, log_variance)
