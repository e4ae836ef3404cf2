"""Log-probabilities straight from hidden states: output layer and log-softmax in one, tile by tile.

Logits of N tokens over V words are the largest tensor in training a language model. Here they exist only as
tiles of a few megabytes, rows [a, b) by vocabulary block [v, w): the forward pass folds each tile into a
running logsumexp, and the backward pass makes each tile again from the hidden states and uses it up at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from steersman.ops.products import add_product, faster, linear
from steersman.types import send

FORBIDDEN = -1e30
"""Logit of a token outside the support: exp gives exactly 0, and 0 * FORBIDDEN is 0 where 0 * -inf is NaN."""

TILE = {"cpu": (512, 4 << 20), "accelerator": (4096, 256 << 20)}
"""Rows and bytes of a tile: what stays in a CPU's cache, or keeps an accelerator busy."""


@dataclass(frozen=True, slots=True)
class Head:
    """The output layer of a model: z = cap(logit_scale * (h W^T + b)), cap(x) = softcap * tanh(x / softcap)."""

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "*lead H"]) -> Float[Tensor, "*lead V"]:
        """All logits in float32 (float64 stays), as `linear_logp` has them; for the few rows that are sampled."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        tiles = Tiles(flat, self, chunk=max(len(flat), 1), block=self.weight.shape[0])
        return tiles.logits(0, len(flat), 0, self.weight.shape[0])[0].reshape(*hidden.shape[:-1], -1)

    def log_softmax(self, hidden: Float[Tensor, "N H"], temperature: float = 1.0) -> Float[Tensor, "N V"]:
        """Whole distributions, in float32 (float64 stays), differentiable as often as needed; all [N, V] live."""
        logits = functional.linear(hidden, self.weight, self.bias)
        logits = (logits if logits.dtype == torch.float64 else logits.float()) * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return torch.log_softmax(logits / temperature, -1)


@dataclass(frozen=True, slots=True)
class Support:
    """Which ids were allowed at each of N positions, as a flat list of ids with offsets.

    Token n lists `ids[offset[n] : offset[n + 1]]`. Where `lists_allowed[n]` is True these are the only ids allowed
    (a nucleus); otherwise they are the only ones forbidden (an EOS ban; none listed: the whole vocabulary).
    """

    ids: Int[Tensor, " K"]
    token: Int[Tensor, " K"]
    lists_allowed: Bool[Tensor, " N"]
    offset: list[int]

    @classmethod
    def pack(cls, per_token: Sequence[Tensor]) -> Support:
        """From one integer tensor per token: allowed ids; or forbidden ids v written as ~v (so all negative);
        or nothing, for the whole vocabulary."""
        counts = [len(ids) for ids in per_token]
        offset = [0]
        for count in counts:
            offset.append(offset[-1] + count)
        flat = torch.cat([t.reshape(-1).cpu().long() for t in per_token] or [torch.zeros(0, dtype=torch.long)])
        token = torch.repeat_interleave(torch.tensor(counts, dtype=torch.long))
        listed = torch.zeros(len(counts), dtype=torch.bool)
        listed[token[flat >= 0]] = True
        if (listed[token] & (flat < 0)).any():
            raise ValueError("a token's support lists allowed ids and forbidden ones (negative, ~id) together")
        ids = torch.where(flat < 0, ~flat, flat)
        return cls(ids, token, listed, offset)

    def allowed(
        self, a: int, b: int, v: int, w: int, device: torch.device | str = "cpu"
    ) -> Bool[Tensor, "{b-a} {w-v}"]:
        """The mask of rows [a, b) over the ids [v, w), on the device; which numbers it needs is found on the CPU."""
        span = slice(self.offset[a], self.offset[b])
        row, column = self.token[span] - a, self.ids[span] - v
        inside = (column >= 0) & (column < w - v)
        row, column, listed = (send(x, device) for x in (row[inside], column[inside], self.lists_allowed[a:b]))
        mask = (~listed)[:, None].repeat(1, w - v)
        mask[row, column] = listed[row]
        return mask


def linear_logp(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    target: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    support: Support | None = None,
    chunk: int | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"] | None]:
    """Log-probability (nats) of each target under softmax(z / temperature), and the entropy if asked for.

    z = cap(logit_scale * (h W^T + b)) as in `Head`, restricted to `support`: logp is -inf for a target outside
    it, and no gradient flows from there. Sums are in float32 at least (float64 if the inputs are), whatever the
    inputs' dtype. Differentiable once in hidden, weight and bias, in logp and in entropy. `chunk` is how
    many rows a tile has; by default as many as fit the cache on a CPU, or 256 MiB on an accelerator.

    Raises ValueError for a temperature that is not above 0 and for a support of another length.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}; for greedy choice take the argmax")
    if support is not None and len(support.lists_allowed) != len(hidden):
        raise ValueError(f"support covers {len(support.lists_allowed)} tokens and there are {len(hidden)}")
    form = (temperature, softcap, logit_scale, support, chunk, entropy)
    return _LinearLogp.apply(hidden, weight, bias, target, form)  # type: ignore[return-value]


