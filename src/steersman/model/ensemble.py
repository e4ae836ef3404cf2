"""A reward model that knows how sure it is: several heads on one trunk, and a lower bound on what they say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steersman.model.attributes import AttributeModel
from steersman.types import Tokens

ENSEMBLE = "ensemble"
"""The kind in a model's meaning."""


def head_names(count: int) -> tuple[str, ...]:
    """What an ensemble's outputs are called."""
    return tuple(f"head {i + 1}" for i in range(count))


class EnsembleModel(AttributeModel):
    """K scores of a response, each from a head that was trained on draws of its own of the same pairs.

    Heads that agree where there were pairs and differ where there were none make their deviation a measure of how
    little is known. Source: arXiv 2310.02743 (ensembles, mean less variance), 2401.16635 (heads on one trunk).
    Departure: what is taken off is the deviation, which has the score's units, and not the variance.
    """

    def __init__(
        self, model: Any, tokenizer: Any, attributes: Sequence[str], *, max_tokens: int | None = 8192
    ) -> None:
        super().__init__(model, tokenizer, attributes, max_tokens=max_tokens)
        self.means(replace(self.meaning, kind=ENSEMBLE))

    def begin(self, generator: torch.Generator) -> None:
        """Gives each head weights of its own, so that they differ where no pair speaks: N(0, 1 / width)."""
        layer = self.output
        drawn = torch.randn(layer.weight.shape, generator=generator) / math.sqrt(layer.in_features)
        with torch.no_grad():
            layer.weight.copy_(drawn)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def bound(self, tokens: Tokens, pessimism: float = 0.0) -> Float[Tensor, " B"]:
        """The heads' mean less `pessimism` times their standard deviation."""
        heads = self.outputs(tokens)
        return heads.mean(-1) - pessimism * heads.std(-1, correction=0)
