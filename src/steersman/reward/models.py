"""A reward model as a reward."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steersman.model import ScalarModel
from steersman.reward.core import Scores
from steersman.types import Sample, SteersmanError, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger("steersman.reward")


class ModelReward:
    """Score of a frozen scalar model at the last token of prompt + response.

    When the model's tokenizer has exactly the policy's vocabulary it reads the sampled ids themselves. Else it
    reads a text bridge: prompt and completion decoded without special tokens and encoded by its own tokenizer,
    with its own end token where the response ended with one; `describe` and a log line say so.

    Raises SteersmanError when the vocabularies differ and `text_bridge` is False, or when the model's head was
    never trained (all zeros); when scoring, if a sample is longer than the model's context or a score is not
    finite.
    """

    def __init__(
        self,
        model: ScalarModel,
        policy_tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "reward_model",
        text_bridge: bool = True,
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.policy_tokenizer, self.name = model.tokenizer, policy_tokenizer, name
        self.context: int | None = getattr(model.model.config, "max_position_embeddings", None)
        self.reach = max if model.decoder_start else sum  # an encoder-decoder has a context for each side
        self.bridged = self.tokenizer.get_vocab() != policy_tokenizer.get_vocab()
        if not model.output.weight.any():
            raise SteersmanError(
                f"reward '{name}': the head of {model.model.name_or_path} is all zeros, so every score would be 0: "
                f"it is a language model, or a reward model before training; train it with `steersman reward`"
            )
        if self.bridged and not text_bridge:
            raise SteersmanError(
                f"reward '{name}': the reward model's vocabulary ({len(self.tokenizer)} tokens) is not the "
                f"policy's ({len(policy_tokenizer)} tokens). Train the reward model from the same base model, or "
                f"allow decoding and encoding again with `text_bridge: true`"
            )
        if self.bridged:
            _log.warning("reward '%s': %s", name, self.describe())

    def describe(self) -> str:
        if self.bridged:
            return "reward model with another tokenizer than the policy's: reads decoded text (text bridge)"
        return "reward model with the policy's tokenizer: reads the sampled tokens"

    @torch.no_grad()
    def score(self, samples: Sequence[Sample]) -> Scores:
        pairs = [self._bridge(s) if self.bridged else (s.prompt.ids, s.ids) for s in samples]
        lengths = [
            self.reach((len(prompt), len(response) + len(self.model.decoder_start))) for prompt, response in pairs
        ]
        if self.context is not None and max(lengths) > self.context:
            row = lengths.index(max(lengths))
            raise SteersmanError(
                f"reward '{self.name}': sample {row} has {lengths[row]} tokens with its prompt, more than the "
                f"reward model's context of {self.context}; shorten prompts or responses"
            )
        tokens = Tokens.from_ids([prompt for prompt, _ in pairs], [response for _, response in pairs])
        scores = self.model.score(tokens).float().cpu()
        self._check(scores, samples)
        return Scores(scores, {self.name: scores})

    def _bridge(self, sample: Sample) -> tuple[list[int], list[int]]:
        prompt = self.policy_tokenizer.decode(sample.prompt.ids, skip_special_tokens=True)
        ids = self.tokenizer(prompt)["input_ids"]
        response = self.tokenizer(sample.text, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        if sample.finish == "eos" and end is not None:
            response = [*response, end]
        return ids, response

    def _check(self, scores: Tensor, samples: Sequence[Sample]) -> None:
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise SteersmanError(
                f"reward '{self.name}': the reward model gave {float(scores[bad[0]])} for sample {bad[0]} "
                f"({len(bad)} of {len(samples)} in the batch; completion: {samples[bad[0]].text[:80]!r}); its "
                f"weights or its precision are broken: load it in float32 or train it again"
            )
