"""What may be sampled and how one uniform number picks a token.

Everything is row by row: a row's token depends on its own logits and its own uniform number only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.native import decode as native
from steersman.ops.distributions import LEAST_TEMPERATURE, min_p_mask, top_k_mask, top_p_mask
from steersman.types import SteersmanError

BLOCK = 256
"""Vocabularies above four blocks are searched in two levels, so that only one block is summed up token by token."""


@dataclass(frozen=True, eq=False)
class ActionLimit:
    """Only what lies in another model's nucleus may be sampled: its likeliest tokens of mass `top_p`, at least
    `min_tokens` of them; end tokens always may. `model` has the policy's vocabulary.

    Source: NLPO, arXiv 2210.01241, section 4. Raises SteersmanError for values out of range.
    """

    model: Any
    top_p: float
    min_tokens: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise SteersmanError(f"rollout: the mask's top_p is {self.top_p}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn and when a response ends.

    Logits are divided by `temperature` (0: greedy; else at least LEAST_TEMPERATURE), then cut by `top_k` (0: off),
    `top_p` (1: off) and `min_p` (0: off), in that order, each on what the one before left. Before any of it the end
    tokens are banned while a response has fewer than `min_new_tokens` tokens. A response ends with an end token,
    with one of the `stop` strings, or after `max_new_tokens` tokens. `limit` cuts first of all.
    Raises SteersmanError for values out of range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    limit: ActionLimit | None = None

    def __post_init__(self) -> None:
        stop_ok = isinstance(self.stop, tuple | list) and all(isinstance(s, str) and s for s in self.stop)
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (
                self.greedy or LEAST_TEMPERATURE <= self.temperature < float("inf"),
                f"0 (greedy) or at least {LEAST_TEMPERATURE}",
            ),
            "top_k": (self.top_k >= 0, "0 (off) or above"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "min_p": (0 <= self.min_p <= 1, "between 0 (off) and 1"),
            "min_new_tokens": (
                0 <= self.min_new_tokens <= self.max_new_tokens,
                f"between 0 and max_new_tokens ({self.max_new_tokens})",
            ),
            "stop": (stop_ok, "a list of strings, none empty"),
        }
        for name, (ok, wanted) in ranges.items():
            if not ok:
                raise SteersmanError(f"sampling.{name} is {getattr(self, name)!r}; it must be {wanted}")
        object.__setattr__(self, "stop", tuple(self.stop))

    @property
    def truncates(self) -> bool:
        """Whether top-k, top-p or min-p cut tokens away."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def as_greedy(self) -> Sampling:
        """The same ends, but the most likely token each time."""
        return replace(self, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)


def uniforms(seed: int | Sequence[int], prompt: int, occurrence: int, sample: int, count: int) -> np.ndarray:
    """`count` float32 numbers in [0, 1) that depend on nothing but the arguments.

    A counter-based generator (Philox) is keyed by a hash of them, so every sequence has a stream of its own and
    the first numbers do not depend on `count`.
    """
    words = (seed,) if isinstance(seed, int) else tuple(seed)
    name = repr((tuple(int(w) for w in words), int(prompt), int(occurrence), int(sample))).encode()
    key = np.frombuffer(hashlib.blake2b(name, digest_size=16).digest(), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count, dtype=np.float32)


def restrict(
    logits: Tensor,
    sampling: Sampling,
    banned: Tensor | None = None,
    end_ids: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """The logits [B, V] actually sampled from: float32, tempered, minus infinity where a token is not allowed.

    `end_ids` are banned in the rows that `banned` [B] marks; `allowed` [B, V] is an action mask from outside,
    applied before the tempering. The result may share memory with `logits`.
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    if banned is not None and end_ids is not None:
        x = x.index_copy(-1, end_ids, x[:, end_ids].masked_fill(banned[:, None], -torch.inf))
    if allowed is not None:
        x = x.masked_fill(~allowed, -torch.inf)
    if sampling.greedy:
        return x
    if sampling.temperature != 1:
        x = x / sampling.temperature
    if sampling.top_k > 0:
        x = x.masked_fill(~top_k_mask(x, sampling.top_k), -torch.inf)
    if sampling.top_p < 1:
        x = x.masked_fill(~top_p_mask(x, sampling.top_p), -torch.inf)
    if sampling.min_p > 0:
        x = x.masked_fill(~min_p_mask(x, sampling.min_p), -torch.inf)
    return x


def draw(x: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token ids [B] and their log-probabilities [B] (nats) under softmax(x), x [B, V].

    Inverse transform: the first token whose cumulative probability exceeds `uniform` [B] in [0, 1). A token of
    probability 0 is never returned, whatever rounding does. Without `uniform`: the most likely token (the
    first of equals).
    """
    if uniform is not None and native.draws(x, uniform):
        return native.draw(x, uniform)
    top = x.amax(-1, keepdim=True)
    blocked = x.shape[-1] > 4 * BLOCK
    width = -(-x.shape[-1] // BLOCK) * BLOCK if blocked else x.shape[-1]
    weight = x.new_zeros(x.shape[0], width) if width > x.shape[-1] else torch.empty_like(x)
    torch.sub(x, top, out=weight[:, : x.shape[-1]])
    weight[:, : x.shape[-1]].exp_()
    if not blocked:
        cumulative = weight.cumsum(-1)
        total = cumulative[:, -1:]
        ids = _search(cumulative, uniform[:, None] * total) if uniform is not None else None
    else:
        blocks = weight.view(x.shape[0], -1, BLOCK)
        mass = blocks.sum(-1)
        cumulative = mass.cumsum(-1)
        total = cumulative[:, -1:]
        ids = _search_blocks(blocks, mass, cumulative, uniform[:, None] * total) if uniform is not None else None
    if ids is None:
        ids = x.argmax(-1, keepdim=True)
    elif not x.is_cpu:
        # a parallel scan, unlike the CPU's, need not be monotone to the last bit: a weight of 0 could be hit
        ids = torch.where(weight.gather(-1, ids) > 0, ids, x.argmax(-1, keepdim=True))
    logp = x.gather(-1, ids) - top - total.log()
    return ids.squeeze(-1), logp.squeeze(-1)


def listed_support(allowed: Tensor) -> list[Tensor]:
    """Of each row of a mask [B, V] the ids that it allows, or ~id of those that it does not where these are fewer:
    a vocabulary has up to 250,000 ids, and all but a few of them may be allowed at every token."""
    count = allowed.sum(-1)
    most = count > allowed.shape[-1] // 2
    row, ids = (allowed ^ most[:, None]).nonzero(as_tuple=True)
    listed = torch.where(most[row], ~ids, ids).cpu()
    return list(listed.split(torch.where(most, allowed.shape[-1] - count, count).tolist()))


def banned_support(padding: Tensor, end_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The supports of tokens at which only these are banned: padding alone, and end tokens too."""
    return ~padding.cpu(), ~torch.cat([padding, end_ids]).unique().cpu()


def _search(cumulative: Tensor, target: Tensor) -> Tensor:
    """First column of each row whose cumulative weight exceeds the target; the target is kept below the total."""
    total = cumulative[:, -1:]
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[-1] - 1)


def _search_blocks(blocks: Tensor, mass: Tensor, cumulative: Tensor, target: Tensor) -> Tensor:
    block = _search(cumulative, target)
    before = cumulative.gather(-1, block) - mass.gather(-1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK)).squeeze(1)
    return block * BLOCK + _search(inside.cumsum(-1), (target - before).clamp_(min=0))
