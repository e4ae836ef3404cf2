"""Sampling from models whose layers carry a state: linear attention, state-space layers, short convolutions."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from steersman.model import Policy
from steersman.rollout import Engine, Sampling, decoder
from steersman.rollout.decoder import bytes_of_states
from steersman.types import Prompt, SteersmanError, Tokens

BASE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_hidden_layers": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_d_ssm": 64, "mamba_chunk_size": 8,
}  # fmt: skip
DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
ALONE: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": BASE | DELTA,
    "qwen3_next": BASE | DELTA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                                  "shared_expert_intermediate_size": 16},
    "olmo_hybrid": BASE | DELTA | {"rope_parameters": None},
    "lfm2": BASE | {"layer_types": ["conv", "full_attention", "conv"]},
    "granitemoehybrid": BASE | MAMBA2 | {"layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 0,
                                         "shared_intermediate_size": 32},
    "falcon_h1": BASE | MAMBA2,
    "bamba": BASE | MAMBA2 | {"attn_layer_indices": [1]},
    "jamba": BASE | {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 4, "mamba_d_state": 16,
                     "use_mamba_kernels": False},
    "nemotron_h": BASE | MAMBA2 | {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "num_hidden_layers": 4,
                                   "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                                   "moe_shared_expert_intermediate_size": 16, "mamba_num_heads": 8,
                                   "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 8},
    "zamba2": BASE | {"mamba_expand": 2, "n_mamba_heads": 8, "mamba_d_state": 16, "mamba_ngroups": 1, "chunk_size": 8,
                      "num_mem_blocks": 1, "use_shared_attention_adapter": False, "num_hidden_layers": 3,
                      "layers_block_type": ["mamba", "hybrid", "mamba"], "attention_head_dim": 16,
                      "num_key_value_heads": 4},
    "mamba2": ALONE | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "mamba": ALONE,
}  # fmt: skip
"""Attention in some layers, beside a state in each (Falcon-H1), or nowhere (Mamba)."""
LIMITED: dict[str, dict[str, Any]] = {
    "nemotron_h": {"time_step_min": 0.02},
    "zamba2": {"time_step_min": 0.02},
    "mamba2": {"time_step_limit": (0.02, 0.1)},
    "bamba": {"time_step_limit": (0.02, 0.1)},
    "granitemoehybrid": {"time_step_limit": (0.0, 0.1)},
    "falcon_h1": {"time_step_limit": (0.02, 0.1), "ssm_multipliers": [1.0, 1.0, 1.0, 1.0, 0.3]},
}
"""Mamba 2 layers with limits of their steps in time, and where the config names them."""


def model_of(family: str, **settings: Any) -> Any:
    """A small model with random weights, wide enough apart that a wrong state shows."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family] | settings)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(3.0)
    return model


def prompts(lengths: tuple[int, ...]) -> list[Prompt]:
    return [Prompt([3 + (7 * j + i) % 90 for i in range(n)], "", index=j) for j, n in enumerate(lengths)]


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_log_probabilities_are_those_of_a_plain_forward(family):
    """Prompts of one length and of others, more sequences than rows, so that rows move and are filled again."""
    compare_with_a_plain_forward(model_of(family))


def compare_with_a_plain_forward(model: Any) -> None:
    ended = Engine(model, eos_token_id=tuple(range(20)), max_batch=4)  # so that answers have unlike lengths
    samples = ended.generate(prompts((12, 9, 9, 5, 1)), Sampling(10), n=3)
    assert len({len(s.ids) for s in samples}) > 2
    tokens = Tokens.from_ids([s.prompt.ids for s in samples], [s.ids for s in samples])
    with torch.no_grad():
        for row, sample in enumerate(samples):
            ids = torch.tensor([[*sample.prompt.ids, *sample.ids]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(sample.prompt.ids) - 1 : -1]
            plain = logits.log_softmax(-1).gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(sample.logp), plain, rtol=0, atol=2e-5)
            trained = Policy(model, None).logp(tokens.rows(torch.tensor([row]))).logp[0, : len(sample.ids)]
            torch.testing.assert_close(trained, plain, rtol=0, atol=2e-5)


