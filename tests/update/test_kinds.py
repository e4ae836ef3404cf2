"""Kinds of optimizers on real problems, and what becomes of updates that half-precision weights can not hold."""

from __future__ import annotations

import importlib.util
from copy import deepcopy
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from steersman.model import LoraConfig, Policy, SharedCritic, tables_and_adapters
from steersman.ops.rounding import stochastic
from steersman.train.model_optimizer import model_optimizer
from steersman.types import SteersmanError
from steersman.update.kinds import half_gap, state_bytes
from steersman.update.optimizer import Optimizer, OptimizerConfig

BNB = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
KINDS = [
    "adamw", "adafactor", "muon",
    *(pytest.param(k, marks=BNB) for k in ("adamw-8bit", "adamw-8bit-paged", "lion", "lion-8bit")),
]  # fmt: skip


def tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [x for part in inner for x in tensors(part)]


def problem(dtype: torch.dtype = torch.float32, size: int = 96) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, size)).to(dtype)
    x = torch.randn(256, size)
    return model, x.to(dtype), torch.tanh(x @ torch.randn(size, size) / 5).to(dtype)


def fit(model: nn.Module, x, y, config: OptimizerConfig, steps: int = 40) -> tuple[list[float], Optimizer]:
    optimizer, losses = Optimizer(model.parameters(), config, steps), []
    for _ in range(steps):
        loss = (model(x) - y).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, optimizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_learns_and_resumes_bit_for_bit(kind, dtype):
    rate = {"adafactor": 0.05, "lion": 3e-3, "lion-8bit": 3e-3}.get(kind, 1e-2)
    config = OptimizerConfig(kind=kind, lr=rate)
    model, x, y = problem(dtype)
    losses, optimizer = fit(model, x, y, config)
    assert losses[-1] < 0.4 * losses[0]
    again, _, _ = problem(dtype)
    again.load_state_dict(model.state_dict())
    copy = Optimizer(again.parameters(), config, 40)
    copy.load_state_dict(deepcopy(optimizer.state_dict()))
    for one, o in ((model, optimizer), (again, copy)):
        for _ in range(2):
            (one(x) - y).float().square().mean().backward()
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.float32, "master"),
        (torch.bfloat16, "master"),
        (torch.bfloat16, "kahan"),
        (torch.bfloat16, "stochastic"),
    ],
)
def test_bytes_are_those_that_it_keeps(kind, dtype, rounding):
    config = OptimizerConfig(kind=kind, rounding=rounding, lr=1e-3)
    model, x, y = problem(dtype)
    _, optimizer = fit(model, x, y, config, steps=1)
    held = sum(t.nbytes for t in tensors(optimizer.state_dict()["adamw"]) if t.numel() not in (1, 256))
    assert state_bytes(model.parameters(), config) == pytest.approx(held, rel=0.02)


def course(rounding: str, dtype: torch.dtype, lr: float, steps: int = 300) -> tuple[float, float]:
    """How far weights of the size of a chat model's go under a gradient of one sign, and how far they should."""
    generator = torch.Generator().manual_seed(0)
    start = 0.05 * torch.randn(64, 64, generator=generator)
    p = nn.Parameter(start.to(dtype))
    begun = p.detach().double()
    optimizer = Optimizer([p], OptimizerConfig(lr=lr, rounding=rounding, max_grad_norm=1e9), steps)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return float((begun - p.detach().double()).mean()), lr * steps


@pytest.mark.parametrize("rounding", ["master", "kahan", "stochastic"])
def test_a_rate_of_1e_6_is_not_lost(rounding):
    moved, should = course(rounding, torch.bfloat16, 1e-6)
    assert moved == pytest.approx(should, rel=0.05)


def test_what_plain_rounding_does_with_it(monkeypatch):
    monkeypatch.setattr("steersman.update.kinds.Rounded._require_movement", lambda *_: None)
    moved, should = course("nearest", torch.bfloat16, 1e-6)
    assert abs(moved) < 0.05 * should
    moved, should = course("nearest", torch.float32, 1e-6)
    assert moved == pytest.approx(should, rel=0.01)


