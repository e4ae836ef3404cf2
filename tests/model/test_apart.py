"""Rows read one behind the other, on a CPU, against one padded batch in float64."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from fast_paths import small
from model_inputs import batch, gradients, plainly

from steersman import native
from steersman.model.fast import apart, shared_apart
from steersman.model.fast.plain import plain_layers
from steersman.model.modes import checkpoint_activations
from steersman.model.policy import Policy
from steersman.model.reader import CausalReader
from steersman.types import Tokens

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled loops: {native.why_not()}")


def trunk_of(family: str, **settings: Any) -> Any:
    model = small(family, **settings)
    Policy(model, None)  # makes it quick
    return model.base_model


def watch(trunk: Any) -> list[int]:
    """The tokens of each read of the trunk from now on."""
    read: list[int] = []
    trunk.register_forward_pre_hook(
        lambda _m, _args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return read


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "olmo", "granite", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("together", [1, 40, 2048])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_same_states_and_gradients(family, extra, shared, together, checkpointed, monkeypatch):
    trunk = trunk_of(family)
    double = deepcopy(trunk).double()
    if checkpointed:
        checkpoint_activations(trunk)
    monkeypatch.setattr(apart, "TOKENS_PER_READ", together)
    monkeypatch.setattr(shared_apart, "PROMPTS_PER_LINE", 0)
    reader, tokens = CausalReader(trunk, shares={} if shared else {(checkpointed, True): False}), batch()
    found, expected = reader.hidden(tokens, extra), plainly(double, tokens, extra)
    assert reader.keeps_apart
    takes = not (checkpointed and family == "gpt2")  # whose trunk takes the memory away itself
    assert reader.shares == {(checkpointed, True): shared and takes}
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(gradients(trunk, found, weight), gradients(double, expected, weight.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("shared", [False, True])
def test_ends(shared):
    trunk, tokens = trunk_of("llama"), batch()
    before, after = CausalReader(trunk, shares={(False, True): shared}).ends(tokens)
    flat = plainly(trunk, tokens, 1)
    last = (tokens.response_length + 1).cumsum(0) - 1
    torch.testing.assert_close(before, flat[last - tokens.response_length], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after, flat[last], rtol=1e-4, atol=1e-5)


def test_nothing_is_padded_and_shared_prompts_are_read_once():
    trunk, tokens = trunk_of("llama"), batch()
    CausalReader(trunk).hidden(tokens)
    all_tokens, of_responses = int(tokens.length.sum()), int(tokens.response_length.sum())
    for shared, expected in ((False, [all_tokens]), (True, [13 + 10 + 11 + of_responses])):
        reader = CausalReader(trunk, keeps_apart=True, shares={(False, True): shared}, feed_forward=False)
        read = watch(trunk)
        reader.hidden(tokens)
        assert read == expected


def test_a_weight_has_one_gradient_of_prompts_and_responses():
    """Were there two, the first of every layer would wait in memory for the second, of the whole model's size."""
    trunk, tokens = trunk_of("llama"), batch()
    made: list[int] = []
    layer = trunk.layers[0].mlp.down_proj
    layer.register_full_backward_hook(lambda *_: made.append(1))
    reader = CausalReader(trunk, keeps_apart=True, shares={(False, True): True}, feed_forward=False)
    reader.hidden(tokens).sum().backward()
    assert made == [1]


def test_prompts_are_read_again_where_their_responses_need_several_lines(monkeypatch):
    monkeypatch.setattr(apart, "TOKENS_PER_READ", 1)
    trunk, tokens = trunk_of("llama"), Tokens.from_ids([[1, 2]] * 7 + [[3]], [[4, 5, 6]] * 7 + [[7]])
    reader = CausalReader(trunk, keeps_apart=True, shares={(False, True): True}, feed_forward=False)
    read = watch(trunk)
    found = reader.hidden(tokens)
    assert read == [2 + 4 * 3, 2 + 3 * 3 + 1 + 1]  # a line has room for eight times its longest prompt
    torch.testing.assert_close(found, plainly(trunk, tokens, 0), rtol=1e-4, atol=1e-5)


def test_no_response_has_a_token():
    trunk, tokens = trunk_of("llama"), Tokens.from_ids([[3, 4, 5]] * 3, [[]] * 3)
    torch.testing.assert_close(CausalReader(trunk).hidden(tokens, 1), plainly(trunk, tokens, 1))


def test_lines_keep_the_order_and_have_so_many_tokens(monkeypatch):
    monkeypatch.setattr(apart, "TOKENS_PER_READ", 10)
    groups = apart.lines(torch.tensor([4, 6, 1, 30, 2, 0, 8]))
    assert [group.tolist() for group in groups] == [[0, 1], [2], [3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("family", "settings"),
    [("bloom", {}), ("mistral", {"sliding_window": 8}), ("llama", {"head_dim": 8})],
)
def test_models_whose_attention_is_not_told_are_padded(family, settings):
    """Positions or attention of their own, windows, heads of a width that the loops do not take."""
    trunk = trunk_of(family, **settings)
    reader, tokens = CausalReader(trunk), batch()
    torch.testing.assert_close(reader.hidden(tokens), plainly(trunk, tokens, 0), rtol=1e-4, atol=1e-5)
    assert not reader.keeps_apart


def test_where_the_loops_do_not_run_rows_are_padded(monkeypatch):
    monkeypatch.setattr("steersman.model.reader.call_cost", lambda _device: 1 << 20)  # no prompt is shared
    trunk, tokens = trunk_of("llama"), batch()
    reader = CausalReader(trunk)
    expected = reader.hidden(tokens)
    read = watch(trunk)
    with plain_layers():
        torch.testing.assert_close(reader.hidden(tokens), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu"):
        torch.testing.assert_close(reader.hidden(tokens).float(), expected, rtol=0.1, atol=0.1)
    assert read == [int(tokens.length.max()) * len(tokens)] * 2
    monkeypatch.setattr(apart, "LONGEST", int(tokens.length.max()))
    assert apart.fits(trunk, tokens)
    monkeypatch.setattr(apart, "LONGEST", int(tokens.length.max()) - 1)
    assert not apart.fits(trunk, tokens)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "phi3"])
def test_rows_that_a_window_cuts_are_padded(family):
    """And those that it shows whole are not, whatever else the batch before had."""
    tokens = batch()
    window = int(tokens.length.max()) - 1
    trunk = trunk_of(family, sliding_window=window)
    reader, short = CausalReader(trunk), tokens.rows((tokens.length <= window).nonzero()[:, 0])
    read = watch(trunk)
    for some, padded in ((tokens, True), (short, False)):
        torch.testing.assert_close(reader.hidden(some), plainly(trunk, some, 0), rtol=1e-4, atol=1e-5)
        read.clear()
        reader.hidden(some)
        assert (sum(read) > int(some.length.sum())) == padded
    assert reader.keeps_apart


@pytest.mark.parametrize("family", ["qwen3_next", "granitemoehybrid", "falcon_h1"])
def test_layers_that_keep_a_state_are_padded(family):
    assert apart.longest_seen(trunk_of(family)) == 0


def test_a_row_of_one_token_is_a_row():
    trunk, tokens = trunk_of("llama"), Tokens.from_ids([[3], [4]], [[], [5]])
    torch.testing.assert_close(CausalReader(trunk).hidden(tokens, 1), plainly(trunk, tokens, 1), rtol=1e-4, atol=1e-5)
