"""A model of preferences that need not come from a score: A over B, B over C and C over A can all hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steersman.model.attributes import AttributeModel
from steersman.types import SteersmanError, Tokens

GENERAL = "general preference"
"""The kind in a model's meaning."""


def plane_names(planes: int) -> tuple[str, ...]:
    """What the head's outputs are called: two coordinates for each plane."""
    return tuple(f"{axis} {i + 1}" for i in range(planes) for axis in ("x", "y"))


class GeneralPreferenceModel(AttributeModel):
    """log-odds that y beats y' = sum over k planes of (v_x v'_y - v_y v'_x), v = head(x, y) in R^2k.

    The form is skew-symmetric, so either order says the same, and every skew-symmetric table of log-odds is reached
    with enough planes; Bradley-Terry is one plane with v = (r, 1). Source: arXiv 2410.02197. Departure: the
    planes' scales are part of the embedding and do not depend on the prompt apart from it.
    """

    def __init__(
        self, model: Any, tokenizer: Any, attributes: Sequence[str], *, max_tokens: int | None = 8192
    ) -> None:
        super().__init__(model, tokenizer, attributes, max_tokens=max_tokens)
        self.means(replace(self.meaning, kind=GENERAL))

    def begin(self, generator: torch.Generator) -> None:
        """Embeddings N(0, 1) for a trunk's state of unit size: at 0 the product would have no gradient."""
        layer = self.output
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / math.sqrt(layer.in_features))
            if layer.bias is not None:
                layer.bias.zero_()

    def score(self, tokens: Tokens) -> Float[Tensor, " B"]:
        """Raises SteersmanError: one answer alone has no score here."""
        raise SteersmanError(
            f"{self.model.name_or_path}: a model of general preferences compares answers and scores none alone"
        )

    def leads(self, first: Float[Tensor, "*B K"], second: Float[Tensor, "*B K"]) -> Float[Tensor, "*B"]:
        """Log-odds that the first answer beats the second, from their `outputs`."""
        (x, y), (x_other, y_other) = ((v[..., 0::2], v[..., 1::2]) for v in (first, second))
        return (x * y_other - y * x_other).sum(-1)
