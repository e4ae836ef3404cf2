"""Divergences between two models' whole distributions, straight from hidden states, some rows at a time.

With p the teacher's distribution at a position and q the student's:

| kind | D | leads a student that is too small |
| --- | --- | --- |
| forward_kl | KL(p || q) | to cover all that the teacher says |
| reverse_kl | KL(q || p) | to say only what the teacher would say |
| jsd | b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q | between the two; b -> 0 and 1 are the KLs, scaled |
| skew_kl | KL(p || a p + (1 - a) q) | as forward_kl, with bounded gradients |
| skew_reverse_kl | KL(q || (1 - a) p + a q) | as reverse_kl, with bounded gradients |

`mix` is b in [0, 1] of jsd and a of the skewed ones. Sources: jsd, arXiv 2306.13649, eq. 1; skewed, arXiv 2402.03898,
eq. 3 and 5.

The logits of both models exist for some rows at a time, never for all N: the backward pass makes each tile again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from steersman.ops.logprob import Gradient, Head, Tiles

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)

TILE = {"cpu": 8 << 20, "accelerator": 256 << 20}
"""Bytes of one tile of logits, rows x vocabulary; about six of them live at once."""
NEGLIGIBLE_GRADIENT = 1e-30
"""Gradients up to this size become 0: denormal numbers make a CPU's products many times slower."""
MIN_UNLISTED_LOGP = -30.0
"""The least log-probability of all that a teacher did not list, where a student has nothing left there."""


@dataclass(frozen=True, slots=True)
class TeacherStates:
    """A teacher's distributions at N positions, as the states and the output layer that they come from."""

    hidden: Float[Tensor, "N H"]
    head: Head
    rest: ClassVar[None] = None
    """Nothing is left out."""

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def width(self) -> int:
        """How many tokens it has logits of."""
        return self.head.weight.shape[0]

    def tiles(self, width: int, temperature: float, chunk: int) -> Tiles:
        """Its logits of the first `width` tokens, some rows at a time."""
        return Tiles(self.hidden, _narrowed(self.head, width), temperature, chunk=chunk, block=width)


@dataclass(frozen=True, slots=True)
class TeacherTopK:
    """A teacher's K likeliest tokens at N positions with their log-probabilities (nats); all others are one outcome.

    What is compared then are distributions over K + 1 outcomes. For every divergence here that is a lower bound of
    the whole one, and for the KLs the error is known: with P (or Q) the mass that the teacher (the student) gives to
    what is not listed, it is P KL(p_rest || q_rest) for KL(p || q), and Q KL(q_rest || p_rest) for KL(q || p).
    """

    ids: Int[Tensor, "N K"]
    logp: Float[Tensor, "N K"]
    width: ClassVar[None] = None
    """It lists tokens, and has no logits."""

    def __len__(self) -> int:
        return len(self.ids)

    def tiles(self, width: int, temperature: float, chunk: int) -> None:
        """It has no logits."""

    def rows(self, index: slice) -> TeacherTopK:
        return TeacherTopK(self.ids[index], self.logp[index])

    @property
    def rest(self) -> Float[Tensor, " N"]:
        """The mass that the teacher gives to tokens that are not listed, at least the rounding of 1."""
        return (1 - self.logp.exp().sum(-1)).clamp(min=torch.finfo(self.logp.dtype).eps)


