"""The compiled norm, gate and rotation give what plain float64 torch gives, and so do their gradients."""

from __future__ import annotations

import pytest
import torch

from steersman import native
from steersman.native.layers import gated, rms_norm, rotate, takes

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled loops: {native.why_not()}")

SHAPES = [(1, 8), (3, 5, 17), (2, 300, 64), (700, 96)]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


def norm64(x, weight, eps, offset):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (offset + weight)


def gate64(gate, up, kind):
    if kind == "silu":
        return gate / (1 + (-gate).exp()) * up
    cubic = gate + 0.044715 * gate**3
    return 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * cubic)) * up


def rotate64(x, cos, sin):
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos[:, None] + turned * sin[:, None]


def both(function, oracle, *given, fixed=()):
    """Results and gradients of float32 `function` and float64 `oracle`, compared one by one."""
    here = [x.detach().clone().requires_grad_() for x in given]
    there = [x.detach().double().requires_grad_() for x in given]
    out, expected = function(*here, *fixed), oracle(*there, *(f.double() if torch.is_tensor(f) else f for f in fixed))
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-6)
    upstream = numbers(*out.shape, seed=9)
    out.backward(upstream)
    expected.backward(upstream.double())
    for a, b in zip(here, there, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        scale = float(b.grad.abs().max())
        torch.testing.assert_close(a.grad.double() / scale, b.grad / scale, atol=2e-6, rtol=0)
    with torch.no_grad():
        assert torch.equal(function(*here, *fixed), out)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm(shape, offset):
    both(rms_norm, norm64, numbers(*shape), numbers(shape[-1], seed=1), fixed=(1e-5, offset))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gate(shape, kind):
    both(gated, gate64, numbers(*shape), numbers(*shape, seed=1), fixed=(kind,))


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gate_far_from_zero_saturates_and_stays_finite(kind):
    x = torch.tensor([-1e4, -100.0, -30.0, 0.0, 30.0, 100.0, 1e4]).requires_grad_()
    out = gated(x, torch.ones(7), kind)
    torch.testing.assert_close(out, x.detach().clamp(min=0), atol=1e-8, rtol=1e-6)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]), atol=1e-8, rtol=1e-6)
    assert gated(torch.tensor([torch.nan]), torch.ones(1), kind).isnan().all()


@pytest.mark.parametrize(("rows", "heads", "length", "width"), [(2, 3, 5, 8), (1, 1, 1, 2), (4, 8, 90, 32)])
@pytest.mark.parametrize("shared", [False, True])
def test_rotation_of_heads_that_lie_apart(rows, heads, length, width, shared):
    table = 1 if shared else rows
    cos, sin = numbers(table, length, width, seed=1), numbers(table, length, width, seed=2)

    def turn(x, cos, sin, apply=rotate):
        return apply(x.transpose(1, 2), cos, sin)

    both(turn, lambda x, c, s: turn(x, c, s, rotate64), numbers(rows, length, heads, width), fixed=(cos, sin))


def test_a_frozen_weight_gets_no_gradient_and_an_expanded_gradient_is_read_right():
    x, weight = numbers(6, 16).requires_grad_(), numbers(16, seed=1)
    rms_norm(x, weight, 1e-6).sum().backward()
    expected = x.detach().double().requires_grad_()
    norm64(expected, weight.double(), 1e-6, 0.0).sum().backward()
    assert x.grad is not None
    assert expected.grad is not None
    assert weight.grad is None
    torch.testing.assert_close(x.grad.double(), expected.grad, atol=1e-5, rtol=1e-5)


def test_rows_do_not_depend_on_their_neighbours_nor_results_on_the_run():
    x, weight = numbers(900, 64), numbers(64, seed=1)
    whole = rms_norm(x, weight, 1e-6)
    assert torch.equal(whole[7:9], rms_norm(x[7:9], weight, 1e-6))
    assert torch.equal(gated(x, x), gated(x, x))
    assert torch.equal(gated(x, x)[7:9], gated(x[7:9], x[7:9]))


def test_only_float32_on_a_cpu_outside_of_autocast():
    assert takes(torch.zeros(1))
    assert not takes(torch.zeros(1, dtype=torch.float64))
    assert not takes(torch.zeros(1, dtype=torch.bfloat16))
    assert not takes(torch.zeros(1, device="meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not takes(torch.zeros(1))
