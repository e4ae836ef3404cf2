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


def test_rows_of_a_group_are_parted_only_where_they_do_not_fit():
    length, group = torch.tensor([9, 9, 10, 8, 7, 7, 7, 1]), torch.tensor([0, 0, 0, 5, 5, 5, 5, 2])
    for bound, expected in (
        (50, [[2, 0, 1], [3, 4, 5, 6, 7]]),
        (80, [list(range(8))]),
        (20, [[2, 0], [1], [3, 4], [5, 6], [7]]),
    ):
        found = micro_batches(length, bound, group)
        assert [sorted(part.tolist()) for part in found] == [sorted(part) for part in expected], bound
