"""Micro-batches: every row once, within the bound, groups together."""

import pytest
import torch

from steersman.distributed.micro import micro_batches


@pytest.mark.parametrize("bound", [1, 40, 90, 10_000])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_row_once_and_within_the_bound(bound, grouped):
    draw = torch.Generator().manual_seed(bound)
    for _ in range(20):
        length = torch.randint(1, 40, (23,), generator=draw)
        group = torch.randint(0, 5, (23,), generator=draw) * 7 if grouped else None
        parts = micro_batches(length, bound, group)
        assert sorted(torch.cat(parts).tolist()) == list(range(23))
        assert all(len(p) == 1 or len(p) * int(length[p].max()) <= bound for p in parts)
        if group is None:
            assert (length[torch.cat(parts)].diff() <= 0).all()
        else:
            order = group[torch.cat(parts)]
            assert int((order.diff() != 0).sum()) == len(order.unique()) - 1
            assert length[parts[0]].max() == length.max()
