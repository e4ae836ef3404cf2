"""The forecast of a run's memory against what real small models really hold."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import torch
from letter_models import save_mini
from tiny_models import tiny_model

from steersman import native
from steersman.data import Encoded, collate
from steersman.distributed.micro import micro_batches
from steersman.model import Policy, load_policy
from steersman.model.lora import LoraConfig, add_lora
from steersman.model.modes import checkpoint_activations
from steersman.native.products import rearrange
from steersman.ops import products
from steersman.ops.heap import RELEASE_BYTES
from steersman.plan import memory
from steersman.plan.memory import (
    Load,
    Model,
    SamplingLoad,
    announce,
    foresee,
    forward,
    largest_load,
    rollout,
)
from steersman.rollout import Engine, Sampling, kv_cache_bytes
from steersman.rollout.fast import packed
from steersman.rollout.fast.packed import packed_bytes
from steersman.run.device import Room
from steersman.run.preflight import Phase, Preflight
from steersman.types import Prompt, SteersmanError
from steersman.update.optimizer import Optimizer, OptimizerConfig

CPU = torch.device("cpu")
LOAD = Load(tokens=120, length=40)


def policy_of(family: str = "llama", vocab: int = 96, **config: Any) -> Policy:
    model = tiny_model(family, vocab)
    for key, value in config.items():
        setattr(model.config, key, value)
    return Policy(model, None)


def model_of(policy: Policy) -> Model:
    return Model("policy", policy.model, "here", policy, OptimizerConfig())


def batch(rows: int, length: int) -> Any:
    half = length // 2
    return collate([Encoded([r + 3] * half, [5] * half, [True] * half) for r in range(rows)])


def phase(policy: Policy, name: str) -> Phase:
    return next(p for p in foresee(CPU, [model_of(policy)], LOAD) if p.name == name)


def bytes_of(*tensors: torch.Tensor) -> int:
    """Each storage once, views and tied weights too."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def kept(state: Any) -> list[torch.Tensor]:
    """Every tensor in a state dict."""
    if isinstance(state, torch.Tensor):
        return [state]
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [x for part in inner for x in kept(part)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_and_moments_are_those_that_a_step_makes(dtype):
    policy = Policy(tiny_model("llama").to(dtype), None)
    optimizer = Optimizer(policy.parameters(), OptimizerConfig(), 1)
    foreseen = phase(policy, "update").shares
    policy.logp(batch(3, 20)).logp.sum().backward()
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert foreseen["gradients"] == bytes_of(*gradients)
    optimizer.step()
    assert foreseen["optimizer"] == sum(x.nbytes for x in kept(optimizer.state_dict()["adamw"]) if x.dim())
    assert foreseen["weights"] == bytes_of(*policy.model.parameters(), *policy.model.buffers())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_activations_are_those_that_the_largest_micro_batch_keeps(family, attention):
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    policy = Policy(model, None)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        policy.hidden(batch(1, 100))
    real = bytes_of(*(x for x in kept if x.untyped_storage().data_ptr() not in own))
    assert forward(model_of(policy), Load(100, 100))[0] == pytest.approx(real, rel=0.05)


def test_a_base_in_4_bits_computes_as_wide_as_a_plain_one(tmp_path):
    pytest.importorskip("bitsandbytes")
    policy = load_policy(save_mini(tmp_path), device="cpu", quantise="nf4", lora=LoraConfig(r=2))
    config, shares = policy.model.config, phase(policy, "update").shares
    assert memory._widest(policy.model) == 4 * config.intermediate_size
    widened = 4 * config.hidden_size * config.intermediate_size
    assert shares["backward"] - 4 * memory._widest(policy.model) * LOAD.tokens - 2 * memory.TILE["cpu"][1] == widened


def test_what_is_measured_leaves_no_trace():
    policy = policy_of()
    policy.model.train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    forward(model_of(policy), LOAD)
    assert torch.equal(torch.rand(2), expected)
    assert policy.model.training
    assert all(p.grad is None for p in policy.parameters())


def test_checkpointing_keeps_the_layers_inputs_and_one_layer():
    policy = policy_of()
    plain, freed = forward(model_of(policy), LOAD)
    checkpoint_activations(policy.model)
    foreseen, freed_once = forward(model_of(policy), LOAD)
    config = policy.model.config
    inputs = config.num_hidden_layers * LOAD.tokens * config.hidden_size * 4
    assert plain / 2 + inputs <= foreseen < plain
    assert freed_once == pytest.approx(freed, rel=0.05)


def test_adapters_have_gradients_and_the_rest_has_none():
    policy = policy_of()
    whole = phase(policy, "update").shares
    small = Policy(tiny_model("llama", 96), None)
    add_lora(small.model, LoraConfig(r=2))
    shares = phase(small, "update").shares
    trained = sum(p.numel() for p in small.parameters() if p.requires_grad)
    assert shares["gradients"] == 4 * trained < whole["gradients"]
    assert shares["optimizer"] == 8 * trained
    assert shares["backward"] < whole["backward"]  # no gradient of vocabulary x hidden


def test_the_largest_phase_is_the_peak_and_the_longest_row_counts():
    policy = policy_of()
    short, long = (forward(model_of(policy), Load(n, n))[0] for n in (20, 40))
    assert long == pytest.approx(2 * short, rel=0.05)
    critic = policy_of()
    both = [model_of(policy), Model("critic", critic.model, "here", critic)]
    # the actor's backward pass is done before the critic's forward pass begins
    assert foresee(CPU, both, Load(40, 40))[0].shares["activations"] == long


def test_the_live_cache_has_the_bytes_that_are_foreseen():
    policy = policy_of()
    engine = Engine(policy.model, None, max_batch=3, eos_token_id=[])
    prompts = [Prompt([5] * n, "", index=i) for i, n in enumerate((4, 9, 6, 7))]
    real = set()

    def look(*_):
        layers = engine.decoder.live.live_layers
        real.add(bytes_of(*(x for layer in layers for x in (layer.keys, layer.values) if x is not None)))

    engine.generate(prompts, Sampling(max_new_tokens=8), progress=look)
    sampled = SamplingLoad(policy, 4, 9, 8, engine.limits(4))
    read = kv_cache_bytes(policy.model.config, 1, 3 * 9, torch.float32)  # no more are read than there are rows
    assert {rollout(sampled)["cache"]} == {held + read for held in real}
    assert sum(rollout(sampled, kept=1 << 20).values()) == 1 << 20  # what is small fits into the room that is there


def test_adapters_that_are_added_in_while_sampling_are_counted():
    policy = Policy(tiny_model("llama", 96), None)
    add_lora(policy.model, LoraConfig(r=2, targets=["q_proj"]))
    bytes_ = sum(layer.self_attn.q_proj.base_layer.weight.nbytes for layer in policy.model.model.layers)
    limits = Engine(policy.model).limits(4)
    for steps, expected in ((64, bytes_), (8, 0)):
        assert rollout(SamplingLoad(policy, 4, 9, steps, limits))["adapters added in"] == expected
    shares = rollout(
        SamplingLoad(policy, 4, 9, 64, limits), kept=1 << 20
    )  # small blocks fit into the room that is there
    assert sum(shares.values()) - shares["packed weights"] == 1 << 20


@pytest.mark.skipif(native.library() is None, reason="without the compiled loops no weights are laid out anew")
def test_weights_laid_out_anew_are_counted():
    model = policy_of().model
    linears = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert packed_bytes(model, 64) == sum(panel.data.nbytes for panel in rearrange(linears))
    assert packed_bytes(model, 8) == 0  # too few steps to earn it


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_micro_batch_of_any_batch(seed):
    draw = random.Random(seed)
    costs = [draw.randint(1, 60) for _ in range(40)]
    bound = largest_load(costs, 60, 100, 8).tokens
    seen = 0
    for _ in range(300):
        lengths = torch.tensor(draw.sample(costs, 8))
        seen = max(seen, *(len(rows) * int(lengths[rows].max()) for rows in micro_batches(lengths, 100)))
    assert 0.9 * bound <= seen <= bound
    assert largest_load([30], 30, 100, 8) == Load(30, 30, alone=True)
    assert largest_load([300, 5], 300, 100, 8) == Load(300, 300, alone=False)
    assert largest_load([50] * 9, 50, 100, 8) == Load(100, 50, alone=False)
    assert largest_load([12] * 9, 12, 100, 8) == Load(96, 12, alone=True)


def test_a_run_that_can_not_fit_is_refused_and_a_tight_one_is_told(monkeypatch):
    policy = policy_of()
    total = max(p.total for p in foresee(CPU, [model_of(policy)], LOAD))
    for there, said in ((Room(total // 2, total // 2), None), (Room(4 * total, total // 2), "are free now")):
        monkeypatch.setattr(memory, "room", lambda device, there=there: there)
        pre = Preflight("sft")
        announce(pre, CPU, [model_of(policy)], LOAD)
        if said is None:
            with pytest.raises(SteersmanError, match=r"at its peak and the device has .*lower run\.micro_tokens"):
                pre.check()
        else:
            pre.check()
            assert said in dict(pre.facts)["memory"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the C library of Linux")
def test_a_long_call_of_a_large_model_clears_the_heap_before_and_after(monkeypatch):
    """What an update leaves in the heap is no part of the rollout, and is not there when it begins; and the other way
    round."""
    policy, calls = policy_of(), []
    sampled = SamplingLoad(policy, 4, 9, 64, Engine(policy.model).limits(4))
    monkeypatch.setattr(packed, "give_back", lambda: calls.append(len(calls)))
    for large, times in ((1 << 40, 0), (1, 2)):
        monkeypatch.setattr(packed, "LARGE", large)
        shares = next(p for p in foresee(CPU, [model_of(policy)], LOAD, sampled) if p.name == "rollout").shares
        assert (shares["logits"] == rollout(sampled)["logits"]) == (times > 0)
        Engine(policy.model, None).generate([Prompt([5, 6], "")], Sampling(max_new_tokens=64))
        assert len(calls) == times
    Engine(policy.model, None).generate([Prompt([5, 6], "")], Sampling(max_new_tokens=8))
    assert len(calls) == 2


def test_gradients_stand_beside_activations_only_where_a_second_micro_batch_follows():
    policy = policy_of()
    alone, others = (
        foresee(CPU, [model_of(policy)], Load(120, 40, alone=alone))[0].shares for alone in (True, False)
    )
    assert others["gradients"] == sum(4 * p.numel() for p in policy.model.parameters())
    assert alone["gradients"] == max(others["gradients"] - others["activations"], 0)
    critic = policy_of()
    both = [model_of(policy), Model("critic", critic.model, "here", critic, OptimizerConfig())]
    shares = foresee(CPU, both, Load(120, 40, alone=True))[0].shares
    assert shares["gradients"] == 2 * others["gradients"]  # the actor's wait while the critic is read


def test_layers_are_measured_on_products_as_large_as_the_load_s(monkeypatch):
    """Of large inputs a product with adapters keeps less: sixty-four tokens alone would not show it."""
    policy = policy_of()
    add_lora(policy.model, LoraConfig(r=2))
    for module in (products, memory):
        monkeypatch.setattr(module, "MIN_RECOMPUTED", policy.model.config.hidden_size * 128)
    few, many = (forward(model_of(policy), Load(tokens, 32))[0] / tokens for tokens in (64, 512))
    assert many < 0.95 * few


def test_what_a_backward_pass_has_freed_and_still_holds_is_counted():
    """It gives back so many bytes at a time, and holds up to that; no more than all activations."""
    for dtype, held in ((torch.float32, True), (torch.bfloat16, False)):
        policy = policy_of()
        policy.model.to(dtype)
        shares = foresee(CPU, [model_of(policy)], LOAD)[0].shares
        assert (shares["gaps"] >= min(RELEASE_BYTES, shares["activations"]) > 0) == held
