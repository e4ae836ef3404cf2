"""Advantages for the best of k: what a response adds to a set of samples that is judged by its maximum."""

from __future__ import annotations

from math import comb

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steersman.advantage.group import leave_one_out


def best_of_k(score: Float[Tensor, " B"], group: Int[Tensor, " B"], k: int) -> Float[Tensor, " B"]:
    """n s_i, where sum_i s_i grad log pi(y_i) is an unbiased estimate of grad E[max of k scores], n the group's size.

        s_i = 1 / C(n, k) * sum over the k-subsets I that hold i of [ max_I g - max_{I without i} g ]
            = 1 / C(n, k) * sum_{j: g_j < g_i} C(j, k - 2) (g_i - g_j),     j counted from 0 in ascending order

    For k = 1 it is the leave-one-out advantage. With scores of 0 and 1 the objective is pass@k. Ties add nothing, so
    their order does not matter. Source: PKPO, arXiv 2505.15201 (the "leave one out minus one" baseline);
    the second line is the first with the subsets counted. Raises ValueError where a group has fewer than k.
    """
    if k == 1:
        return leave_one_out(score, group)
    out = torch.zeros_like(score)
    for name in group.unique():
        rows = (group == name).nonzero().flatten()
        n = len(rows)
        if n < k:
            raise ValueError(f"the best of {k} needs {k} samples of a prompt, and there are {n}")
        order = score[rows].argsort()
        g = score[rows][order]
        below = torch.tensor([comb(j, k - 2) for j in range(n)], dtype=score.dtype, device=score.device)
        lead = (g[:, None] - g[None, :]).clamp(min=0) @ below
        out[rows[order]] = n / comb(n, k) * lead
    return out