def beyond_limits(family: str, *, limited: bool = True) -> Any:
    """A model in which steps matter, whose heads have some far below, within and far above its limits; without
    `limited` the same one that has none."""
    model = model_of(family, **LIMITED[family])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 0.25)
            elif name.endswith("dt_bias"):
                p.copy_(torch.linspace(-8, 4, len(p)))
                if not limited:
                    model.get_submodule(name.rpartition(".")[0]).time_step_limit = (0.0, float("inf"))
    return model


@pytest.mark.parametrize("family", LIMITED)
def test_steps_in_time_keep_their_limits_where_one_token_is_decoded(family):
    """transformers keeps them where a text is read whole alone."""
    compare_with_a_plain_forward(beyond_limits(family))


@pytest.mark.parametrize("family", ["granitemoehybrid", "falcon_h1"])
def test_in_half_precision_limits_are_kept_up_to_its_rounding(family):
    """As near as the same model comes that has none; without them it would be off by more than half a nat a token."""

    @torch.no_grad()
    def gap(model: Any) -> float:
        samples = Engine(model.bfloat16(), eos_token_id=()).generate(prompts((9, 9, 5)), Sampling(24), n=2)
        tokens = Tokens.from_ids([s.prompt.ids for s in samples], [s.ids for s in samples])
        recorded = torch.tensor([s.logp for s in samples])
        return float((Policy(model, None).logp(tokens).logp - recorded).abs().mean())

    assert gap(beyond_limits(family)) < 2 * gap(beyond_limits(family, limited=False)) + 1e-3


@pytest.mark.parametrize("family", LIMITED)
def test_a_model_that_steps_otherwise_than_it_reads_is_refused(family, monkeypatch):
    """As transformers' own models do; with the limits kept the engine samples, and nothing stays in the model."""
    engine = Engine(beyond_limits(family), eos_token_id=())
    with monkeypatch.context() as patched:
        patched.setattr(decoder, "clamped_time_steps", lambda _: nullcontext())
        with pytest.raises(SteersmanError, match=r"What is sampled would not be what is trained: models of type '"):
            engine.generate(prompts((4,)), Sampling(3))
    assert len(engine.generate(prompts((4,)), Sampling(3))) == 1
    assert not any("forward" in vars(module) for module in engine.model.modules() if hasattr(module, "dt_bias"))


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "falcon_h1", "mamba2"])
def test_a_sample_does_not_depend_on_its_company(family):
    engine = Engine(model_of(family), eos_token_id=(), max_batch=3)
    together = engine.generate(prompts((7, 3, 5)), Sampling(8), n=2, seed=5)
    for prompt in prompts((7, 3, 5)):
        alone = engine.generate([prompt], Sampling(8), n=2, seed=5)
        assert [s.ids for s in alone] == [s.ids for s in together if s.prompt.index == prompt.index]


@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1", "mamba"])
def test_the_forecast_counts_the_states_of_a_row(family):
    model = model_of(family)
    engine = Engine(model, eos_token_id=(), max_batch=4)
    held = []

    def look(*_):
        buffers = [x for s in engine.decoder.live.states for x in s.buffers.values()]
        held.append(sum(x.numel() * x.element_size() for x in buffers))

    engine.generate(prompts((4, 4)), Sampling(3), n=2, progress=look)
    assert held[0] > 0
    assert set(held) == {4 * bytes_of_states(model)}
    assert not any(s.buffers for s in engine.decoder.live.states)


def test_prompts_of_one_prefill_have_one_length():
    """Padding would run into the state."""
    engine = Engine(model_of("lfm2"), eos_token_id=())
    engine.generate(prompts((4,)), Sampling(2))  # the first call tries the model on tokens of its own
    read: list[list[int]] = []
    prefill = engine.decoder.prefill
    engine.decoder.prefill = lambda some: (read.append([len(ids) for ids in some]), prefill(some))[1]  # type: ignore
    engine.generate(prompts((4, 6, 4, 6, 5)), Sampling(2))
    assert read == [[6, 6], [5], [4, 4]]
