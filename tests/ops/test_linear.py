"""Products by oneDNN: what torch's own give, forward and backward, and torch's own wherever that is due."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from steersman.model.fast.linear import FastLinear, quicken_linear
from steersman.model.fast.plain import plain_layers
from steersman.ops import products

LARGE = (64, 256, 512)
"""Rows, inputs and outputs of a product that is worth a call of oneDNN."""


@pytest.fixture(autouse=True)
def entry(monkeypatch):
    """oneDNN's entry whatever the processor is, where torch has it at all; returns the calls that were made."""
    try:
        inner = torch.ops.mkldnn._linear_pointwise
    except AttributeError:
        pytest.skip("this build of torch has no oneDNN")
    calls = []
    monkeypatch.setattr(products, "_entry", lambda: lambda *a: (calls.append(a), inner(*a))[1])
    return calls


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a.double() - b.double()).abs().max() <= 2e-6 * b.double().abs().max())


@pytest.mark.parametrize("lead", [(64,), (4, 16)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
def test_values_and_gradients_are_those_in_double_precision(entry, lead, bias):
    _, inputs, outputs = LARGE
    x, w = numbers(*lead, inputs).requires_grad_(), numbers(outputs, inputs, seed=1).requires_grad_()
    b = numbers(outputs, seed=2).requires_grad_() if bias else None
    given = [t for t in (x, w, b) if t is not None]
    y = products.linear(x, w, b)
    exact = [t.detach().double().requires_grad_() for t in given]
    expected = functional.linear(*exact)
    assert close(y, expected)
    direction = numbers(*y.shape, seed=3)
    for mine, theirs in zip(
        torch.autograd.grad(y, given, direction),
        torch.autograd.grad(expected, exact, direction.double()),
        strict=True,
    ):
        assert close(mine, theirs)
    assert len(entry) == 3


@pytest.mark.parametrize("shape", ["sliced", "expanded", "turned"])
def test_strides_do_not_matter(entry, shape):
    m, k, n = LARGE
    x = {
        "sliced": numbers(m, 2 * k)[:, :k], "expanded": numbers(1, k).expand(m, k), "turned": numbers(k, m).t(),
    }[shape].requires_grad_()  # fmt: skip
    w = numbers(k, n, seed=1).t()
    y = products.linear(x, w)
    assert entry
    assert close(y, x.double() @ w.double().t())
    (grad,) = torch.autograd.grad(y.sum(), x)  # an expanded gradient
    assert close(grad, w.double().sum(0).expand(m, k))


def test_what_needs_no_gradient_keeps_nothing():
    m, k, n = LARGE
    for of_x, of_w in ((True, False), (False, True)):
        x, w = numbers(m, k).requires_grad_(of_x), numbers(n, k).requires_grad_(of_w)
        y = products.linear(x, w)
        assert [t if t is None else t.shape for t in y.grad_fn.saved_tensors] == [
            x.shape if of_w else None, w.shape if of_x else None,
        ]  # fmt: skip


@pytest.mark.parametrize("case", ["small", "double", "half", "autocast", "subclass"])
def test_all_else_is_torchs(entry, case):
    m, k, n = LARGE if case != "small" else (4, 8, 8)
    x, w = numbers(m, k), numbers(n, k)
    if case in ("double", "half"):
        x, w = (t.to(torch.float64 if case == "double" else torch.bfloat16) for t in (x, w))
    if case == "subclass":
        x = x.as_subclass(type("Marked", (torch.Tensor,), {}))
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        y, expected = products.linear(x, w), functional.linear(x, w)
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)
    assert not entry


def test_a_sum_in_place_adds_the_product(entry):
    out, a, b = numbers(64, 512), numbers(64, 256, seed=1), numbers(256, 512, seed=2)
    expected = out.double() + a.double() @ b.double()
    products.add_product(out, a, b)
    assert entry
    assert close(out, expected)


def test_each_layer_is_changed_by_itself_and_only_a_plain_one(entry):
    class Other(nn.Linear):
        pass

    model = nn.ModuleList([nn.Linear(256, 512), Other(256, 512)])
    quicken_linear(model)
    assert [type(m) for m in model] == [FastLinear, Other]
    assert type(nn.Linear(1, 1)) is nn.Linear
    layer, x = model[0], numbers(64, 256).requires_grad_()
    assert set(layer.state_dict()) == {"weight", "bias"}
    with plain_layers():  # for second derivatives
        (first,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
        torch.autograd.grad(first.sum(), x)
    assert not entry
    layer(x)
    assert entry
