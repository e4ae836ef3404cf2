"""The sequences on which the memory of a run is measured."""

from __future__ import annotations

import pytest
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from steersman.model import Policy
from steersman.plan.memory import Load, Model, forward


@pytest.mark.parametrize("positions", [8, 48])
def test_a_model_of_few_positions_is_measured_within_them(positions):
    config = tiny_config("gpt2")
    config.n_positions = positions
    policy = Policy(AutoModelForCausalLM.from_config(config).eval(), None)
    wide = tiny_config("gpt2")
    plain = Policy(AutoModelForCausalLM.from_config(wide).eval(), None)
    load = Load(24, 8)
    kept, other = (forward(Model("policy", p.model, "", p), load)[0] for p in (policy, plain))
    assert kept == pytest.approx(other, rel=0.3)
