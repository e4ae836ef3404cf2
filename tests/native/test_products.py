"""Products with rearranged weights: what torch gives, whatever the shape, the rows beside and the threads."""

from __future__ import annotations

import pytest
import torch

from steersman import native
from steersman.native.products import product, rearrange

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled loops: {native.why_not()}")


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 63, 64, 65, 150])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 4), (31, 33), (128, 64), (130, 97), (389, 512)])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_product(rows, inputs, outputs, bias):
    x, weight = numbers(rows, inputs), numbers(outputs, inputs)
    added = numbers(outputs) if bias else None
    (panels,) = rearrange([weight])
    expected = x.double() @ weight.double().T + (0 if added is None else added.double())
    torch.testing.assert_close(product(x, panels, added).double(), expected, atol=2e-4, rtol=1e-5)


def test_several_matrices_lie_in_one_piece_and_do_not_touch():
    weights = [numbers(outputs, inputs) for outputs, inputs in ((5, 7), (40, 3), (64, 16))]
    for weight, panels in zip(weights, rearrange(weights), strict=True):
        x = numbers(3, weight.shape[1])
        torch.testing.assert_close(product(x[:, None], panels)[:, 0], x @ weight.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_a_row_is_the_same_to_the_last_bit_whatever_is_beside_it(threads):
    x = numbers(70, 300)
    panels = rearrange([numbers(40, 300)])[0]  # fewer panels than threads
    before = torch.get_num_threads()
    alone = torch.cat([product(row[None], panels) for row in x])
    try:
        torch.set_num_threads(threads)
        assert torch.equal(product(x, panels), alone)
        assert torch.equal(product(x[3:60].contiguous(), panels), alone[3:60])
    finally:
        torch.set_num_threads(before)
