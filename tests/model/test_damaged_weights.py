"""A model whose outputs are not finite is told so, and not called one of an unknown family."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from steersman.model import load_policy
from steersman.types import SteersmanError


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(model_folder, value):
    folder = model_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data.fill_(value)
    model.save_pretrained(folder)
    with pytest.raises(SteersmanError, match=r"last hidden states are NaN or infinite .* weights are damaged"):
        load_policy(folder, device="cpu")
