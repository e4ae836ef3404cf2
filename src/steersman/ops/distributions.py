"""Categorical distributions given as logits [..., V]: which tokens may be sampled, entropy, exact KL.

Every mask is True where a token is allowed, and each row's mask depends on that row alone.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LEAST_TEMPERATURE = 0.01
"""Logits divided by less overflow sooner or later, and vLLM takes this one instead; 0 stands for greedy."""

SORT_BELOW = 1024
"""Up to this vocabulary one full sort is cheaper than looking at the head of the distribution first."""
SORTED = 1 << 24
"""Logits that are sorted at a time: with their places and sums these take some 400 MiB."""


def top_k_mask(logits: Float[Tensor, "*lead V"], k: int) -> Bool[Tensor, "*lead V"]:
    """The k largest logits of each row; all where k is 0 or not below V. Exactly k, even with ties."""
    if k < 0:
        raise ValueError(f"top_k must be 0 (off) or a positive count, got {k}")
    if k == 0 or k >= logits.shape[-1]:
        return torch.ones_like(logits, dtype=torch.bool)
    best = logits.topk(k, dim=-1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, best, True)


def top_p_mask(logits: Float[Tensor, "*lead V"], p: float, min_tokens_to_keep: int = 1) -> Bool[Tensor, "*lead V"]:
    """The nucleus: the smallest set of most likely tokens whose mass reaches p.

    The token that crosses p is kept; at least `min_tokens_to_keep` are. p >= 1 allows every token.
    For a large vocabulary only the head is sorted, and only rows whose head does not reach p look further; of those
    whose whole vocabulary is sorted, so many at a time that memory stays small.

    Source: arXiv 1904.09751, eq. 2 and 3.
    """
    if not p > 0:
        raise ValueError(f"top_p must be above 0, got {p}")
    if min_tokens_to_keep < 1:
        raise ValueError(f"min_tokens_to_keep must be at least 1, got {min_tokens_to_keep}")
    V = logits.shape[-1]
    if p >= 1 or min_tokens_to_keep >= V:
        return torch.ones_like(logits, dtype=torch.bool)
    flat = logits.detach().reshape(-1, V)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    log_z = flat.logsumexp(-1, keepdim=True)
    allowed = torch.zeros_like(flat, dtype=torch.bool)
    rows = torch.arange(flat.shape[0], device=flat.device)
    head = V if V <= SORT_BELOW else min(V, max(256, min_tokens_to_keep))
    while head < V and rows.numel():
        some = flat if len(rows) == len(flat) else flat[rows]
        value, index = some.topk(head, dim=-1)
        keep, mass = _keep_until(p, value - log_z[rows], min_tokens_to_keep)
        reached = mass >= p
        allowed[rows[reached]] = torch.zeros_like(some, dtype=torch.bool).scatter_(-1, index, keep)[reached]
        rows = rows[~reached]
        head = V if head * 16 >= V else head * 16
    for part in rows.split(max(1, SORTED // V)):
        value, index = flat[part].sort(dim=-1, descending=True, stable=True)
        keep, _ = _keep_until(p, value - log_z[part], min_tokens_to_keep)
        allowed[part] = torch.zeros_like(value, dtype=torch.bool).scatter_(-1, index, keep)
    return allowed.reshape(logits.shape)


def _keep_until(p: float, logp: Tensor, at_least: int) -> tuple[Tensor, Tensor]:
    """Which of the likeliest tokens, in falling order, come before the mass p is reached, and the mass of all [B]."""
    mass = logp.exp()
    cumulative = mass.cumsum(-1)
    keep = cumulative - mass < p
    keep[:, :at_least] = True
    return keep, cumulative[:, -1]


def min_p_mask(logits: Float[Tensor, "*lead V"], min_p: float) -> Bool[Tensor, "*lead V"]:
    """Tokens whose probability is at least min_p times that of the most likely one; 0 allows every token.

    Source: arXiv 2407.01082, section 3.
    """
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p must lie in [0, 1], got {min_p}")
    if min_p == 0:
        return torch.ones_like(logits, dtype=torch.bool)
    return logits >= logits.amax(-1, keepdim=True) + math.log(min_p)


def nats_to_prior(mean: Float[Tensor, "*B L"], log_variance: Float[Tensor, "*B L"]) -> Float[Tensor, "*B"]:
    """KL(N(mean, variance) || N(0, I)), summed over the latents, in nats.

        1/2 sum_l (mu_l^2 + sigma_l^2 - 1 - log sigma_l^2)

    Source: arXiv 1312.6114, appendix B.
    """
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(-1)
