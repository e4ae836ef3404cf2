"""Reward models of several attributes, and the network that mixes them by what was asked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from steersman.model.layout import in_groups
from steersman.model.scalar import Headed
from steersman.types import SteersmanError, Tokens, send

GATING_FILE = "gating.safetensors"
"""Weights of the gating network, beside the model's own."""


class AttributeModel(Headed):
    """One regression head per attribute, side by side: r(x, y) [A], read at the last token.

    Source: arXiv 2406.12845, section 2.1. Departure: heads are trained on ratings of mean 0 and deviation 1, and
    `attributes` puts them back into the data's units.
    """

    runs = ("outputs", "attributes", "score", "with_prompt")

    def __init__(
        self, model: Any, tokenizer: Any, attributes: Sequence[str], *, max_tokens: int | None = 8192
    ) -> None:
        super().__init__(model, tokenizer, len(attributes), max_tokens=max_tokens)
        self.means(replace(self.meaning, kind="rating", attributes=tuple(attributes)))

    def attributes(self, tokens: Tokens) -> Float[Tensor, "B A"]:
        """Every attribute in the units of its ratings."""
        return self._in_units(self.outputs(tokens))

    def attribute(self, tokens: Tokens, name: str) -> Float[Tensor, " B"]:
        return self.attributes(tokens)[:, self.meaning.attributes.index(name)]

    def score(self, tokens: Tokens) -> Float[Tensor, " B"]:
        """The mean over attributes, each in deviations of its ratings, so that none outweighs another."""
        return self.outputs(tokens).mean(-1)

    def with_prompt(self, tokens: Tokens) -> tuple[Float[Tensor, "B A"], Float[Tensor, "B H"]]:
        """`outputs`, and the trunk's state at the last token of the prompt, from one run."""
        tokens = tokens.to("cpu")
        A = len(self.meaning.attributes)

        def run(part: Tokens) -> tuple[Tensor, ...]:
            before, after = self.reader.ends(part)
            return (torch.cat([self._head(after), before.float()], -1),)

        width = A + self.output.in_features
        out = in_groups(tokens, self.max_tokens, run, width)[0]
        return out[:, :A], out[:, A:]


class Gating(nn.Module):
    """R(x, y) = beta sum_a g_a(x) (r_a(x, y) - lambda_a v(x, y)),  g(x) = softmax of a small network on the prompt

    `v` is verbosity: the response's length, or one of the attributes. Its last layer starts at zero, so the first
    mixture is the plain mean. `beta` is learned, so that sigma(R - R') is the probability of a preference.

    Source: arXiv 2406.12845, section 2.2. Departures: prompts' states are standardised before the network; `beta`
    is part of the score; verbosity may be the length itself.
    """

    mean: Tensor
    deviation: Tensor
    penalty: Tensor
    verbosity_units: Tensor

    def __init__(self, width: int, attributes: int, hidden: int, layers: int) -> None:
        super().__init__()
        sizes = [width, *[hidden] * layers]
        inner = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        last = nn.Linear(sizes[-1], attributes)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(*inner, last)
        self.log_beta = nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.register_buffer("penalty", torch.zeros(attributes))
        self.register_buffer("verbosity_units", torch.tensor([0.0, 1.0]))

    def weights(self, prompt: Float[Tensor, "B H"]) -> Float[Tensor, "B A"]:
        """g(x): at least 0, 1 in sum."""
        return self.network((prompt - self.mean) / self.deviation).softmax(-1)

    def corrected(self, numbers: Float[Tensor, "*s A"], verbosity: Float[Tensor, "*s"]) -> Float[Tensor, "*s A"]:
        """r_a - lambda_a v, with v in deviations of its reference set."""
        centre, deviation = self.verbosity_units
        return numbers - self.penalty * ((verbosity - centre) / deviation)[..., None]

    def forward(
        self, prompt: Float[Tensor, "B H"], numbers: Float[Tensor, "B A"], verbosity: Float[Tensor, " B"]
    ) -> Float[Tensor, " B"]:
        mixed = (self.weights(prompt) * self.corrected(numbers, verbosity)).sum(-1)
        return self.log_beta.exp() * mixed


class GatedModel(AttributeModel):
    """Attributes mixed by `Gating`; sizes and the kind of verbosity stand in `meaning.gating`."""

    def __init__(
        self, model: Any, tokenizer: Any, attributes: Sequence[str], *, max_tokens: int | None = 8192
    ) -> None:
        super().__init__(model, tokenizer, attributes, max_tokens=max_tokens)
        sizes = self.meaning.gating
        if not sizes:
            raise SteersmanError(f"{model.name_or_path}: its config names no gating; train it with --stage gating")
        self.gating = Gating(self.output.in_features, len(attributes), sizes["hidden"], sizes["layers"])
        self.gating.to(self.device)

    def files_beside(self) -> dict[str, dict[str, Tensor]]:
        return {GATING_FILE: self.gating.state_dict()}

    def read_beside(self, folder: Path) -> None:
        self.gating.load_state_dict(load_file(folder / GATING_FILE, device=str(self.device)))

    def score(self, tokens: Tokens) -> Float[Tensor, " B"]:
        numbers, prompt = (x.float() for x in self.with_prompt(tokens))  # as the network was trained on them
        return self.gating(prompt, numbers, self.verbosity(tokens, numbers))

    def verbosity(self, tokens: Tokens, numbers: Float[Tensor, "B A"]) -> Float[Tensor, " B"]:
        """What the correction calls verbose: tokens of the response, or the head of an attribute."""
        return verbosity(self.meaning.gating["verbosity"], self.meaning.attributes, tokens, numbers)


def verbosity(kind: str, attributes: Sequence[str], tokens: Tokens, numbers: Float[Tensor, "B A"]) -> Tensor:
    """The response's length in tokens (`length`, `none`), or the number of the attribute that is named."""
    if kind in ("length", "none"):
        return send(tokens.response_length, numbers.device).to(numbers.dtype)
    return numbers[:, attributes.index(kind)]
