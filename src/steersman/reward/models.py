"""A reward model as a reward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from steersman.distributed.micro import over_rows
from steersman.model import GENERAL, AttributeModel, ScalarModel, at_hand, context_length, step_ends
from steersman.model.bottleneck import BOTTLENECK
from steersman.model.ensemble import ENSEMBLE
from steersman.reward.core import Scores
from steersman.types import Need, Sample, SteersmanError, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger("steersman.reward")


class ModelReward:
    """Score of a frozen scalar model at the last token of prompt + response.

    When the model's tokenizer has exactly the policy's vocabulary it reads the sampled ids themselves. Else it
    reads a text bridge: prompt and completion decoded without special tokens and encoded by its own tokenizer,
    with its own end token where the response ended with one; `describe` and a log line say so.

    A model of several attributes gives its own mixture (`AttributeModel.score`, gated where it has gating), or the
    one that `attribute` names, in the units of its ratings. A model of steps gives the probability p_k that step k
    is right at the token that ends it: `steps` says whether these are shared out (mean: p_k / K), added (sum), or
    the least of them counts alone, where it stands (min). A sum pays for more steps, right or not.

    A model of several heads gives their mean less `pessimism` times their deviation, one with a bottleneck its score
    less `pessimism` times the nats that its latents tell.

    A model of general preferences gives an answer the mean of its log-odds against the other answers to the prompt
    (of the same `Prompt.index`) that are scored with it, and 0 where there is none: even odds against itself.

    Raises SteersmanError when the vocabularies differ and `text_bridge` is False, or when the model's head was
    never trained (all zeros); when scoring, if a sample is longer than the model's context or a score is not
    finite.
    """

    def __init__(
        self,
        model: ScalarModel | AttributeModel,
        policy_tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "reward_model",
        text_bridge: bool = True,
        attribute: str | None = None,
        steps: Literal["mean", "sum", "min"] = "mean",
        pessimism: float = 0.0,
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.policy_tokenizer, self.name = model.tokenizer, policy_tokenizer, name
        self.context: int | None = context_length(model.model)
        self.reach = max if model.decoder_start else sum  # an encoder-decoder has a context for each side
        self.other_tokenizer = self.tokenizer.get_vocab() != policy_tokenizer.get_vocab()
        if not model.output.weight.any():
            raise SteersmanError(
                f"reward '{name}': the head of {model.model.name_or_path} is all zeros, so every score would be 0: "
                f"it is a language model, or a reward model before training; train it with `steersman reward`"
            )
        known = model.meaning.attributes
        if attribute is not None and attribute not in known:
            raise SteersmanError(
                f"reward '{name}': {model.model.name_or_path} has no attribute {attribute!r}; it has: "
                f"{', '.join(known) or 'none, it gives one number'}"
            )
        if pessimism and model.meaning.kind not in (ENSEMBLE, BOTTLENECK):
            raise SteersmanError(
                f"reward '{name}': pessimism is {pessimism:g}, and {model.model.name_or_path} has no heads that "
                "could disagree; train one with `steersman reward --train.heads 5`, or one with latents that can be "
                "unusual, by `--train.bottleneck 16`"
            )
        self.attribute, self.steps, self.pessimism = attribute, steps, pessimism
        if self.other_tokenizer and not text_bridge:
            raise SteersmanError(
                f"reward '{name}': the reward model's vocabulary ({len(self.tokenizer)} tokens) is not the "
                f"policy's ({len(policy_tokenizer)} tokens). Train the reward model from the same base model, or "
                f"allow decoding and encoding again with `text_bridge: true`"
            )
        if self.other_tokenizer:
            _log.warning("reward '%s': %s", name, self.describe())

    @property
    def reads_ids(self) -> bool:
        return not self.other_tokenizer

    def needs(self, rows: Sequence[Mapping[str, Any]]) -> list[Need]:
        return []  # it reads prompts and responses

    def describe(self) -> str:
        if self.other_tokenizer:
            how = "with another tokenizer than the policy's: reads decoded text (text bridge)"
        else:
            how = "with the policy's tokenizer: reads the sampled tokens"
        return f"reward model{self._of()} {how}"

    def _of(self) -> str:
        meaning = self.model.meaning
        if self.attribute is not None:
            return f" of {self.attribute}"
        if meaning.kind == "steps":
            return f" of steps ({self.steps})"
        if meaning.kind == ENSEMBLE:
            return f" of {len(meaning.attributes)} heads, their mean less {self.pessimism:g} deviations,"
        if meaning.kind == BOTTLENECK:
            return f" of {len(meaning.attributes) // 2} latents, its score less {self.pessimism:g} times their nats,"
        if meaning.kind == GENERAL:
            return " of general preferences, log-odds against the prompt's other answers,"
        if len(meaning.attributes) > 1:
            return f" of {', '.join(meaning.attributes)}, {'gated' if meaning.gating else 'their mean'},"
        return ""

    @torch.no_grad()
    def score(self, samples: Sequence[Sample]) -> Scores:
        pairs = [self._bridge(s) if self.other_tokenizer else (s.prompt.ids, s.ids) for s in samples]
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
        if self.model.meaning.kind == "steps":
            return self._by_steps(samples, tokens)
        if self.model.meaning.kind == GENERAL:
            scores = self._against_others(samples, tokens)
            self._check(scores, samples)
            return Scores(scores, {self.name: scores})
        name = self.attribute
        if name is not None:
            numbers = self._over(tokens, lambda part: self.model.attribute(part, name))
        else:
            numbers = self._over(tokens, lambda part: self.model.bound(part, self.pessimism))
        scores = numbers.float().cpu()
        self._check(scores, samples)
        return Scores(scores, {self.name: scores})

    def _against_others(self, samples: Sequence[Sample], tokens: Tokens) -> Tensor:
        """Each answer's mean log-odds against the others of its prompt, which are samples of the policy too: an
        estimate of the preference score that GPO maximises (arXiv 2410.02197)."""
        model = self.model
        embedded = self._over(tokens, model.outputs, len(model.meaning.attributes)).float().cpu()
        group = torch.tensor([s.prompt.index for s in samples])
        other = (group[:, None] == group) & ~torch.eye(len(group), dtype=torch.bool)
        leads = model.leads(embedded[:, None].expand(-1, len(group), -1), embedded[None].expand(len(group), -1, -1))
        return (leads * other).sum(1) / other.sum(1).clamp(min=1)

    def _over(self, tokens: Tokens, run: Callable[[Tokens], Tensor], width: int | None = None) -> Tensor:
        """`run` on the batch, whose rows are shared out over the ranks."""
        with at_hand(self.model):
            return over_rows(tokens, self.model.max_tokens or 8192, run, width)

    def _by_steps(self, samples: Sequence[Sample], tokens: Tokens) -> Scores:
        """Probabilities at the ends of steps; where the two tokenizers end them, in the order of the text."""
        separator = self.model.meaning.separator
        width = tokens.response.shape[1] + 1
        right = self._over(tokens, self.model.value, width)[:, 1:].float().sigmoid().cpu()
        per_token = torch.zeros(len(samples), max(len(s.ids) for s in samples))
        for row, sample in enumerate(samples):
            read = tokens.response[row, : int(tokens.response_length[row])].tolist()
            seen = right[row, step_ends(self.tokenizer, read, separator)]
            ends = step_ends(self.policy_tokenizer, sample.ids, separator)
            count = min(len(ends), len(seen))
            if count == 0:
                continue
            paid = seen[:count] / count if self.steps == "mean" else seen[:count]
            if self.steps == "min":
                paid = torch.where(torch.arange(count) == paid.argmin(), paid, 0.0)
            per_token[row, ends[:count]] = paid
        total = per_token.sum(1)
        self._check(total, samples)
        return Scores(total, {self.name: total}, per_token)

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
