"""Families with parts of their own: routers, no checkpointing, code that fails; refused or said by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from letter_models import LETTERS, letters

from steersman.model import LoraConfig, Policy, load_policy
from steersman.recipe.sections import ModelConfig
from steersman.run.run_config import RunConfig
from steersman.setup.models import policy_from
from steersman.types import SteersmanError, Tokens

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from families import shrunk, small_config  # type: ignore


def saved(kind: str, folder: Path) -> Path:
    import transformers as hf

    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(small_config(kind, len(LETTERS), whole=True)).save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


def test_a_router_that_gives_indices_too_carries_no_adapter_and_its_loss_is_said(tmp_path):
    policy = load_policy(saved("phimoe", tmp_path), device="cpu", lora=LoraConfig(r=2))
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained
    assert not any("router" in name for name in trained)
    assert torch.isfinite(policy.logp(Tokens.from_ids([[5, 6]], [[7, 8]])).logp).all()
    assert any("router_aux_loss_coef" in note and "train.router_loss" in note for note in policy.notes)


def test_a_linear_layer_of_a_family_s_own_that_is_a_plain_product_carries_adapters(tmp_path):
    """Falcon's writes its product out; all of its layers are of that class."""
    policy = load_policy(saved("falcon", tmp_path), device="cpu", lora=LoraConfig(r=2))
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained} == {
        "dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value",
    }  # fmt: skip


def test_a_family_without_activation_checkpointing_is_refused_by_name(tmp_path):
    path = saved("jetmoe", tmp_path)
    config = ModelConfig(path=str(path), gradient_checkpointing=True)
    with pytest.raises(SteersmanError, match="gradient_checkpointing: models of type 'jetmoe'"):
        policy_from(config, RunConfig(), torch.device("cpu"))


def test_what_is_random_in_training_is_not_when_layers_run_again(tmp_path):
    """PhiMoE's router draws its experts in training mode, from those within its jitter of the best, and weighs them
    by that in either mode; with checkpointed layers it chooses as transformers' own model does when it answers."""
    import transformers as hf

    path, tokens = saved("phimoe", tmp_path), Tokens.from_ids([[5, 6], [7, 8]], [[7, 8, 9], [4, 5, 6]])
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"router_jitter_noise": 0.5}))
    plain: Any = hf.AutoModelForCausalLM.from_pretrained(path).eval()
    logits = plain(torch.cat([tokens.prompt, tokens.response], 1)).logits[:, 1:-1]
    expected = logits.log_softmax(-1).gather(-1, tokens.response[..., None])[..., 0]
    expected.sum().backward()
    for again in (False, True):
        config = ModelConfig(path=str(path), gradient_checkpointing=again)
        policy = policy_from(config, RunConfig(), torch.device("cpu"))
        logp = policy.logp(tokens).logp
        torch.testing.assert_close(logp, expected)
        logp.sum().backward()
        router = policy.model.model.layers[0].mlp.router.weight
        torch.testing.assert_close(router.grad, plain.model.layers[0].mlp.router.weight.grad)


def test_what_a_familys_own_code_raises_is_a_refusal(tmp_path, monkeypatch):
    model: Any = load_policy(saved("llama", tmp_path), device="cpu").model
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(SteersmanError, match=r"LlamaForCausalLM .* \(ZeroDivisionError: division by zero\)"):
        Policy(model, letters())


def test_a_family_whose_cache_is_another_is_refused_by_its_config(tmp_path):
    with pytest.raises(SteersmanError, match="'openai-gpt' are not supported: it has no cache"):
        load_policy(saved("openai-gpt", tmp_path), device="cpu")


def test_a_small_config_keeps_a_layer_of_each_kind():
    import transformers as hf

    given = hf.AutoConfig.for_model("exaone_moe").to_dict()
    made = shrunk(given, 35)
    assert made["num_hidden_layers"] == len(made["layer_types"]) == len(made["mlp_layer_types"]) <= 4
    for name in ("layer_types", "mlp_layer_types"):
        assert set(made[name]) == set(given[name])
