"""Models that give one number: reward models and critics, which share one architecture."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steersman.model.layout import in_groups, join, predicting, response_slots, spread
from steersman.model.policy import Logp, Policy, states
from steersman.model.probe import close, probe_ids, quiet, require_causal
from steersman.types import SteersmanError, Tokens


class ScalarModel(nn.Module):
    """A causal trunk with a linear head of one output: V of a state, or the score of a whole response.

    Wraps `AutoModelForSequenceClassification` with `num_labels=1`. Where a row ends is known by its length, so
    the model's own search for the last token that is not padding is not used.

    Raises SteersmanError if the head does not give exactly one number, or the trunk is not causal.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_tokens: int | None = 8192) -> None:
        super().__init__()
        require_one_output(model)
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.trunk_name = model.base_model_prefix
        self.notes: list[str] = []
        self._probe()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def trunk(self) -> nn.Module:
        return getattr(self.model, self.trunk_name)

    def value(self, tokens: Tokens) -> Float[Tensor, "B T+1"]:
        """V before each response token, and after the last one in the column of the row's length; 0 beyond."""
        tokens = tokens.to(self.device)

        def run(part: Tokens) -> tuple[Tensor, ...]:
            layout = join(part)
            hidden = states(self.trunk, layout)[predicting(part, layout, extra=1)]
            return (spread(self._head(hidden), response_slots(part, extra=1)),)

        return in_groups(tokens, self.max_tokens, run, tokens.response.shape[1] + 1)[0]

    def score(self, tokens: Tokens) -> Float[Tensor, " B"]:
        """The number at the last token of prompt + response."""
        tokens = tokens.to(self.device)

        def run(part: Tokens) -> tuple[Tensor, ...]:
            layout = join(part)
            last = layout.start + part.length - 1
            return (self._head(states(self.trunk, layout)[last])[:, None],)

        return in_groups(tokens, self.max_tokens, run, 1)[0][:, 0]

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.score(hidden)[:, 0].float()

    def _probe(self) -> None:
        ids = probe_ids(self.model)[:1]
        name = f"{type(self.model).__name__} at '{self.model.name_or_path}'"
        with quiet(self.model):
            require_causal(self.trunk, ids, name)
            seen: list[Tensor] = []
            handle = self.model.score.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
            try:
                self.model(input_ids=ids, use_cache=False)
            finally:
                handle.remove()
            trunk = self.trunk(input_ids=ids, use_cache=False).last_hidden_state
        if not seen or not close(seen[0], trunk):
            raise SteersmanError(
                f"{name}: its score head does not read the trunk's last hidden state as it is; this model family "
                "is not supported as reward model or critic yet"
            )


class SharedCritic(nn.Module):
    """A critic that is a linear head on the policy's own trunk; its gradient reaches the trunk too.

    The head starts at zero, in float32: the first values are 0 for every state.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        size = policy.head().weight.shape[1]
        self.value_head = nn.Linear(size, 1, bias=False, device=policy.device)
        nn.init.zeros_(self.value_head.weight)

    def value(self, tokens: Tokens) -> Float[Tensor, "B T+1"]:
        """V before each response token, and after the last one in the column of the row's length; 0 beyond."""
        tokens = tokens.to(self.policy.device)

        def run(part: Tokens) -> tuple[Tensor, ...]:
            return (self._value(part, self.policy.hidden(part, extra=1)),)

        return in_groups(tokens, self.policy.max_tokens, run, tokens.response.shape[1] + 1)[0]

    def logp_value(
        self, tokens: Tokens, *, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Logp, Float[Tensor, "B T+1"]]:
        """The policy's `logp` and this critic's `value` from one run of the trunk."""
        tokens = tokens.to(self.policy.device)

        def run(part: Tokens) -> tuple[Tensor, ...]:
            hidden = self.policy.hidden(part, extra=1)
            value = self._value(part, hidden)
            column = torch.arange(value.shape[1], device=value.device)
            acts = (column < part.response_length[:, None])[response_slots(part, extra=1)]
            out = self.policy.logp_from(part, hidden[acts], temperature=temperature, entropy=entropy)
            return (value, out.logp) if out.entropy is None else (value, out.logp, out.entropy)

        T = tokens.response.shape[1]
        value, *logp = in_groups(tokens, self.policy.max_tokens, run, T + 1)
        return Logp(*(x[:, :T] for x in logp)), value

    def _value(self, tokens: Tokens, hidden: Tensor) -> Tensor:
        value = self.value_head(hidden.to(self.value_head.weight.dtype))[:, 0].float()
        return spread(value, response_slots(tokens, extra=1))


def require_one_output(model: Any) -> None:
    """Raises SteersmanError unless the model is a sequence classifier whose head gives exactly one number."""
    path, labels = model.name_or_path, model.config.num_labels
    if labels != 1:
        raise SteersmanError(
            f"{path}: config.num_labels is {labels}, but a reward model or critic must give exactly one number; "
            "load it with num_labels=1 and train its head again, or start from the language model that it was "
            "made from"
        )
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise SteersmanError(
            f"{path}: {type(model).__name__} has no linear `score` head on a causal trunk, so it can not be a "
            "reward model or critic; use a decoder model's ForSequenceClassification"
        )
    if head.out_features != 1:
        raise SteersmanError(
            f"{path}: the weight of its `score` head is {tuple(head.weight.shape)}, but config.num_labels is 1; a "
            f"reward model or critic needs [1, {head.in_features}]; train the head again with num_labels=1"
        )