def test_plain_rounding_is_refused_where_most_weights_would_stand_still():
    torch.manual_seed(0)
    p = nn.Parameter((0.05 * torch.randn(64, 64)).bfloat16())
    with pytest.raises(SteersmanError, match=r"at a rate of 1e-06, \d\d% of the torch.bfloat16 weights"):
        Optimizer([p], OptimizerConfig(lr=1e-6, rounding="nearest"), 1)
    Optimizer([p], OptimizerConfig(lr=1e-2, rounding="nearest"), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_the_gap_is_where_rounding_turns(dtype):
    p = torch.tensor([1.0, 1.9, 0.05, -3.0, 0.5]).to(dtype)
    gap = half_gap(p)
    assert torch.equal((p.float() + p.sign().float() * 0.99 * gap).to(dtype), p)
    assert not (p.float() + p.sign().float() * 1.01 * gap).to(dtype).eq(p).any()


def test_stochastic_rounding_is_right_in_the_mean_and_takes_a_neighbour():
    x = torch.tensor([1.001, -0.30003, 2.0]).repeat(20_000, 1)
    drawn = stochastic(x, torch.bfloat16, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, drawn.bfloat16().float())
    assert ((drawn - x).abs() < 2 * half_gap(x.bfloat16())).all()
    torch.testing.assert_close(drawn.double().mean(0), x[0].double(), rtol=1e-4, atol=0)
    assert len(drawn[:, 0].unique()) == 2
    assert len(drawn[:, 2].unique()) == 1


def test_master_weights_follow_a_float32_run_exactly():
    wide, half = nn.Parameter(torch.randn(8, 8).bfloat16().float()), None
    half = nn.Parameter(wide.detach().bfloat16())
    config = OptimizerConfig(lr=1e-3, max_grad_norm=1e9)
    a, b = Optimizer([wide], config, 9), Optimizer([half], config, 9)
    for i in range(9):
        gradient = torch.randn(8, 8, generator=torch.Generator().manual_seed(i)).bfloat16()
        wide.grad, half.grad = gradient.float(), gradient.clone()
        a.step()
        b.step()
        assert torch.equal(half, wide.bfloat16())


@pytest.mark.parametrize("lora", [False, True])
def test_muon_takes_matrices_and_leaves_tables_and_adapters_whatever_their_shape(lora):
    """A table of 97 x 32 is no longer than a layer of a real model is wide; an adapter of rank 8 is as short."""
    policy = Policy(tiny_model("llama"), None)
    if lora:
        policy.adapt(LoraConfig(r=8, train_whole=("up_proj",), targets=["q_proj"]))
    critic, config = SharedCritic(policy), OptimizerConfig(kind="muon", lr=1e-3)
    tables = tables_and_adapters(critic)
    muon, adamw = Optimizer(critic.parameters(), config, 1, tables).adamw.parts
    names = {id(p): name for name, p in critic.named_parameters()}
    taken, left = ({names[id(p)] for g in part.param_groups for p in g["params"]} for part in (muon, adamw))
    assert all("_proj" in name and "lora_" not in name for name in taken)
    wanted = {"value_head.weight", *(n for n in names.values() if "lora_" in n)} if lora else {
        "value_head.weight", "policy.model.model.embed_tokens.weight", "policy.model.lm_head.weight"
    }  # fmt: skip
    assert wanted <= left
    kept = [p for p in critic.parameters() if p.requires_grad]
    matrices = sum(p.numel() for p in kept if names[id(p)] in taken)
    assert state_bytes(kept, config, tables) == 4 * matrices + 8 * (sum(p.numel() for p in kept) - matrices)
    half = nn.Parameter(torch.randn(8, 24).bfloat16())
    (_, _, inner), *_ = Optimizer([half], config, 1, [half]).adamw.parts
    assert type(inner) is torch.optim.AdamW


def test_biases_that_experts_have_stacked_and_the_rates_of_a_state_are_no_matrices():
    """gpt-oss has a row of biases for each expert, Mamba a row of decay rates for each channel: `weight_decay` and
    Muon act on matrices only. What transformers' Trainer exempts by its bias is exempt here."""
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 16}
    families = {
        "gpt_oss": (small | attention | {"num_local_experts": 4}, "gate_up_proj_bias"),
        "mamba": (small | {"state_size": 8}, "A_log"),
    }
    for family, (settings, stacked) in families.items():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
        named = {id(p): (name, p) for name, p in model.named_parameters()}
        assert any(name.endswith(stacked) and p.dim() == 2 for name, p in named.values())
        made = model_optimizer(model, OptimizerConfig(weight_decay=0.1), 1)
        decayed = {named[id(p)][0] for g in made.adamw.param_groups if g["weight_decay"] for p in g["params"]}
        assert decayed
        assert decayed == {
            name for name, p in named.values() if p.dim() >= 2 and not name.endswith(("bias", ".A_log"))
        }
        muon, _ = model_optimizer(model, OptimizerConfig(kind="muon"), 1).adamw.parts
        taken = {named[id(p)][0] for g in muon.param_groups for p in g["params"]}
        assert taken
        assert not any(name.endswith(("bias", ".A_log")) for name in taken)


def test_stochastic_rounding_of_float16_is_refused():
    with pytest.raises(SteersmanError, match="stochastic rounds to bfloat16"):
        Optimizer([nn.Parameter(torch.ones(2, 2).half())], OptimizerConfig(rounding="stochastic"), 1)


def test_a_missing_package_is_named(monkeypatch):
    import importlib

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SteersmanError, match=r"steersman\[bitsandbytes\]"):
        Optimizer([nn.Parameter(torch.ones(2, 2))], OptimizerConfig(kind="adamw-8bit"), 1)
