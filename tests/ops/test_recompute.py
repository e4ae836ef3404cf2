"""What a linear layer reads of a norm or a gate is computed again for the backward pass, and kept nowhere."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from steersman import native
from steersman.native.layers import GATES, gated, rms_norm
from steersman.ops import products, recompute

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled loops: {native.why_not()}")

ROWS, INPUTS, OUTPUTS = 64, 256, 512


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["oneDNN", "MKL"])
def library(request, monkeypatch):
    """Either library multiplies, whatever the processor is."""
    if request.param == "MKL":
        monkeypatch.setattr(products, "_entry", lambda: None)
    elif not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of torch has no oneDNN")
    else:
        monkeypatch.setattr(products, "_entry", lambda: torch.ops.mkldnn._linear_pointwise)


@pytest.fixture
def given() -> list[torch.Tensor]:
    """An input, a norm's weight, those of two layers that read the norm, and that of one that reads their gate."""
    shapes = [(ROWS, INPUTS), (INPUTS,), (OUTPUTS, INPUTS), (OUTPUTS, INPUTS), (INPUTS, OUTPUTS)]
    return [numbers(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def feed_forward(x, norm, gate, up, down, *, keep: bool = False):
    """A layer's second half; with `keep` its linear layers read copies, whose maker can not be asked."""
    same = torch.clone if keep else (lambda tensor: tensor)
    normed = same(rms_norm(x, norm, 1e-5))
    opened = gated(products.linear(normed, gate), products.linear(normed, up))
    return products.linear(same(opened), down)


def gradients(given, **more):
    return torch.autograd.grad(feed_forward(*given, **more).sin().sum(), given)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_a_norm_gives_its_output_again(eps, offset):
    out = rms_norm(numbers(3, 7, 48), numbers(48, seed=1).requires_grad_(), eps, offset)
    assert torch.equal(recompute.output(recompute.maker(out)), out)


@pytest.mark.parametrize("kind", list(GATES))
def test_a_gate_gives_its_output_again(kind):
    out = gated(numbers(3, 7, 48).requires_grad_(), numbers(3, 7, 48, seed=1), kind)
    assert torch.equal(recompute.output(recompute.maker(out)), out)


def test_gradients_are_the_same_bit_for_bit(library, given):
    for mine, kept in zip(gradients(given), gradients(given, keep=True), strict=True):
        assert torch.equal(mine, kept)


def test_neither_norm_nor_product_is_kept(library, given):
    def bytes_kept(**more) -> int:
        places: dict[int, int] = {}
        with saved_tensors_hooks(
            lambda x: (places.update({x.untyped_storage().data_ptr(): x.nbytes}), x)[1], lambda x: x
        ):
            out = feed_forward(*given, **more)
        assert out.requires_grad
        return sum(places.values())

    assert bytes_kept(keep=True) - bytes_kept() == 4 * ROWS * (INPUTS + OUTPUTS)


def test_all_readers_have_it_computed_once(library, given, monkeypatch):
    made = []
    inner = dict(recompute._outputs)
    for kind, output in inner.items():
        monkeypatch.setitem(recompute._outputs, kind, lambda *a, output=output: (made.append(a), output(*a))[1])
    gradients(given)
    assert len(made) == 2


def test_it_is_let_go_with_the_backward_pass(library, given):
    normed = rms_norm(given[0], given[1], 1e-5)
    node = recompute.maker(normed)
    loss = products.linear(normed, given[2]).sum()
    loss.backward(retain_graph=True)
    assert node.output is None
    assert node.unpacked is None
    first = given[2].grad.clone()
    loss.backward()
    assert torch.equal(given[2].grad, 2 * first)


def test_checkpointed_layers_hand_out_what_they_kept_once(library, given):
    expected = gradients(given)
    out = checkpoint(feed_forward, *given, use_reentrant=False)
    for mine, plain in zip(torch.autograd.grad(out.sin().sum(), given), expected, strict=True):
        assert torch.equal(mine, plain)


def test_an_output_that_was_changed_is_kept_as_it_is(library, given):
    x, norm, weight, *_ = given
    normed = rms_norm(x, norm, 1e-5)
    with torch.no_grad():
        normed.mul_(3)
    assert recompute.maker(normed) is None
    (grad,) = torch.autograd.grad(products.linear(normed, weight).sum(), weight)
    torch.testing.assert_close(grad, normed.detach().sum(0).expand_as(weight), rtol=1e-4, atol=1e-4)


def test_a_frozen_weight_needs_nothing_of_it(library, given):
    x, norm, weight, *_ = given
    out = products.linear(rms_norm(x, norm, 1e-5), weight.detach())
    (grad,) = torch.autograd.grad(out.sum(), x)
    (plain,) = torch.autograd.grad((rms_norm(x, norm, 1e-5) @ weight.detach().T).sum(), x)
    torch.testing.assert_close(grad, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [(4, 8), (2, 16, 1)])
def test_a_view_with_the_same_rows_is_the_output_too(rows):
    """As where an adapter's layer flattens batch and tokens."""
    out = rms_norm(numbers(*rows, 48), numbers(48, seed=1).requires_grad_(), 1e-5)
    node = recompute.maker(out)
    assert node is not None
    assert recompute.maker(out.flatten(0, -2)) is node
    assert recompute.maker(out.view(-1, 48).view(2, -1, 48)) is node


def test_other_views_are_not_the_output():
    out = rms_norm(numbers(4, 48, 48), numbers(48, seed=1).requires_grad_(), 1e-5)
    views = [out[:2], out.transpose(1, 2), out.transpose(0, 1), out.view(-1, 24), out[..., :24], out.detach()]
    assert all(recompute.maker(view) is None for view in views)


def test_a_small_product_of_a_large_input_does_not_keep_it(library):
    """As the first of an adapter's two matrices."""
    x, norm, down = numbers(2, 1024, INPUTS), numbers(INPUTS, seed=1), numbers(2, INPUTS, seed=2)
    assert x.numel() * len(down) < products.MIN_ONEDNN_PRODUCT
    assert x.numel() >= products.MIN_RECOMPUTED
    found, kept = [], []
    for read in (rms_norm, lambda *given: rms_norm(*given).clone()):
        weights = [given.detach().requires_grad_() for given in (norm, down)]
        sizes: list[int] = []
        with saved_tensors_hooks(lambda t, sizes=sizes: (sizes.append(t.nbytes), t)[1], lambda t: t):
            out = products.linear(read(x, weights[0], 1e-5).flatten(0, 1), weights[1])
        kept.append(sum(sizes))
        found.append(torch.autograd.grad(out.sin().sum(), weights))
    assert kept[1] - kept[0] == x.nbytes
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