def linear_divergence(
    hidden: Float[Tensor, "N H"],
    head: Head,
    teacher: TeacherStates | TeacherTopK,
    kind: Divergence,
    *,
    mix: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    tail: bool = True,
    chunk: int | None = None,
) -> Float[Tensor, " N"]:
    """D(teacher, student) in nats at every position, differentiable once in the student's states and output layer.

    Both distributions are softmax(z / temperature). Where the output layers differ in width (rows that only pad a
    vocabulary), both are taken over the ids that both have. `chunk` is how many rows' logits live at once, by
    default what fits TILE. Nothing flows to the teacher.

    With `top_k`, for a teacher that has logits, the student's k likeliest tokens are compared: with `tail` all others
    are one outcome more on both sides, a lower bound of the whole divergence; without, both distributions are taken
    given one of the k, and what either gives to the others teaches nothing. Which tokens are the k carries no
    gradient. Source: arXiv 2601.20802, whose program has both (k 100, with the tail).

    Raises ValueError for a `mix` outside [0, 1], a temperature that is not above 0, a `top_k` below 1 or beside a
    teacher that lists tokens itself, or a teacher of another length.
    """
    if not 0 <= mix <= 1 or not temperature > 0:
        raise ValueError(f"mix {mix} must lie in [0, 1] and temperature {temperature} above 0")
    if len(teacher) != len(hidden):
        raise ValueError(f"the teacher has distributions for {len(teacher)} positions and there are {len(hidden)}")
    if top_k is not None and (top_k < 1 or teacher.width is None):
        raise ValueError(f"top_k {top_k} must be at least 1, and the teacher have logits of all tokens")
    own = head.weight.shape[0]
    head = _narrowed(head, min(own, teacher.width or own))
    top_k = None if top_k is None else min(top_k, head.weight.shape[0])
    form = (head, teacher, kind, mix, temperature, chunk, top_k, tail)
    return _LinearDivergence.apply(hidden, head.weight, head.bias, form)  # type: ignore[return-value]


