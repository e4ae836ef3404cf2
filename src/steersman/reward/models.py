"""A reward model as a reward."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steersman.reward.core import Scores
from steersman.types import Sample, SteersmanError, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from steersman.model.scalar import ScalarModel

_log = logging.getLogger("steersman.reward")


class ModelReward:
    """Score of a frozen scalar model at the last token of prompt + response.

    When the model's tokenizer has exactly the policy's vocabulary it reads the sampled ids themselves. Else it
    reads a text bridge: prompt and completion decoded without special tokens and encoded by its own tokenizer,
    with its own end token where the response ended with one; `describe` and a log line say so.

    `max_length` is the model's context in tokens, `batch_size` samples are scored at a time, longest together.
    Raises SteersmanError when the vocabularies differ and `text_bridge` is False; when scoring, if a sample is
    longer than `max_length` or a score is not finite.
    """

    def __init__(
        self,
        model: ScalarModel,
        tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "reward_model",
        text_bridge: bool = True,
        max_length: int | None = None,
        batch_size: int = 64,
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.policy_tokenizer = tokenizer, policy_tokenizer
        self.name, self.max_length, self.batch_size = name, max_length, batch_size
        self.bridged = tokenizer.get_vocab() != policy_tokenizer.get_vocab()
        if self.bridged and not text_bridge:
            raise SteersmanError(
                f"reward '{name}': the reward model's vocabulary ({len(tokenizer)} tokens) is not the policy's "
                f"({len(policy_tokenizer)} tokens). Train the reward model from the same base model, or allow "
                f"decoding and encoding again with `text_bridge: true`"
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
        lengths = [len(prompt) + len(response) for prompt, response in pairs]
        if self.max_length is not None and max(lengths) > self.max_length:
            row = lengths.index(max(lengths))
            raise SteersmanError(
                f"reward '{self.name}': sample {row} has {lengths[row]} tokens with its prompt, more than the "
                f"reward model's context of {self.max_length}; shorten prompts or responses"
            )
        order = sorted(range(len(pairs)), key=lengths.__getitem__)
        device = next(self.model.parameters()).device
        scores = torch.zeros(len(pairs))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            tokens = Tokens.from_ids([pairs[r][0] for r in rows], [pairs[r][1] for r in rows]).to(device)
            scores[torch.tensor(rows)] = self.model.score(tokens).float().cpu()
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
