"""Reading with fewer tokens: groups of like length and shared prompts against one padded batch, and the plan."""

from __future__ import annotations

import itertools

import pytest
import torch
from model_inputs import batch, gradients, plainly
from tiny_models import FAMILIES, tiny_model

from steersman.model.fast import shared
from steersman.model.modes import checkpoint_activations
from steersman.model.probe import cache_argument
from steersman.model.reader import CausalReader, EncoderDecoderReader
from steersman.types import Tokens

SHARES = {"gpt2": True, "llama": True, "qwen2": True, "qwen3": True, "gemma3": False}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("cost", [0, 3, 1 << 20])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_same_states_and_gradients(family, extra, cost, checkpointed, monkeypatch):
    trunk = tiny_model(family).base_model.double()
    if checkpointed:
        checkpoint_activations(trunk)
    tokens, reader = batch(), CausalReader(trunk)
    monkeypatch.setattr("steersman.model.reader.call_cost", lambda _device: cost)
    found, expected = reader.hidden(tokens, extra), plainly(trunk, tokens, extra)
    shares = SHARES[family] and not (checkpointed and family == "gpt2")  # whose trunk takes the memory away itself
    assert reader.shares == ({(checkpointed, False): shares} if cost < 20 else {})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn(found.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    for a, b in zip(gradients(trunk, found, weight), gradients(trunk, expected, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_ends(family, monkeypatch):
    trunk = tiny_model(family).base_model.double()
    tokens = batch()
    monkeypatch.setattr("steersman.model.reader.call_cost", lambda _device: 2)
    before, after = CausalReader(trunk).ends(tokens)
    flat = plainly(trunk, tokens, 1)
    count = tokens.response_length + 1
    last = count.cumsum(0) - 1
    torch.testing.assert_close(before, flat[last - tokens.response_length], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after, flat[last], rtol=1e-5, atol=1e-6)


def test_shared_prompts_are_read_once(monkeypatch):
    trunk = tiny_model("llama").base_model
    seen: list[int] = []
    trunk.register_forward_hook(
        lambda _m, _args, kwargs, _out: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    tokens = batch()
    reader = CausalReader(trunk, keeps_apart=False, shares={(False, False): True}, feed_forward=False)
    monkeypatch.setattr("steersman.model.reader.call_cost", lambda _device: 0)
    reader.hidden(tokens)
    # three prompts padded to 13; responses without any padding, but for the empty one, which is read as one token
    assert sum(seen) == 3 * 13 + int(tokens.response_length.sum()) + 1


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_gradients_are_the_same_numbers_with_two_threads(family, monkeypatch):
    """Gradients of what many rows share of a prompt, enough of them that torch adds up in threads."""
    monkeypatch.setattr("steersman.model.reader.call_cost", lambda _device: 0)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (96, 48), generator=draw).tolist()
    tokens = Tokens.from_ids([ids[i % 4] for i in range(96)], [row[:6] for row in ids])
    model, before = tiny_model(family), torch.get_num_threads()
    if family == "llama":
        reader = CausalReader(model.model, shares={(False, False): True})
    else:
        reader = EncoderDecoderReader(model.encoder, model.decoder, (0,))
    torch.set_num_threads(2)
    try:
        found = []
        for _ in range(8):
            states = reader.hidden(tokens)
            found.append(gradients(model, states, states.detach()))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_checkpointed_layers_read_shared_prompts_once_and_again_once(monkeypatch):
    """Layers run once with their prompts' memory and once more in the backward pass, on as few tokens; nothing that
    they make between is kept."""
    model = tiny_model("llama")
    checkpoint_activations(model)
    read: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _m, args: read.append(args[0][..., 0].numel()))
    kept: list[torch.Size] = []
    monkeypatch.setattr("steersman.model.reader.call_cost", lambda _device: 0)
    reader, tokens = CausalReader(model.base_model, keeps_apart=False, shares={(True, False): True}), batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        states = reader.hidden(tokens)
    fewest = 3 * 13 + int(tokens.response_length.sum()) + 1
    assert sum(read) == fewest
    assert model.config.intermediate_size not in {shape[-1] for shape in kept if shape}
    states.sum().backward()
    assert sum(read) == 2 * fewest


def test_a_memory_that_is_taken_from_checkpointed_layers_turns_sharing_off(monkeypatch):
    """As some families do themselves."""
    model = tiny_model("llama")
    checkpoint_activations(model)
    monkeypatch.setattr("steersman.model.reader.call_cost", lambda _device: 0)
    name = cache_argument(type(model.model))
    for layer in model.model.layers:
        monkeypatch.setattr(layer, "forward", lambda *a, run=layer.forward, **k: run(*a, **(k | {name: None})))
    reader, tokens = CausalReader(model.base_model), batch()
    torch.testing.assert_close(reader.hidden(tokens), plainly(model.base_model, tokens, 0))
    assert reader.shares == {(True, False): False}


def test_both_ways_to_run_are_tried_apart(monkeypatch):
    """gpt2 takes the memory away while it is checkpointed; in evaluation mode it is not."""
    trunk = tiny_model("gpt2").base_model
    checkpoint_activations(trunk)
    monkeypatch.setattr("steersman.model.reader.call_cost", lambda _device: 0)
    reader, tokens = CausalReader(trunk), batch()
    torch.testing.assert_close(reader.hidden(tokens), plainly(trunk, tokens, 0))
    trunk.eval()
    torch.testing.assert_close(reader.hidden(tokens), plainly(trunk, tokens, 0))
    assert reader.shares == {(True, False): False, (False, False): True}


def test_groups_are_the_cheapest():
    draw = torch.Generator().manual_seed(0)
    for cost in (0, 5, 40):
        for _ in range(2):
            length = torch.randint(1, 30, (5,), generator=draw)
            groups = shared.like_lengths(length, cost)
            assert sorted(torch.cat(groups).tolist()) == list(range(5))
            assert all((g.diff() > 0).all() for g in groups)
            found = sum(len(g) * int(length[g].max()) + cost for g in groups)
            # not only consecutive groups are tried, so this checks that restriction too
            others = (price(length.tolist(), label, cost) for label in itertools.product(range(5), repeat=5))
            assert found == min(others)


def price(length: list[int], label: tuple[int, ...], cost: int) -> int:
    """Of an arbitrary grouping into any groups."""
    groups = [[n for n, g in zip(length, label, strict=True) if g == k] for k in set(label)]
    return sum(len(group) * max(group) + cost for group in groups)