class Tiles:
    """The logits of one output layer, a tile at a time, and the way back from a tile's gradient."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        temperature: float = 1.0,
        support: Support | None = None,
        chunk: int | None = None,
        block: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kind = hidden.device.type
        self.hidden, self.head, self.temperature, self.support = hidden, head, temperature, support
        if dtype is None and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        self.dtype = dtype or torch.promote_types(hidden.dtype, head.weight.dtype)
        self.exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.N, self.V = len(hidden), head.weight.shape[0]
        rows, size = TILE["cpu" if kind == "cpu" else "accelerator"]
        self.chunk = chunk or max(1, min(self.N, rows))
        self.block = block or min(self.V, max(256, size // self.exact.itemsize // self.chunk // 64 * 64))
        size = self.chunk * self.block if self.dtype == self.exact else 0
        self.buffer = hidden.new_empty(size, dtype=self.exact)

    def rows(self) -> Iterator[tuple[int, int]]:
        for a in range(0, self.N, self.chunk):
            yield a, min(a + self.chunk, self.N)

    def blocks(self) -> Iterator[tuple[int, int]]:
        for v in range(0, self.V, self.block):
            yield v, min(v + self.block, self.V)

    def logits(self, a: int, b: int, v: int, w: int) -> tuple[Tensor, Tensor | None]:
        """Logits of a tile, and d cap(x) / dx where the layer caps. The next call writes over them."""
        h, W = self.hidden[a:b].to(self.dtype), self.head.weight[v:w].to(self.dtype)
        with torch.autocast(h.device.type, enabled=False):
            if faster(h, W):
                u = linear(h, W)
            elif self.dtype == self.exact:
                u = torch.mm(h, W.t(), out=self.buffer[: (b - a) * (w - v)].view(b - a, w - v))
            else:
                u = _mm(h, W.t(), self.exact)
        if self.head.bias is not None:
            u = u.add_(self.head.bias[v:w])
        slope = None
        scale = self.head.logit_scale
        if self.head.softcap is not None:
            u = u.mul_(scale / self.head.softcap).tanh_()
            slope = 1 - u * u
            scale = self.head.softcap
        if scale != self.temperature:
            u = u.mul_(scale / self.temperature)
        if self.support is not None:
            u = u.masked_fill_(~self.support.allowed(a, b, v, w, u.device), FORBIDDEN)
        return u, slope


class Gradient:
    """Collects the gradients of an output layer from tiles of d loss / d (z / temperature)."""

    def __init__(self, tiles: Tiles, needs: Sequence[bool]) -> None:
        head, exact = tiles.head, tiles.exact
        self.tiles = tiles
        self.hidden = torch.zeros_like(tiles.hidden) if needs[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=exact) if needs[1] else None
        self.bias = torch.zeros_like(head.bias, dtype=exact) if needs[2] and head.bias is not None else None
        self.rows = tiles.hidden.new_zeros(tiles.chunk, tiles.hidden.shape[1], dtype=exact)

    def add(self, du: Tensor, slope: Tensor | None, a: int, b: int, v: int, w: int) -> None:
        tiles = self.tiles
        du = du.mul_(tiles.head.logit_scale / tiles.temperature)
        if slope is not None:
            du = du.mul_(slope)
        if self.bias is not None:
            self.bias[v:w] += du.sum(0)
        du = du.to(tiles.dtype)
        if self.hidden is not None:
            _addmm_(self.rows[: b - a], du, tiles.head.weight[v:w].to(tiles.dtype))
        if self.weight is not None:
            _addmm_(self.weight[v:w], du.t(), tiles.hidden[a:b].to(tiles.dtype))

    def finish_rows(self, a: int, b: int) -> None:
        if self.hidden is not None:
            self.hidden[a:b] = self.rows[: b - a]
            self.rows.zero_()

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        head = self.tiles.head
        weight = None if self.weight is None else self.weight.to(head.weight.dtype)
        bias = None if self.bias is None or head.bias is None else self.bias.to(head.bias.dtype)
        return self.hidden, weight, bias


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, form):
        temperature, softcap, logit_scale, support, chunk, want_entropy = form
        tiles = Tiles(hidden, Head(weight, bias, logit_scale, softcap), temperature, support, chunk)
        # a target outside the vocabulary meets no tile and stays NaN
        chosen = hidden.new_full((tiles.N,), torch.nan, dtype=tiles.exact)
        lse = torch.empty_like(chosen)
        entropy = torch.empty_like(chosen) if want_entropy else None
        for a, b in tiles.rows():
            top = lse.new_full((b - a,), FORBIDDEN)
            total, weighted = torch.zeros_like(top), torch.zeros_like(top)
            for v, w in tiles.blocks():
                u, _ = tiles.logits(a, b, v, w)
                local, inside = _local(target[a:b], v, w)
                chosen[a:b] = torch.where(inside, u.gather(1, local[:, None])[:, 0], chosen[a:b])
                higher = torch.maximum(top, u.amax(1))
                shrink = (top - higher).exp_()
                u = _flush_(u.sub_(higher[:, None]))
                if entropy is not None:
                    mass = u.exp()
                    # sum of e^(u - top) (u - top), carried over to the new top
                    weighted = shrink * (weighted + total * (top - higher)) + u.mul_(mass).sum(1)
                    total = shrink * total + mass.sum(1)
                else:
                    total = shrink * total + u.exp_().sum(1)
                top = higher
            lse[a:b] = top + total.log()
            if entropy is not None:
                entropy[a:b] = total.log() - weighted / total
        logp = chosen - lse
        if support is not None:
            logp.masked_fill_(chosen <= FORBIDDEN / 2, -torch.inf)
        ctx.save_for_backward(hidden, weight, bias, target, logp, lse, entropy)
        ctx.form = (*form[:5], tiles.dtype)  # the dtype as under the forward pass's autocast
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, target, logp, lse, entropy = ctx.saved_tensors
        temperature, softcap, logit_scale, support, chunk, dtype = ctx.form
        if grad_logp is None and grad_entropy is None:
            return None, None, None, None, None
        head = Head(weight, bias, logit_scale, softcap)
        tiles = Tiles(hidden, head, temperature, support, chunk, dtype=dtype)
        gradient = Gradient(tiles, ctx.needs_input_grad)
        on_logp = torch.zeros_like(lse) if grad_logp is None else grad_logp.masked_fill(logp == -torch.inf, 0)
        for a, b in tiles.rows():
            g = on_logp[a:b]
            for v, w in tiles.blocks():
                u, slope = tiles.logits(a, b, v, w)
                u = _flush_(u.sub_(lse[a:b, None]))
                if grad_entropy is None:
                    du = u.exp_().mul_(-g[:, None])
                else:  # -p (g + e (log p + H))
                    p = u.exp()
                    e = grad_entropy[a:b, None]
                    du = u.add_(entropy[a:b, None]).mul_(e).add_(g[:, None]).mul_(p).neg_()
                local, inside = _local(target[a:b], v, w)
                du.scatter_add_(1, local[:, None], torch.where(inside, g, 0)[:, None])
                gradient.add(du, slope, a, b, v, w)
            gradient.finish_rows(a, b)
        return *gradient.result(), None, None


def _local(target: Tensor, v: int, w: int) -> tuple[Tensor, Tensor]:
    """Column of each target in the block [v, w), clamped into it, and whether it really is there."""
    inside = (target >= v) & (target < w)
    return (target - v).clamp(0, w - v - 1), inside


def _flush_(u: Tensor) -> Tensor:
    """Of log-ratios to the largest term or the sum, those whose exp is below e^-60 to FORBIDDEN, so exactly 0.

    They change no sum, not even in float64, but on a CPU the denormal numbers that they lead to were measured
    to slow the backward products 18-fold.
    """
    return torch.threshold_(u, -60.0, FORBIDDEN) if u.device.type == "cpu" else u


def _mm(a: Tensor, b: Tensor, exact: torch.dtype) -> Tensor:
    """a @ b, summed and returned in `exact` also where the factors are of lower precision."""
    if a.dtype == exact:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=exact)
    return a.to(exact) @ b.to(exact)


def _addmm_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, in place, without a product of its own where the dtypes allow."""
    with torch.autocast(out.device.type, enabled=False):
        if a.dtype == out.dtype:
            add_product(out, a, b)
        else:
            out.add_(_mm(a, b, out.dtype))