def terms(kind: Divergence, log_p: Tensor, log_q: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    """What each outcome adds to D, and q dD/dq of each (up to a multiple of q, which a softmax does not feel)."""
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        return p * (log_p - log_q), -p
    if kind == "reverse_kl":
        pull = q * (log_q - log_p)
        return pull, pull
    if kind == "jsd":
        log_m = _mixed(log_p, log_q, mix)
        pull = (1 - mix) * q * (log_q - log_m)
        return mix * p * (log_p - log_m) + pull, pull
    if kind == "skew_kl":
        log_m = _mixed(log_p, log_q, mix)
        return p * (log_p - log_m), -(1 - mix) * (log_p + log_q - log_m).exp()
    log_m = _mixed(log_p, log_q, 1 - mix)
    value = q * (log_q - log_m)
    return value, value - mix * q * (log_q - log_m).exp()


def _mixed(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    if share in (0.0, 1.0):
        return log_p if share else log_q
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def _narrowed(head: Head, width: int) -> Head:
    if head.weight.shape[0] == width:
        return head
    bias = None if head.bias is None else head.bias[:width]
    return Head(head.weight[:width], bias, head.logit_scale, head.softcap)


def sorted_distance(
    hidden: Float[Tensor, "N H"],
    head: Head,
    teacher: TeacherStates,
    *,
    temperature: float = 1.0,
    chunk: int = 64,
) -> Float[Tensor, " N"]:
    """How far two distributions over different vocabularies are apart when only their probabilities count.

        D = sum_i |p_(i) - q_(i)|,    p_(1) >= p_(2) >= ..., the shorter one continued by zeros

    It is the Wasserstein distance where moving mass between any two tokens costs the same; differentiable in the
    student. 0 means equal probabilities in order, not equal tokens.

    Source: arXiv 2402.12030, section 3.3 (universal logit distillation).
    """

    def part(h: Tensor, taught: Tensor) -> Tensor:
        q = head.log_softmax(h, temperature).exp().sort(-1, descending=True).values
        with torch.no_grad():
            p = teacher.head.log_softmax(taught, temperature).exp().sort(-1, descending=True).values.to(q)
        wide = max(p.shape[1], q.shape[1])
        p, q = (torch.nn.functional.pad(x, (0, wide - x.shape[1])) for x in (p, q))
        return (p - q).abs().sum(-1)

    pieces = zip(hidden.split(chunk), teacher.hidden.split(chunk), strict=True)
    return torch.cat([checkpoint(part, a, b, use_reentrant=False) for a, b in pieces])


class _Outcomes(NamedTuple):
    """log p and log q of what is compared at some rows, log q of all tokens, which tokens the outcomes are (None: all
    of them; with a tail, the last outcome is all the others), and d cap(x) / dx where the layer caps."""

    log_p: Tensor
    log_q: Tensor
    log_all: Tensor
    ids: Tensor | None
    slope: Tensor | None


class _Rows:
    """Both distributions over the outcomes that are compared, for rows [a, b)."""

    def __init__(self, hidden: Tensor, form: tuple, dtype: torch.dtype | None = None) -> None:
        head, self.teacher, self.kind, self.mix, temperature, chunk, self.top_k, self.tail = form
        width = head.weight.shape[0]
        exact = 8 if torch.float64 in (dtype, hidden.dtype) else 4
        size = TILE["cpu" if hidden.device.type == "cpu" else "accelerator"]
        chunk = min(chunk or max(1, size // (exact * width)), max(len(hidden), 1))
        self.width = width
        self.student = Tiles(hidden, head, temperature, chunk=chunk, block=width, dtype=dtype)
        self.taught = self.teacher.tiles(width, temperature, chunk)

    def outcomes(self, a: int, b: int) -> _Outcomes:
        logits, slope = self.student.logits(a, b, 0, self.width)
        log_q = torch.log_softmax(logits, -1)
        if self.taught is None:
            listed = self.teacher.rows(slice(a, b))
            log_p = torch.cat([listed.logp, listed.rest.log()[:, None]], -1).to(log_q.dtype)
            return _Outcomes(log_p, _with_tail(log_q, listed.ids), log_q, listed.ids, slope)
        log_p = torch.log_softmax(self.taught.logits(a, b, 0, self.width)[0], -1).to(log_q)
        if self.top_k is None:
            return _Outcomes(log_p, log_q, log_q, None, slope)
        ids = log_q.topk(self.top_k, sorted=False).indices
        if self.tail:
            return _Outcomes(_with_tail(log_p, ids), _with_tail(log_q, ids), log_q, ids, slope)
        given_p, given_q = (torch.log_softmax(x.gather(1, ids), -1) for x in (log_p, log_q))
        return _Outcomes(given_p, given_q, log_q, ids, slope)

    def per_token(self, found: _Outcomes) -> Tensor:
        """dD/dz of every token's logit z, from q dD/dq of its outcome: with a tail, the last outcome's is shared out
        by what q gives each token."""
        pull = terms(self.kind, found.log_p, found.log_q, self.mix)[1]
        total = pull.sum(-1, keepdim=True)
        if found.ids is None:
            return pull - found.log_all.exp() * total
        if not self.tail:
            own = pull - found.log_q.exp() * total
            return torch.zeros_like(found.log_all).scatter_(1, found.ids, own)
        shared = (found.log_all - found.log_q[:, -1:]).exp() * pull[:, -1:]
        return shared.scatter_(1, found.ids, pull[:, :-1]) - found.log_all.exp() * total


def _with_tail(logp: Tensor, ids: Tensor) -> Tensor:
    """log-probabilities of the listed tokens, and of all others together."""
    others = logp.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True).clamp(min=MIN_UNLISTED_LOGP)
    return torch.cat([logp.gather(1, ids), others], -1)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    @torch.no_grad()
    def forward(ctx, hidden, weight, bias, form):
        rows = _Rows(hidden, form)
        value = hidden.new_empty(len(hidden), dtype=rows.student.exact)
        for a, b in rows.student.rows():
            found = rows.outcomes(a, b)
            value[a:b] = terms(rows.kind, found.log_p, found.log_q, rows.mix)[0].sum(-1)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.form, ctx.dtype = form, rows.student.dtype  # the dtype as under the forward pass's autocast
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden = ctx.saved_tensors[0]
        rows = _Rows(hidden, ctx.form, ctx.dtype)
        gradient = Gradient(rows.student, ctx.needs_input_grad)
        for a, b in rows.student.rows():
            found = rows.outcomes(a, b)
            du = rows.per_token(found) * upstream[a:b, None]
            gradient.add(torch.nn.functional.hardshrink(du, NEGLIGIBLE_GRADIENT), found.slope, a, b, 0, rows.width)
            gradient.finish_rows(a, b)
        return *gradient.result(), None
