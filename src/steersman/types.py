"""The nouns that cross folders.

Conventions that hold everywhere:

- Per-step tensors are `[batch, time]`, time last, left-aligned: row b's step t stands in column t.
- `mask` has one polarity: True means "this step counts".
- `discount` is gamma * (1 - terminated): 0 after a step that ended its episode, so a length cut
  (truncation) bootstraps and an end of sequence does not.
- Log-probabilities are in nats.
- Ends are known by length, never by token id, so a tokenizer whose pad is its eos is harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Finish = Literal["eos", "stop", "length"]
Progress = Callable[[int, int, int], None]
"""Called while something samples, with (finished samples, all samples, tokens so far)."""


@dataclass(slots=True)
class Prompt:
    """One question to the policy.

    `ids` carry no padding; `text` is what they decode from, as the model sees it; `row` keeps the other
    columns of the data row for rewards that need them; `index` is the row's stable place in its data set and
    names its random stream. `turns` are the turns that it was laid out from, for environments that begin with them.
    """

    ids: list[int]
    text: str
    row: dict[str, Any] = field(default_factory=dict)
    index: int = 0
    turns: Any = None


@dataclass(slots=True, frozen=True)
class Turn:
    """One turn of an episode: the policy said `ids[begin:end]` of its Sample, for which the environment paid `reward`
    and answered `observation`. `reply` is what it said as text."""

    begin: int
    end: int
    reward: float
    reply: str = ""
    observation: str = ""


@dataclass(slots=True, frozen=True)
class Segment:
    """`ids[begin:end]` of a Sample were sampled with the ids `prompt` as context, not with `ids[:begin]`: the chat
    template rewrote the history before them."""

    prompt: list[int]
    begin: int
    end: int


@dataclass(slots=True)
class Sample:
    """One response to one prompt, as the rollout engine made it.

    `ids` are the sampled tokens, the end token included when it was sampled. `logp[t]` is the log-probability (nats)
    of `ids[t]` under the distribution that it was drawn from: after temperature and after whatever top-k, top-p,
    min-p or minimum length cut away. `support` lists, per token, the ids that were allowed, or those that were not,
    each written as ~id, where these are fewer (None: all were). `finish` says why it ended: "eos" and "stop"
    terminate, "length" truncates. `index` counts the samples of one prompt. `text` is the response without end token
    or stop string. `mask` marks the tokens that count (None: all); what an environment wrote does not. `version` is
    that of the weights that each token was sampled from (None where nobody counts them). An episode of several turns
    lists them in `turns`; its `text` is the last thing that the policy said, and `outcome` says why it ended. An
    episode whose history the chat template rewrote lists its `segments`: a model reads each by itself (None: all of
    `ids` follow the prompt). `opening` and `talk` are an episode as messages, for records: what it began with, and
    all that was said since. `onward` is the context of the turn that a limit cut off, all ids before it, where the
    critic's bootstrap value is taken (None: the episode ended, its environment gave no answer, or no reply fits into
    the context).
    """

    prompt: Prompt
    ids: list[int]
    logp: list[float]
    finish: Finish
    text: str = ""
    index: int = 0
    support: list[Tensor] | None = None
    mask: list[bool] | None = None
    version: list[int] | None = None
    turns: list[Turn] | None = None
    outcome: str = ""
    segments: list[Segment] | None = None
    opening: Any = None
    talk: Any = None
    onward: list[int] | None = None

    @property
    def terminated(self) -> bool:
        return self.finish != "length"

    @property
    def counts(self) -> bool:
        """Whether any of its tokens does; of an episode that could not begin none does."""
        return self.mask is None or any(self.mask)


@dataclass(slots=True)
class Tokens:
    """Prompts with responses as a policy reads them; the one input of every model role.

    A causal model joins each prompt with its response; an encoder-decoder gives the prompt to its encoder.
    Both are right-padded; what stands in the padding is never read (a test perturbs it). A model lays them out on the
    CPU and sends to its own device what it reads, so a batch is best kept on the CPU. `mask` marks the
    response tokens that count in losses and may have holes (a user's turn between two assistant turns);
    `response_length` is the structural end, so `mask` is False at and after it.

    `prompt` [B, P], `prompt_length` [B], `response` [B, T], `response_length` [B], `mask` [B, T].
    """

    prompt: Int[Tensor, "B P"]
    prompt_length: Int[Tensor, " B"]
    response: Int[Tensor, "B T"]
    response_length: Int[Tensor, " B"]
    mask: Bool[Tensor, "B T"]
    support: list[list[Tensor]] | None = None

    @classmethod
    def from_ids(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        masks: Sequence[Sequence[bool]] | None = None,
        support: list[list[Tensor]] | None = None,
    ) -> Tokens:
        """Right-padded from lists; without `masks` every response token counts. Padding holds id 0, never read."""
        response_length = torch.tensor([len(r) for r in responses])
        if masks is None:
            mask = torch.arange(max(int(response_length.max()), 1)) < response_length[:, None]
        else:
            mask = _pad(masks, torch.bool)
        return cls(
            _pad(prompts, torch.long),
            torch.tensor([len(p) for p in prompts]),
            _pad(responses, torch.long),
            response_length,
            mask,
            support,
        )

    @property
    def length(self) -> Int[Tensor, " B"]:
        """Tokens of prompt and response together."""
        return self.prompt_length + self.response_length

    def __len__(self) -> int:
        return self.response.shape[0]

    def untruncated(self) -> Tokens:
        """The same tokens without their support: as a model reads them whose whole distribution counts."""
        return replace(self, support=None)

    def rows(self, index: Tensor) -> Tokens:
        """The given rows, in the given order, with the padding that they no longer need cut off."""
        prompt_length, response_length = self.prompt_length[index], self.response_length[index]
        P, T = int(prompt_length.max()), max(int(response_length.max()), 1)
        return Tokens(
            self.prompt[index, :P],
            prompt_length,
            self.response[index, :T],
            response_length,
            self.mask[index, :T],
            None if self.support is None else [self.support[i] for i in index.tolist()],
        )

    def to(self, device: torch.device | str) -> Tokens:
        return _sent(self, device)


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on the device. What goes from the CPU to an accelerator does not wait for the work that it has still to do;
    what comes back waits, so that it is there."""
    return x.to(device, non_blocking=x.is_cpu)


Held = TypeVar("Held", "Tokens", "Trajectory")


def _sent(held: Held, device: torch.device | str) -> Held:
    moved = {f.name: x for f in fields(held) if isinstance(x := getattr(held, f.name), Tensor)}
    return replace(held, **{name: send(x, device) for name, x in moved.items()})


def _pad(rows: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    out = torch.zeros(len(rows), max(max(map(len, rows)), 1), dtype=dtype)
    for b, row in enumerate(rows):
        out[b, : len(row)] = torch.tensor(row, dtype=dtype)
    return out


@dataclass(slots=True)
class Trajectory:
    """Experience, whether it came from CartPole, a table or a language model. One row is one episode.

    `value[:, t]` is V of the state before step t, so it has one column more than there are steps: the column
    at a row's length is V of the state after its last step, which a truncated episode bootstraps from.
    `logp_old` is the behaviour log-probability, `logp_ref` the reference's. `group` numbers the prompt that a
    row answers. `baseline` is the score that a row is compared with (ReMax: the greedy response to the same
    prompt; a moving mean; A*-PO: the prompt's optimal value). `logp_rollout` is what another engine recorded, where
    rollouts were made elsewhere.
    `score` is what a row earned without any KL penalty, and `paid` the same step by step, where `turn` is there;
    `judged` is what the rewards gave before any shaping. `parts` are the rewards that it was added up from, each with
    its weight. `penalty_mask` are steps on which a method's loss adds its penalty (KL-Cov). `turn` numbers the
    turns of episodes whose baselines are to be taken turn by turn (`advantage/by_turn.py`). `weight` is what
    a row's loss counts, where its prompt was not drawn like all others.
    """

    mask: Bool[Tensor, "B T"]
    reward: Float[Tensor, "B T"]
    discount: Float[Tensor, "B T"]
    logp_old: Float[Tensor, "B T"]
    logp_ref: Float[Tensor, "B T"] | None = None
    value: Float[Tensor, "B T+1"] | None = None
    group: Int[Tensor, " B"] | None = None
    baseline: Float[Tensor, " B"] | None = None
    logp_rollout: Float[Tensor, "B T"] | None = None
    score: Float[Tensor, " B"] | None = None
    parts: Float[Tensor, "B K 2"] | None = None
    penalty_mask: Bool[Tensor, "B T"] | None = None
    turn: Int[Tensor, "B T"] | None = None
    weight: Float[Tensor, " B"] | None = None
    paid: Float[Tensor, "B T"] | None = None
    judged: Float[Tensor, " B"] | None = None

    def __len__(self) -> int:
        return self.mask.shape[0]

    def rows(self, index: Tensor) -> Trajectory:
        """The given rows, in the given order, with the columns that none of them needs cut off."""
        counts = self.mask[index].any(0).nonzero()
        T = int(counts[-1]) + 1 if len(counts) else 1
        picked = {f.name: x[index] for f in fields(self) if (x := getattr(self, f.name)) is not None}
        for name, x in picked.items():
            if x.ndim == 2:
                picked[name] = x[:, : T + 1] if name == "value" else x[:, :T]
        return replace(self, **picked)

    def to(self, device: torch.device | str) -> Trajectory:
        return _sent(self, device)


def missing(value: Any) -> str:
    """What is wrong with a row's value where one is needed, as a clause; "" where nothing is."""
    return "it is missing" if value is None else ""


@dataclass(slots=True, frozen=True)
class Need:
    """A column of the data of which every row must have a value: `who` needs it, and `wrong` says what is wrong with
    a value, "" where nothing is."""

    column: str
    who: str
    wrong: Callable[[Any], str] = missing


Needs = Callable[[Sequence[Mapping[str, Any]]], list[Need]]
"""What something needs of rows; it raises SteersmanError where none of them has a column that it needs."""


Stats = dict[str, float]
"""Scalars of one step by name, such as `{"loss/policy": 0.01, "kl": 1.3}`; what `metrics.jsonl` holds."""


class SteersmanError(Exception):
    """What a user can mend: bad data, a bad recipe, a model that does not fit. Printed without a traceback."""
