"""The compiled inner loops do what torch does, and their absence changes nothing but the time."""

from __future__ import annotations

import os

import pytest
import torch
from forked import Python
from rollout_oracle import ENDS, ragged
from tiny_models import tiny_model
from torch.nn.functional import scaled_dot_product_attention

from steersman import native
from steersman.native.decode import decode_attention
from steersman.native.decode import draw as draw_compiled
from steersman.rollout import Engine, Sampling
from steersman.rollout.sampling import draw

needs_native = pytest.mark.skipif(native.library() is None, reason=f"no compiled loops: {native.why_not()}")


def inputs(rows=3, heads=4, kv_heads=2, columns=37, width=32, value_width=None, dtype=torch.float32):
    """A query, and keys and values that are slices of a larger buffer, as the live cache gives them."""
    random = torch.Generator().manual_seed(columns + width)
    buffer = torch.randn(
        2, rows + 2, kv_heads, columns + 9, max(width, value_width or 0), generator=random, dtype=dtype
    )
    keys, values = buffer[0, ..., :width], buffer[1, ..., : value_width or width]
    keys, values = (x.contiguous()[:rows].narrow(2, 4, columns) for x in (keys, values))
    return torch.randn(rows, heads, 1, width, generator=random, dtype=dtype), keys, values


def plain(query, keys, values, mask, scale):
    out = scaled_dot_product_attention(
        query.double(), keys.double(), values.double(), None if mask is None else mask.double(), scale=scale,
        enable_gqa=True,
    )  # fmt: skip
    return out.transpose(1, 2)


@needs_native
@pytest.mark.parametrize("width", [4, 8, 16, 24, 32, 64, 80, 128])
@pytest.mark.parametrize("columns", [1, 3, 16, 37, 130])
def test_attention_of_one_token_is_the_softmax_over_its_columns(width, columns):
    query, keys, values = inputs(columns=columns, width=width)
    out = decode_attention(query, keys, values, None, 0.3)
    torch.testing.assert_close(out.double(), plain(query, keys, values, None, 0.3), atol=2e-6, rtol=1e-5)


@needs_native
@pytest.mark.parametrize(("width", "value_width"), [(8, 8), (32, 32), (32, 48)])
def test_masked_columns_have_no_part_in_it(width, value_width):
    query, keys, values = inputs(columns=50, width=width, value_width=value_width)
    mask = torch.zeros(3, 1, 1, 60)[..., 5:55]  # strided, as the live cache's is
    mask[0, ..., :21], mask[1, ..., :49], mask[2, ..., 30:40] = -torch.inf, -torch.inf, -torch.inf
    expected = plain(query, keys, values, mask, 0.2)
    torch.testing.assert_close(
        decode_attention(query, keys, values, mask, 0.2).double(), expected, atol=2e-6, rtol=1e-5
    )
    torch.testing.assert_close(
        decode_attention(query, keys, values, mask[:1], 0.2).double(),
        plain(query, keys, values, mask[:1].expand(3, -1, -1, -1), 0.2), atol=2e-6, rtol=1e-5,
    )  # fmt: skip


@needs_native
def test_scores_far_apart_do_not_overflow():
    query, keys, values = inputs(width=16)
    expected = plain(query * 200, keys, values, None, 1.0)
    torch.testing.assert_close(
        decode_attention(query * 200, keys, values, None, 1.0).double(), expected, atol=1e-5, rtol=1e-5
    )


@needs_native
@pytest.mark.parametrize("vocab", [1, 7, 256, 300, 5000])
def test_a_draw_is_the_inverse_of_the_running_sum(vocab):
    random = torch.Generator().manual_seed(vocab)
    x = 4 * torch.randn(64, vocab + 3, generator=random)[:, :vocab]
    x[::2, ::3] = -torch.inf
    x[:, -1] = 0
    uniform = torch.rand(64, generator=random)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-24])
    ids, logp = draw_compiled(x, uniform)
    expected = x.double().log_softmax(-1)
    cumulative = expected.exp().cumsum(-1)
    at = cumulative.gather(1, ids[:, None]).squeeze(1)
    torch.testing.assert_close(logp.double(), expected.gather(1, ids[:, None]).squeeze(1), atol=2e-6, rtol=0)
    assert (at > uniform - 1e-6).all()
    assert (at - expected.gather(1, ids[:, None]).squeeze(1).exp() <= uniform + 1e-6).all()
    assert (logp > -torch.inf).all()
    plain_ids, plain_logp = draw(x.double(), uniform.double())
    assert (plain_ids == ids).float().mean() > 0.98
    torch.testing.assert_close(logp[plain_ids == ids].double(), plain_logp[plain_ids == ids], atol=2e-6, rtol=0)


@needs_native
def test_logits_that_are_not_finite_give_no_finite_probability():
    x = torch.zeros(3, 40)
    x[0, 5], x[1, 7], x[2] = torch.nan, torch.inf, -torch.inf
    assert draw_compiled(x, torch.full((3,), 0.5))[1].isnan().all()


WITHOUT = """
import sys; sys.path[:0] = [{tests!r}, {rollout!r}]
import torch
from forked import Python
from rollout_oracle import ENDS, ragged
from tiny_models import tiny_model
from steersman import native
from steersman.rollout import Engine, Sampling
assert native.library() is None
print(native.why_not())
samples = Engine(tiny_model("qwen3"), max_batch=4, eos_token_id=ENDS).generate(ragged(5), Sampling(10), n=2, seed=3)
print([s.ids for s in samples])
"""


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"STEERSMAN_NATIVE": "0"}, "STEERSMAN_NATIVE is 0"), ({"PATH": "", "CXX": ""}, "no C++ compiler was found")],
)
def test_without_it_the_same_samples_come_from_plain_torch(change, reason, tmp_path):
    here = os.path.dirname(__file__)
    code = WITHOUT.format(tests=os.path.dirname(here), rollout=here)
    ran = Python("-c", code, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), **change})
    out, error = ran.communicate()
    assert ran.returncode == 0, error
    said, ids = out.strip().splitlines()
    assert reason in said
    engine = Engine(tiny_model("qwen3"), max_batch=4, eos_token_id=ENDS)
    assert ids == str([s.ids for s in engine.generate(ragged(5), Sampling(10), n=2, seed=3)])


@needs_native
def test_generation_puts_the_models_own_attention_back():
    model = tiny_model("llama")
    before = model.config._attn_implementation
    Engine(model, eos_token_id=ENDS).generate(ragged(2), Sampling(2))
    assert model.config._attn_implementation == before
