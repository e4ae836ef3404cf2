"""Attention of whole sequences and its gradient: plain torch in float64, for every shape a batch may have."""

from __future__ import annotations

import pytest
import torch

from steersman import native
from steersman.native import sequences
from steersman.native.sequences import attend, attends, row_starts, says_rows

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled loops: {native.why_not()}")


def given(rows: int, heads: int, kv_heads: int, queries: int, keys: int, width: int) -> list[torch.Tensor]:
    """Query, key and value as a model's projections give them: token by token, heads side by side."""
    random = torch.Generator().manual_seed(queries * width + keys)
    shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    return [
        torch.randn(rows, tokens, n, width, generator=random).transpose(1, 2).requires_grad_() for tokens, n in shapes
    ]


def plain(query, key, value, mask, scale):
    """Softmax over what is seen, written out; zeros where nothing is."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = (scale * query @ key.transpose(2, 3)).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~mask, 0.0)
    return (weights @ value).transpose(1, 2)


def assert_same(query, key, value, mask, scale=0.3, close=5e-6, seen=None):
    queries, keys = query.shape[2], key.shape[2]
    if seen is None:
        seen = torch.ones(queries, keys).bool().tril(keys - queries) if mask is None else mask
    grad = torch.randn(len(query), queries, *query.shape[1::2], generator=torch.Generator().manual_seed(9))
    out = attend(query, key, value, mask, scale)
    double = [x.detach().double().requires_grad_() for x in (query, key, value)]
    expected = plain(*double, seen, scale)
    torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=1e-5)
    found = torch.autograd.grad(out, (query, key, value), grad)
    wanted = torch.autograd.grad(expected, double, grad.double())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, atol=close * float(b.abs().max()) + 1e-7, rtol=1e-4)


@pytest.mark.parametrize("tokens", [2, 7, 8, 31, 32, 33, 96, 130])
@pytest.mark.parametrize("width", [16, 32, 48, 64, 80])
def test_a_causal_row_is_the_softmax_over_what_came_before(tokens, width):
    assert_same(*given(2, 3, 3, tokens, tokens, width), None)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_heads_that_share_keys_add_up_their_gradients(kv_heads):
    assert_same(*given(3, 6, kv_heads, 21, 21, 16), None)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(5, 11), (40, 70), (33, 33)])
def test_only_what_the_mask_shows_is_seen(queries, keys, shared):
    random = torch.Generator().manual_seed(keys)
    mask = torch.rand(1 if shared else 2, 1, queries, keys, generator=random) < 0.4
    mask[:, :, 3] = False  # a query that sees nothing
    mask[:, :, 4, 1:] = False
    assert_same(*given(2, 4, 2, queries, keys, 32), mask)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [([5], [5]), ([33, 1, 8, 97], [33, 1, 8, 97]), ([4, 0, 7, 1, 40], [9, 6, 7, 12, 71]), ([0, 6, 0], [0, 6, 3])],
)
def test_rows_one_behind_the_other_see_only_themselves(queries, keys, kv_heads):
    """Each as it would be alone: query i of a row sees the row's keys up to i + keys - queries."""
    row = [torch.repeat_interleave(torch.tensor(n)) for n in (queries, keys)]
    place = [torch.cat([torch.arange(n) for n in counts]) for counts in (queries, keys)]
    before = torch.tensor(keys) - torch.tensor(queries)
    seen = (row[0][:, None] == row[1]) & (place[1] <= place[0][:, None] + before[row[0]][:, None])
    starts = row_starts(torch.tensor(queries), torch.tensor(keys))
    assert_same(*given(1, 4, kv_heads, sum(queries), sum(keys), 32), starts, seen=seen)


def test_rows_one_behind_the_other_fill_query_and_key():
    query, key, value = given(1, 4, 2, 12, 20, 16)
    right = row_starts(torch.tensor([5, 7]), torch.tensor([8, 12]))
    assert says_rows(right)
    assert attends(query, key, value, right)
    wrong = [
        row_starts(torch.tensor([5, 6]), torch.tensor([8, 12])),
        row_starts(torch.tensor([5, 7]), torch.tensor([8, 13])),
        row_starts(torch.tensor([15, -3]), torch.tensor([8, 12])),
        right + 1,
    ]
    assert not any(attends(query, key, value, starts) for starts in wrong)
    assert not attends(*given(2, 4, 2, 12, 20, 16), right)
    long = given(1, 4, 2, 1, 5000, 16)
    assert not attends(*long, row_starts(torch.tensor([1]), torch.tensor([5000])))
    assert attends(*long, row_starts(torch.tensor([0, 1]), torch.tensor([2500, 2500])))


def test_scores_far_apart_do_not_overflow():
    query, key, value = given(1, 2, 2, 40, 40, 16)
    # nearly every weight is 0 or 1, and most gradients are what is left of numbers that cancel
    assert_same((200 * query).detach().requires_grad_(), key, value, None, close=2e-4)


def test_what_is_not_contiguous_is_read_where_it_lies():
    query, key, value = (x.detach() for x in given(2, 4, 2, 12, 12, 16))
    wide = [torch.cat([x, x], 2)[:, :, 6:18].requires_grad_() for x in (query, key, value)]
    assert_same(*wide, None)


def test_what_it_takes():
    query, key, value = given(2, 4, 2, 12, 12, 16)
    assert attends(query, key, value, None)
    assert not attends(query.double(), key.double(), value.double(), None)
    assert not attends(*given(2, 4, 2, 12, 12, 8), None)
    assert not attends(query, key, value, torch.zeros(2, 1, 12, 12))
    assert not attends(query, key, value, torch.ones(2, 4, 12, 12).bool())
    assert not attends(query, key, value, torch.ones(2, 1, 12, 12).bool().transpose(2, 3))
    assert sequences.LONGEST == 4096
    assert not attends(query, *(x.expand(-1, -1, 5000, -1) for x in given(2, 4, 2, 1, 1, 16)[1:]), None)


def test_it_is_the_same_for_any_number_of_threads():
    query, key, value = given(3, 4, 2, 50, 50, 32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = attend(query, key, value, None, 0.2)
            results.append([out, *torch.autograd.grad(out.square().sum(), (query, key, value))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
