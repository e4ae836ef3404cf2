"""States that nobody reads get no feed-forward layer at the end; those that are read, and all gradients, stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from steersman.model import reader as reader_module
from steersman.model.fast.fused import quicken
from steersman.model.fast.narrow import last_feed_forward, narrowed
from steersman.model.modes import checkpoint_activations
from steersman.model.reader import CausalReader
from steersman.types import Tokens


def batch() -> Tokens:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 97, (n,), generator=draw).tolist() for n in (14, 11, 14, 3, 6, 0)]
    return Tokens.from_ids([ids[0], ids[1], ids[2]], ids[3:])


def gradients(trunk: Any, out: torch.Tensor) -> dict[str, torch.Tensor]:
    trunk.zero_grad()
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {name: p.grad.clone() for name, p in trunk.named_parameters()}


def count_rows(part: torch.nn.Module) -> list[int]:
    seen: list[int] = []
    for layer in part.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[:-1].numel()))
            return seen
    raise AssertionError


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("reads", ["hidden", "values", "ends", "packed"])
@pytest.mark.parametrize("alike", [False, True])
def test_what_is_read_stays_as_it_is(family, reads, alike, monkeypatch):
    trunk = tiny_model(family).base_model.double()
    tokens = batch()
    if alike:  # all have one prompt, which is then read once
        tokens.prompt[:], tokens.prompt_length[:] = tokens.prompt[0].clone(), 14
        monkeypatch.setattr(reader_module, "call_cost", lambda _device: 0)

    def read(reader: CausalReader) -> torch.Tensor:
        if reads == "ends":
            return torch.cat(reader.ends(tokens))
        return reader.hidden(tokens, extra=int(reads == "values"))

    pack = 64 if reads == "packed" else None
    expected = read(CausalReader(trunk, pack, feed_forward=False))
    wanted = gradients(trunk, expected)
    reader = CausalReader(trunk, pack)
    found = read(reader)
    assert reader.feed_forward is not False
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    for name, grad in gradients(trunk, found).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-7, atol=1e-10)


def test_only_what_is_read_is_worked_on():
    trunk = tiny_model("llama").base_model
    reader, tokens = CausalReader(trunk), batch()
    seen = count_rows(trunk.layers[-1].mlp)
    reader.ends(tokens)
    del seen[:-1]  # before are the questions whether it may
    assert seen == [5]  # the first and last state of each row; an empty response has one
    reader.hidden(tokens)
    assert seen[1:] == [9]
    other = count_rows(trunk.layers[0].mlp)
    reader.hidden(tokens)
    assert sum(other) >= int(tokens.length.sum())


def test_where_nearly_all_is_read_all_is_made():
    part = torch.nn.Sequential(torch.nn.Linear(3, 3))
    seen = count_rows(part)
    x = torch.ones(1, 10, 3)
    with narrowed(part, torch.arange(9), 10):
        part(x)
    with narrowed(part, torch.arange(8), 10):
        out = part(x)
    assert seen == [10, 8]
    assert out.shape == x.shape
    assert not out[0, 8:].any()


def test_the_layer_is_put_back():
    trunk = tiny_model("llama").base_model
    quicken(trunk)
    part = trunk.layers[-1].mlp
    own = vars(part)["forward"]
    with pytest.raises(KeyError), narrowed(part, torch.tensor([1]), 10):
        raise KeyError
    assert vars(part)["forward"] is own
    plain = torch.nn.Linear(3, 3)
    with narrowed(plain, torch.tensor([1]), 10):
        assert "forward" in vars(plain)
    assert "forward" not in vars(plain)


class Looks(torch.nn.Module):
    """A last norm that mixes each state with those before it."""

    def forward(self, x):
        return x.cumsum(1)


def test_a_model_whose_states_meet_again_is_left_whole():
    trunk = tiny_model("llama").base_model
    assert last_feed_forward(trunk, 97) is trunk.layers[-1].mlp
    trunk.norm = Looks()
    assert last_feed_forward(trunk, 97) is None
    trunk = tiny_model("llama").base_model
    trunk.layers = torch.nn.ModuleList([*trunk.layers, trunk.layers[0]])
    assert last_feed_forward(trunk, 97) is None  # no stack as deep as the config says


def test_checkpointing_runs_layers_again_and_is_left_alone():
    model = tiny_model("llama")
    checkpoint_activations(model)
    reader = CausalReader(model.base_model)
    reader.hidden(batch()).sum().backward()
    assert reader.feed_forward is None
