"""The frozen model that a policy is measured against."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steersman.data import Encoded, TrainingSet, collate
from steersman.distributed.micro import in_order, my_micro_batches
from steersman.distributed.ranks import ranks
from steersman.model import Logp, Policy, ScalarModel, at_hand, frozen_copy
from steersman.ops.logprob import Head
from steersman.ops.masked import beyond, masked_sum
from steersman.recipe.sections import ModelConfig
from steersman.run.files.pieces import Pieces
from steersman.run.progress import ProgressLine
from steersman.run.run_config import RunConfig
from steersman.setup.models import policy_from
from steersman.types import Progress, SteersmanError, Tokens, send


class AdaptersOff:
    """The reference of a policy whose adapters are new: the same module with them off, so no second copy of the
    weights."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.policy.parameters()

    @property
    def separate(self) -> None:
        """It has no weights of its own."""
        return None

    def head(self) -> Head:
        with self.policy.reference() as frozen:
            return frozen.head()

    def hidden(self, tokens: Tokens) -> Float[Tensor, "N H"]:
        with self.policy.reference() as frozen:
            return frozen.hidden(tokens)

    def logp(self, tokens: Tokens, *, temperature: float = 1.0) -> Logp:
        with self.policy.reference() as frozen:
            return frozen.logp(tokens, temperature=temperature)

    def logp_from(self, tokens: Tokens, hidden: Float[Tensor, "N H"], *, temperature: float = 1.0) -> Logp:
        with self.policy.reference() as frozen:
            return frozen.logp_from(tokens, hidden, temperature=temperature)


Reference = Policy | AdaptersOff


def reference_from(
    path: str, config: ModelConfig, run: RunConfig, policy: Policy, *, apart: torch.device | None = None
) -> Reference:
    """`path` is "start", the policy before training, or a folder. Weights of its own go to the policy's device, laid
    as the policy's are, or whole to a device `apart`. The start of new adapters is the model below them; of
    saved ones a copy of these on the same base, or where that can not be shared (in pieces, `apart`) a second policy.

    Raises SteersmanError where a folder's model reads other token ids than the policy.
    """
    if path == "start" and policy.has_adapters:
        if not policy.starts_adapted:
            return AdaptersOff(policy)
        if apart is None and not ranks().sharded:
            return frozen_copy(policy)
    folder = config.path if path == "start" else path
    there, alike = policy.device if apart is None else apart, config.model_copy(update={"path": folder})
    reference = policy_from(alike, run, there, trainable=False, whole=apart is not None)
    same_tokens("reference", folder, reference, policy)
    return reference


def same_tokens(key: str, path: str, model: Policy | ScalarModel, policy: Policy) -> None:
    """Raises SteersmanError where a model that reads the policy's own ids has another vocabulary."""
    if model.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise SteersmanError(
            f"{key}: the tokenizer of {path} ({len(model.tokenizer)} tokens) is not the policy's "
            f"({len(policy.tokenizer)} tokens), but it reads the policy's token ids; use a model of the same family"
        )


def _say_nothing(_done: int, _total: int, _tokens: int) -> None:
    """Most answers are few."""


@torch.no_grad()
def answer_logp(
    model: Reference,
    rows: Sequence[Encoded],
    micro_tokens: int,
    progress: Progress = _say_nothing,
    *,
    after: Sequence[int] | None = None,
) -> Float[Tensor, "N ..."]:
    """log pi of whole answers, over the tokens that count (nats), on the CPU. With `after`, `[N, 2]`: beside it that
    of each answer's tokens after so many that count. A model that waits elsewhere comes for as long as that takes.
    `progress` is told how many micro-batches are done, of how many."""
    found = []
    parts = my_micro_batches(torch.tensor([len(e) for e in rows]), micro_tokens)
    with at_hand(model.separate):
        for i, part in enumerate(parts):
            tokens = collate([rows[i] for i in part.rows.tolist()])
            logp = model.logp(tokens).logp.cpu()
            sums = _sums(logp, tokens.mask, None if after is None else [after[i] for i in part.rows.tolist()])
            if part.counts:
                found.append((part.rows, sums))
            progress(i + 1, len(parts), 0)
    return in_order(found)


def _sums(logp: Tensor, mask: Tensor, after: Sequence[int] | None) -> Float[Tensor, "B ..."]:
    """The sum of each row where it counts; with `after`, `[B, 2]`, also where it counts after so many tokens."""
    whole = masked_sum(logp, mask, -1)
    if after is None:
        return whole
    tail = beyond(mask, send(torch.tensor(after), mask.device))
    return torch.stack([whole, masked_sum(logp, tail, -1)], -1)


def shared_lengths(groups: Sequence[Sequence[Encoded]]) -> list[int]:
    """Of each answer of each group how many tokens count in all answers of the group."""
    return [min(sum(e.mask) for e in group) for group in groups for _ in group]


ROWS = 1024
"""Rows for each rank that are read and kept together: little is lost with them, and micro-batches are full."""


