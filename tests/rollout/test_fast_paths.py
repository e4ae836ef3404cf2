"""Fast paths are on for the families that should have them, and off for others by name, with the reason."""

from __future__ import annotations

import pytest
import torch
from fast_paths import PATHS, paths_taken, small

from steersman import native
from steersman.model.fast.shared import why_not_shared
from steersman.rollout.fast.step_conditions import FAMILIES, why_no_compiled_step

compiled = pytest.mark.skipif(native.library() is None, reason=f"no compiled loops: {native.why_not()}")

STEP, SHARED, APART = "compiled steps", "shared prompts", "rows apart"
REARRANGED = "rearranged weights"  # for models whose steps are not compiled whole
LAYER_NORM = "norms"  # they subtract the mean
ROUTED = "gates"  # experts have none of their own, or gate and up projection are one matrix
OFF: dict[str, set[str]] = {
    "llama": {REARRANGED},  # SmolLM's and SmolLM2's family too
    "mistral": {REARRANGED},
    "qwen2": {REARRANGED},
    "qwen3": {REARRANGED},
    "gemma": {STEP},
    "gemma2": {STEP, SHARED, APART, "attention", "attention of one token"},  # its scores are capped; windows
    "gemma3_text": {STEP},
    "smollm3": {STEP},
    "olmo2": {STEP},
    "phi3": {STEP, ROUTED},
    "mixtral": {STEP, ROUTED},
    "qwen3_moe": {STEP, ROUTED},
    "starcoder2": {STEP, LAYER_NORM, "gates"},  # a plain feed-forward layer
    "gpt2": {STEP, LAYER_NORM, "gates", "rotation"},  # learned positions
    "gpt_neox": {STEP, LAYER_NORM, "gates", "rotation"},  # a quarter of each head is turned
    "opt": {STEP, LAYER_NORM, "gates", "rotation", "packed rows", "narrowed last layer"},  # positions by the mask
}
"""What each family does without; the rest of `PATHS` is on."""
SETTINGS = {"mistral": {"sliding_window": None}, "phi3": {"sliding_window": None}}


@compiled
@pytest.mark.parametrize("family", OFF)
def test_which_paths_a_family_takes(family):
    model = small(family, **SETTINGS.get(family, {}))
    assert set(PATHS) - paths_taken(model) == OFF[family]
    reason = why_no_compiled_step(model)
    if STEP in OFF[family]:
        assert reason == f"{type(model).__name__} is none of {', '.join(FAMILIES)}"
    else:
        assert reason is None
    assert (why_not_shared(model.base_model, 97) is not None) == (family in ("gemma2", "gemma3_text"))  # windows


@compiled
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mlp_bias": True}, "biases"),
        ({"hidden_act": "relu"}, "gate is none of silu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "depend on the length"),
    ],
)
def test_a_llama_of_another_kind_says_why_its_steps_are_not_compiled(settings, reason):
    model = small("llama", **settings)
    assert reason in str(why_no_compiled_step(model))
    assert STEP not in paths_taken(model)


def test_other_weights_say_so():
    model = small("llama")
    assert "float32 on the CPU" in str(why_no_compiled_step(model.to(torch.bfloat16)))
    assert "window" in str(why_not_shared(small("mistral", sliding_window=8).base_model, 97))


@compiled
def test_the_attention_that_a_config_asks_for_is_used():
    """Eager attention shows its probabilities, so it is neither compiled nor torch's."""
    model = small("qwen3", attn_implementation="eager")
    assert set(PATHS) - paths_taken(model) == {REARRANGED, APART, "attention", "attention of one token"}
    assert model.config._attn_implementation == "eager"
