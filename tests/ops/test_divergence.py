"""The fused divergences against float64 transcriptions of their papers, in value, gradient and memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from steersman.ops.divergence import DIVERGENCES, TeacherStates, TeacherTopK, linear_divergence, sorted_distance
from steersman.ops.logprob import Head

N, H, V = 7, 5, 40


def student(vocab=V, softcap=None, scale=1.0):
    torch.manual_seed(0)
    hidden = torch.randn(N, H, dtype=torch.float64).requires_grad_()
    weight = torch.randn(vocab, H, dtype=torch.float64).requires_grad_()
    bias = torch.randn(vocab, dtype=torch.float64).requires_grad_()
    return hidden, Head(weight, bias, scale, softcap)


def teacher(vocab=V):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, 9, dtype=torch.float64, generator=generator)
    return TeacherStates(hidden, Head(torch.randn(vocab, 9, dtype=torch.float64, generator=generator)))


def kl(a, b):
    return (a * (a / b).log()).sum(-1)


def paper(kind, p, q, mix):
    """From probabilities, as the papers write them."""
    if kind == "forward_kl":
        return kl(p, q)
    if kind == "reverse_kl":
        return kl(q, p)
    if kind == "jsd":  # GKD, eq. 1
        m = mix * p + (1 - mix) * q
        return mix * kl(p, m) + (1 - mix) * kl(q, m)
    if kind == "skew_kl":  # DistiLLM, eq. 3
        return kl(p, mix * p + (1 - mix) * q)
    return kl(q, (1 - mix) * p + mix * q)


def probabilities(hidden, head, temperature=1.0, width=V):
    z = head.logit_scale * (hidden @ head.weight.T + (0 if head.bias is None else head.bias))
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return torch.softmax(z[:, :width] / temperature, -1)


def same(found, expected, leaves):
    g = torch.linspace(-1, 2, N, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for x, y in zip(
        torch.autograd.grad((g * found).sum(), leaves), torch.autograd.grad((g * expected).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("mix", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("form", [{}, {"temperature": 0.7}, {"softcap": 3.0, "scale": 0.5, "temperature": 1.5}])
def test_value_and_gradient_equal_the_papers(kind, mix, form):
    temperature = form.get("temperature", 1.0)
    hidden, head = student(softcap=form.get("softcap"), scale=form.get("scale", 1.0))
    taught = teacher()
    found = linear_divergence(hidden, head, taught, kind, mix=mix, temperature=temperature, chunk=3)
    p, q = probabilities(taught.hidden, taught.head, temperature), probabilities(hidden, head, temperature)
    same(found, paper(kind, p, q, mix), [hidden, head.weight, head.bias])


def listed(taught, k=6):
    p = probabilities(taught.hidden, taught.head)
    ids = p.topk(k).indices
    return p, ids, TeacherTopK(ids, p.gather(1, ids).log())


def bucketed(p, ids):
    inside = p.gather(1, ids)
    return torch.cat([inside, 1 - inside.sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_listed_teacher_is_compared_over_the_list_and_the_rest(kind):
    hidden, head = student()
    p, ids, few = listed(teacher())
    found = linear_divergence(hidden, head, few, kind, mix=0.3, chunk=2)
    q = probabilities(hidden, head)
    same(found, paper(kind, bucketed(p, ids), bucketed(q, ids), 0.3), [hidden, head.weight, head.bias])


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("form", [{}, {"softcap": 3.0, "scale": 0.5, "temperature": 1.5}])
def test_the_student_s_likeliest_tokens_alone_are_compared_with_or_without_the_rest(kind, tail, form):
    temperature = form.get("temperature", 1.0)
    hidden, head = student(softcap=form.get("softcap"), scale=form.get("scale", 1.0))
    taught = teacher()
    found = linear_divergence(
        hidden, head, taught, kind, mix=0.3, temperature=temperature, top_k=6, tail=tail, chunk=3
    )
    p, q = probabilities(taught.hidden, taught.head, temperature), probabilities(hidden, head, temperature)
    ids = q.topk(6).indices

    def over(x):
        inside = x.gather(1, ids)
        return bucketed(x, ids) if tail else inside / inside.sum(-1, keepdim=True)

    same(found, paper(kind, over(p), over(q), 0.3), [hidden, head.weight, head.bias])
    whole = linear_divergence(hidden, head, taught, kind, mix=0.3, temperature=temperature)
    everything = linear_divergence(
        hidden, head, taught, kind, mix=0.3, temperature=temperature, top_k=V + 5, tail=tail
    )
    same(everything, whole, [hidden, head.weight, head.bias])


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_what_the_list_leaves_out_only_lowers_a_divergence_and_by_how_much(kind):
    hidden, head = student()
    taught = teacher()
    p, ids, few = listed(taught)
    q = probabilities(hidden, head).detach()
    cut = linear_divergence(hidden, head, few, kind, mix=0.3).detach()
    whole = linear_divergence(hidden, head, taught, kind, mix=0.3).detach()
    assert (cut < whole).all()
    rest = torch.ones_like(p).scatter(1, ids, 0.0)
    mass = {"p": (p * rest).sum(-1, keepdim=True), "q": (q * rest).sum(-1, keepdim=True)}
    inside = torch.where(rest > 0, (p / mass["p"]) / (q / mass["q"]), 1.0).log()
    if kind == "forward_kl":
        torch.testing.assert_close(whole - cut, (p * rest * inside).sum(-1))
    if kind == "reverse_kl":
        torch.testing.assert_close(whole - cut, -(q * rest * inside).sum(-1))


def test_limits():
    """jsd over b and over 1 - b goes to the two KLs; a skew of 0 is none, and one of 1 is nothing."""
    hidden, head = student()
    taught = TeacherStates(0.2 * teacher().hidden, teacher().head)

    def found(kind, mix=0.5):
        return linear_divergence(hidden, head, taught, kind, mix=mix).detach()

    torch.testing.assert_close(found("jsd", 1e-8) / 1e-8, found("forward_kl"), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found("jsd", 1 - 1e-8) / 1e-8, found("reverse_kl"), rtol=1e-3, atol=1e-4)
    assert torch.equal(found("skew_kl", 0.0), found("forward_kl"))
    assert torch.equal(found("skew_reverse_kl", 0.0), found("reverse_kl"))
    assert found("skew_kl", 1.0).abs().max() == 0


def test_padded_vocabularies_are_compared_where_both_have_ids():
    hidden, head = student(vocab=V + 3)
    found = linear_divergence(hidden, head, teacher(V), "reverse_kl")
    expected = paper("reverse_kl", probabilities(teacher().hidden, teacher().head), probabilities(hidden, head), 0)
    same(found, expected, [hidden, head.weight, head.bias])


def test_chunk_changes_nothing_and_the_teacher_learns_nothing():
    hidden, head = student()
    taught = teacher()
    taught.head.weight.requires_grad_()
    values = [linear_divergence(hidden, head, taught, "jsd", chunk=c) for c in (1, 3, N, 50)]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-12, atol=1e-14)
    values[0].sum().backward()
    assert taught.head.weight.grad is None


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.numel())
        return out


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_all_logits_never_stand_at_once(kind):
    torch.manual_seed(0)
    many, wide = 64, 500
    hidden, head = torch.randn(many, 4, requires_grad=True), Head(torch.randn(wide, 4, requires_grad=True))
    taught = TeacherStates(torch.randn(many, 4), Head(torch.randn(wide, 4)))
    with Largest() as seen:
        linear_divergence(hidden, head, taught, kind, chunk=4).sum().backward()
    assert seen.most == 4 * wide


def test_steep_distributions_stay_finite():
    """One-hot on both sides, on different tokens, in float32."""
    hidden = torch.tensor([[300.0, 0.0]], requires_grad=True)
    head = Head(torch.eye(2))
    for kind in DIVERGENCES:
        for taught in (
            TeacherStates(torch.tensor([[0.0, 300.0]]), head),
            TeacherTopK(torch.tensor([[1]]), torch.zeros(1, 1)),
        ):
            value = linear_divergence(hidden, head, taught, kind)
            (slope,) = torch.autograd.grad(value.sum(), hidden)
            assert value.isfinite().all()
            assert slope.isfinite().all()


def test_lower_precision_is_summed_in_float32():
    torch.manual_seed(0)
    hidden, weight, other = (torch.randn(n, 16) for n in (9, 60, 9))
    exact = linear_divergence(hidden, Head(weight), TeacherStates(other, Head(weight)), "forward_kl")
    half = linear_divergence(
        hidden.bfloat16(),
        Head(weight.bfloat16()),
        TeacherStates(other.bfloat16(), Head(weight.bfloat16())),
        "forward_kl",
    )
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.05)


def test_sorted_distance_compares_probabilities_in_order_across_vocabularies():
    hidden, head = student()
    taught = teacher(V + 5)
    found = sorted_distance(hidden, head, taught, temperature=0.8, chunk=3)
    p = probabilities(taught.hidden, taught.head, 0.8, V + 5).numpy().copy()
    q = probabilities(hidden, head, 0.8)
    p[:, ::-1].sort(1)
    order = q.detach().numpy().argsort(1)[:, ::-1].copy()
    ranked = torch.cat([q.gather(1, torch.from_numpy(order)), torch.zeros(N, 5, dtype=torch.float64)], 1)
    same(found, (torch.from_numpy(p) - ranked).abs().sum(1), [hidden, head.weight, head.bias])


def test_refusals():
    hidden, head = student()
    with pytest.raises(ValueError, match="mix"):
        linear_divergence(hidden, head, teacher(), "jsd", mix=1.5)
    with pytest.raises(ValueError, match="top_k 0"):
        linear_divergence(hidden, head, teacher(), "jsd", top_k=0)
    with pytest.raises(ValueError, match="logits of all tokens"):
        linear_divergence(hidden, head, listed(teacher())[2], "jsd", top_k=3)
    with pytest.raises(ValueError, match="7"):
        linear_divergence(hidden, head, TeacherTopK(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1)), "jsd")
