"""The fused log-probability against float64 log_softmax, in value, gradient and memory."""

import subprocess
import sys

import pytest
import torch

from steersman.ops import logprob
from steersman.ops.logprob import Head, Support, linear_logp

N, H, V = 7, 5, 600


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles each way, with ragged ends."""
    monkeypatch.setattr(logprob, "TILE", {"cpu": (3, 1024)})


def inputs(vocab=V, dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    hidden = torch.randn(N, H, dtype=dtype).requires_grad_()
    weight = (2 * torch.randn(vocab, H, dtype=dtype)).requires_grad_()
    b = torch.randn(vocab, dtype=dtype).requires_grad_() if bias else None
    return hidden, weight, b, torch.randint(0, vocab, (N,))


def reference(hidden, weight, bias, target, temperature=1.0, softcap=None, logit_scale=1.0, allowed=None):
    """Straight from the definitions, everything whole, in float64."""
    z = hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    if allowed is not None:
        z = z.masked_fill(~allowed, -torch.inf)
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    plogp = torch.where(p > 0, p * logp.masked_fill(p == 0, 0.0), 0.0)
    return logp[torch.arange(len(target)), target], -plogp.sum(-1)


def some_support(target, vocab=V):
    """A nucleus, a ban of two ids and no restriction, by turns; and the same as a dense mask."""
    generator = torch.Generator().manual_seed(3)
    lists, allowed = [], torch.ones(len(target), vocab, dtype=torch.bool)
    for n, t in enumerate(target.tolist()):
        if n % 3 == 0:
            ids = torch.cat([torch.randperm(vocab, generator=generator)[:20], torch.tensor([t])]).unique()
            allowed[n] = False
            allowed[n, ids] = True
        elif n % 3 == 1:
            ban = torch.tensor([(t + 1) % vocab, (t + 300) % vocab])
            allowed[n, ban] = False
            ids = ~ban
        else:
            ids = torch.zeros(0, dtype=torch.long)
        lists.append(ids)
    return Support.pack(lists), allowed


FORMS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.25},
    "all": {"temperature": 1.3, "softcap": 5.0, "logit_scale": 0.5},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_support", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient_equal_the_reference(form, with_support, bias):
    hidden, weight, b, target = inputs(bias=bias)
    support, allowed = some_support(target) if with_support else (None, None)
    leaves = [x for x in (hidden, weight, b) if x is not None]
    g = torch.randn(2, N, dtype=torch.float64)
    expected = reference(hidden, weight, b, target, **FORMS[form], allowed=allowed)
    actual = linear_logp(hidden, weight, b, target, **FORMS[form], entropy=True, support=support)
    for e, a, weights in zip(expected, actual, g, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)
        for x, y in zip(
            torch.autograd.grad((a * weights).sum(), leaves, retain_graph=True),
            torch.autograd.grad((e * weights).sum(), leaves, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)
    alone, none = linear_logp(hidden, weight, b, target, **FORMS[form], support=support)
    assert none is None
    torch.testing.assert_close(alone, expected[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("with_support", [False, True])
def test_gradcheck(with_support):
    torch.manual_seed(2)
    hidden, weight = torch.randn(4, 3).double().requires_grad_(), torch.randn(9, 3).double().requires_grad_()
    bias, target = torch.randn(9).double().requires_grad_(), torch.tensor([0, 8, 3, 3])
    support = Support.pack([torch.tensor(x) for x in ([0, 4, 5], [~2], [3, 1], [~0, ~8])])

    def both(h, w, b):
        return linear_logp(h, w, b, target, temperature=0.8, softcap=4.0, logit_scale=1.5,
                           entropy=True, support=support if with_support else None, chunk=3)  # fmt: skip

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))


def test_only_the_gradients_that_are_needed():
    hidden, weight, bias, target = inputs()
    frozen = linear_logp(hidden, weight.detach(), bias.detach(), target)[0]
    whole = linear_logp(hidden, weight, bias, target)[0]
    frozen_grad, whole_grad = (torch.autograd.grad(x.sum(), hidden)[0] for x in (frozen, whole))
    assert torch.equal(frozen_grad, whole_grad)
    assert not linear_logp(hidden.detach(), weight.detach(), None, target)[0].requires_grad


def test_chunk_changes_nothing():
    hidden, weight, bias, target = inputs()
    values = [linear_logp(hidden, weight, bias, target, chunk=c)[0] for c in (1, 4, N, 100)]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-13, atol=1e-13)


def test_no_tokens_at_all():
    hidden, weight, bias, target = inputs()
    logp, entropy = linear_logp(hidden[:0], weight, bias, target[:0], entropy=True)
    assert logp.shape == entropy.shape == (0,)
    (logp.sum() + entropy.sum()).backward()
    assert not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_summed_in_float32(dtype):
    hidden, weight, bias, target = inputs(dtype=dtype)
    expected = reference(hidden, weight, bias, target)
    actual = linear_logp(hidden, weight, bias, target, entropy=True)
    for e, a in zip(expected, actual, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)
    ours = torch.autograd.grad(actual[0].sum() + actual[1].sum(), (hidden, weight, bias))
    theirs = torch.autograd.grad(expected[0].sum() + expected[1].sum(), (hidden, weight, bias))
    for a, e in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), e.double(), rtol=0.02, atol=0.02)


def test_autocast_multiplies_in_its_dtype_and_sums_in_float32():
    hidden, weight, bias, target = inputs(dtype=torch.float32)
    rounded = [x.detach().bfloat16() for x in (hidden, weight)]
    expected = reference(*rounded, bias, target)[0]
    with torch.autocast("cpu", torch.bfloat16):
        logp = linear_logp(hidden, weight, bias, target)[0]
    torch.testing.assert_close(logp.double(), expected, rtol=1e-4, atol=1e-4)
    logp.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_extreme_logits_stay_finite():
    hidden, weight, bias, target = inputs(dtype=torch.float32)
    logp, entropy = linear_logp(hidden * 1e4, weight, bias, target, entropy=True)
    assert logp.isfinite().all()
    assert entropy.abs().max() < 1e-3
    (logp.sum() + entropy.sum()).backward()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_no_denormal_numbers_reach_the_products(monkeypatch):
    hidden, weight, bias, target = inputs(dtype=torch.float32)
    seen = []
    monkeypatch.setattr(logprob, "_addmm_", lambda out, a, b: seen.append(a.clone()))
    logp, _ = linear_logp(hidden * 30, weight, bias, target)
    logp.sum().backward()
    tiny = torch.finfo(torch.float32).tiny
    assert any((du == 0).any() for du in seen)
    assert all(((du == 0) | (du.abs() >= tiny)).all() for du in seen)


def test_target_outside_the_support_is_minus_infinity_without_gradient():
    hidden, weight, bias, target = inputs()
    support = Support.pack([torch.tensor([(t + 1) % V, (t + 7) % V]) for t in target.tolist()])
    logp, entropy = linear_logp(hidden, weight, bias, target, support=support, entropy=True)
    assert (logp == -torch.inf).all()
    assert (entropy > 0).all()
    logp.exp().sum().backward()
    assert not hidden.grad.any()


def test_target_outside_the_vocabulary_is_nan():
    hidden, weight, bias, target = inputs()
    target = target.clone()
    target[2] = V
    logp = linear_logp(hidden, weight, bias, target)[0]
    assert logp.isnan().tolist() == [False, False, True, False, False, False, False]


def test_support_masks():
    support = Support.pack([torch.tensor([1, 4]), torch.tensor([~0, ~5]), torch.tensor([], dtype=torch.int64)])
    assert support.allowed(0, 3, 0, 6).int().tolist() == [
        [0, 1, 0, 0, 1, 0], [0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1],
    ]  # fmt: skip
    assert support.allowed(1, 2, 4, 6).int().tolist() == [[1, 0]]
    with pytest.raises(ValueError, match="together"):
        Support.pack([torch.tensor([1, ~2])])
    with pytest.raises(ValueError, match="covers 3 tokens"):
        linear_logp(*inputs(), support=support)


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature"):
        linear_logp(*inputs(), temperature=0.0)


def test_head_gives_the_logits_that_logp_is_made_of():
    hidden, weight, bias, target = inputs(dtype=torch.bfloat16)
    logits = Head(weight, bias, logit_scale=0.5, softcap=6.0).logits(hidden.view(1, N, H))
    assert logits.shape == (1, N, V)
    assert logits.dtype == torch.float32
    logp = linear_logp(hidden, weight, bias, target, logit_scale=0.5, softcap=6.0)[0]
    expected = logits[0].log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-5)


PEAK = """
import resource, sys, torch
torch.set_num_threads(1)
from steersman.ops.logprob import linear_logp
N, H, V = 512, 256, 128_000
hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H).div_(16).requires_grad_()
target = torch.randint(0, V, (N,))
(torch.randn(64, H, requires_grad=True) @ torch.randn(H, 64)).sum().backward()  # start the threads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "plain":
    logp = (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None])[:, 0]
else:
    logp = linear_logp(hidden, weight, None, target)[0]
logp.sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_peak_memory_is_at_most_a_quarter_of_the_plain_way():
    def peak(way: str) -> int:
        run = subprocess.run([sys.executable, "-c", PEAK, way], capture_output=True, text=True, check=True)
        return int(run.stdout)

    plain, fused = peak("plain"), peak("fused")
    # the weight's own gradient, V x H float32, is 125 MiB of either
    assert fused <= plain / 4, f"{fused / 1024:.0f} MiB against {plain / 1024:.0f} MiB"