@dataclass(slots=True)
class Readings:
    """What frozen models say of given answers, read once: the weighted sum of their log pi, in nats, over the tokens
    that count; with `tails` beside it the part of it beyond the length that all answers of a group share. `first` is
    how many answers of a group are read; None is all."""

    models: Sequence[tuple[Reference, float]]
    micro_tokens: int
    folder: Path | None = None
    about: dict[str, Any] = field(default_factory=dict)
    tails: bool = False
    first: int | None = None

    def keep_in(self, folder: Path, **about: Any) -> None:
        """Has what is read kept in a folder as it comes, from which a run that goes on takes it, where the answers
        and `about`, which names the models, are still the same."""
        self.folder, self.about = folder, about

    def of_data(
        self, train: TrainingSet[Any], held_out: TrainingSet[Any] | None, rows: Sequence[int]
    ) -> dict[int, Tensor]:
        """`of` the training rows `rows` and all held-out ones, by the set's `id`; sets that are streamed
        are left out."""
        found = {}
        for name, data in (("train", train), ("held_out", held_out)):
            if data is not None and data.in_memory:
                found[id(data)] = self.of(name, data.groups, rows if data is train else range(len(data.groups)))
        return found

    def of(self, name: str, groups: Sequence[Sequence[Encoded]], rows: Sequence[int]) -> Float[Tensor, "N K ..."]:
        """Of the groups `rows`, of which K answers are read, `[N, K]`, with tails `[N, K, 2]`; NaN for the other
        groups. `name` tells sets of groups apart."""
        groups = [group[: self.first] for group in groups]
        shape = (len(groups[0]), *((2,) if self.tails else ()))
        told = torch.full((len(groups), *shape), torch.nan, dtype=self._dtype())

        def read(span: range, progress: Progress) -> list[dict[str, Any]]:
            asked = [groups[i] for i in rows[span.start : span.stop]]
            answers = [e for group in asked for e in group]
            after = shared_lengths(asked) if self.tails else None
            found = [
                share * answer_logp(model, answers, self.micro_tokens, progress, after=after)
                for model, share in self.models
            ]
            return [{"logp": row} for row in torch.stack(found).sum(0).view(len(span), *shape).tolist()]

        line = ProgressLine("log-probabilities of the data")
        if self.folder is None:
            kept = read(range(len(rows)), line) if rows else []
        else:
            about = {**self.about, "answers": _digest(groups, rows), **({"tails": True} if self.tails else {})}
            pieces = Pieces(self.folder / name, len(rows), about)
            pieces.begin()
            kept = pieces.fill(ROWS * ranks().world, read, line)
        if rows:
            told[list(rows)] = torch.tensor([row["logp"] for row in kept], dtype=told.dtype)
        return told

    def _dtype(self) -> torch.dtype:
        """Log-probabilities are float32, of models in float64 float64."""
        weights = {p.dtype for model, _ in self.models for p in model.parameters()}
        return torch.float64 if torch.float64 in weights else torch.float32


def _digest(groups: Sequence[Sequence[Encoded]], rows: Sequence[int]) -> str:
    """The SHA-256 of the answers of some groups, with their prompts and what counts of them."""
    digest = hashlib.sha256()
    for i in rows:
        for e in groups[i]:
            for values in ([len(e.prompt), len(e.response)], e.prompt, e.response, e.mask):
                digest.update(np.asarray(values, dtype=np.int64).tobytes())
    return digest.hexdigest()


@torch.no_grad()
def answer_logp_now(
    models: Sequence[tuple[Reference, float]], tokens: Tokens, *, after: Sequence[int] | None = None
) -> Float[Tensor, "B ..."]:
    """The weighted sum of several models' log pi of a batch's answers, over the tokens that count (nats); `after` as
    in `answer_logp`."""
    found = [share * model.logp(tokens).logp for model, share in models]
    return _sums(torch.stack(found).sum(0), send(tokens.mask, found[0].device), after)


def divergence(hidden_p: Tensor, head_p: Head, hidden: Tensor, head: Head, rows: int = 256) -> Float[Tensor, " N"]:
    """KL(p || q) (nats) at each position, q from `hidden` and `head`; `rows` positions' logits live at once."""

    def part(h_p: Tensor, h: Tensor) -> Tensor:
        logp = head_p.log_softmax(h_p)
        return (logp.exp() * (logp - head.log_softmax(h))).sum(-1)

    pieces = zip(hidden_p.split(rows), hidden.split(rows), strict=True)
    return torch.cat([checkpoint(part, a, b, use_reentrant=False) for a, b in pieces])


@torch.no_grad()
def collision(hidden: Tensor, head: Head, rows: int = 256) -> Float[Tensor, " N"]:
    """log sum_v p(v)^2 at each position: of two draws, the log-probability that they are the same token."""
    return torch.cat([(2 * head.log_softmax(part)).logsumexp(-1) for part in hidden.split(rows)])
