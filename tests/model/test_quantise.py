"""Bases in 4 and 8 bits under exact adapters: sampling agrees with training, nothing leaks between rows, and what is
saved is a plain model. And the knobs of adapters: DoRA, rsLoRA, dropout, modules trained whole."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_inputs import ragged, word_tokenizer
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from steersman.model import LoraConfig, SharedBase, load_policy, load_scalar, save
from steersman.model.fast import folded as folded_room
from steersman.model.fast.folded import folded, folded_bytes
from steersman.model.lora import LearningDropout
from steersman.model.merge import merged_state
from steersman.model.modes import checkpoint_activations
from steersman.model.quantise import is_narrow
from steersman.recipe.sections import ModelConfig
from steersman.rollout import Engine, Sampling
from steersman.rollout.fast.step_conditions import why_no_compiled_step
from steersman.run.run_config import RunConfig
from steersman.setup.models import policy_from, scalar_from
from steersman.train.experience import tokens_of
from steersman.types import Prompt, SteersmanError, Tokens

BNB = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
KINDS = ["nf4", "fp4", "int8"]
LORA = LoraConfig(r=2, alpha=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama", scale=2.0).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


def stirred(policy, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)


NOTHING_QUANTISED = """
import sys
from steersman.model import LoraConfig, load_policy, load_scalar, save
model, place = sys.argv[1:]
policy, scalar = load_policy(model, lora=LoraConfig(r=2)), load_scalar(model)
scalar.adapt(LoraConfig(r=2))
save(policy, policy.tokenizer, place + "/policy", merged=False)
save(scalar, scalar.tokenizer, place + "/scalar", merged=False)
load_policy(place + "/policy"), load_scalar(place + "/scalar")
assert "peft" in sys.modules and "bitsandbytes" not in sys.modules
quantised = load_policy(model, quantise="nf4", lora=LoraConfig(r=2))
assert "peft.tuners.lora.bnb" in {type(module).__module__ for module in quantised.model.modules()}
"""


@BNB
def test_bitsandbytes_is_imported_where_something_is_quantised_and_only_there(folder, tmp_path):
    subprocess.run([sys.executable, "-c", NOTHING_QUANTISED, str(folder), str(tmp_path)], check=True)


@BNB
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_ratio_is_one_and_no_row_sees_another(kind, folder):
    policy = load_policy(folder, device="cpu", quantise=kind, lora=LORA)
    stirred(policy)
    engine = Engine(policy.model, policy.tokenizer, max_batch=4, eos_token_id=[2, 5, 17])
    prompts = [Prompt(ids, "", index=i) for i, ids in enumerate(ragged()["prompts"])]
    samples = engine.generate(prompts, Sampling(40), n=2, seed=1)
    tokens = tokens_of(samples)
    logp = policy.logp(tokens).logp
    for row, sample in enumerate(samples):
        assert logp[row, : len(sample.ids)].tolist() == pytest.approx(
            sample.logp, abs=2e-3 if kind == "int8" else 2e-4
        )
        alone = policy.logp(tokens.rows(torch.tensor([row]))).logp[0, : len(sample.ids)]
        torch.testing.assert_close(logp[row, : len(sample.ids)], alone, atol=2e-3 if kind == "int8" else 1e-4, rtol=0)
    logp.sum().backward()
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@BNB
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_merged_and_saved_is_a_plain_model_of_the_same_numbers(kind, folder, tmp_path):
    policy = load_policy(folder, device="cpu", quantise=kind, lora=LORA)
    stirred(policy)
    save(policy, None, tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not hasattr(plain.config, "quantization_config")
    assert all(p.dtype == torch.float32 for p in plain.parameters())
    ids = torch.tensor([[5, 9, 11, 40, 3]])
    with torch.no_grad():
        found, expected = plain(ids).logits, policy.model(ids).logits
    share = 0.03 if kind == "int8" else 1e-4  # int8 rounds what goes into a product too
    assert (found - expected).abs().max() <= share * expected.abs().max()
    before = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert (before(ids).logits - found).abs().max() > share * expected.abs().max()


@BNB
def test_the_base_is_small_and_the_adapters_are_exact(folder):
    policy = load_policy(folder, device="cpu", quantise="nf4", lora=LORA)
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert trained
    assert all(p.dtype == torch.float32 for p in trained)
    layer = policy.model.model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.nbytes == layer.in_features * layer.out_features // 2
    assert not any(p.dtype == torch.uint8 and p.requires_grad for p in policy.parameters())


@BNB
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_folder_that_is_quantised_already_is_a_base_like_one_quantised_here(kind, folder, tmp_path):
    settings = BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "theirs")
    word_tokenizer().save_pretrained(tmp_path / "theirs")
    tokens = Tokens.from_ids(**ragged())
    policy = load_policy(tmp_path / "theirs", device="cpu", lora=LORA)
    here = load_policy(folder, device="cpu", quantise=kind)
    with torch.no_grad():
        torch.testing.assert_close(policy.logp(tokens).logp, here.logp(tokens).logp, atol=1e-5, rtol=1e-5)
        stirred(policy)
        saved = load_policy(save(policy, None, tmp_path / "saved", dtype=torch.float32), device="cpu")
        off = (saved.logp(tokens).logp - policy.logp(tokens).logp).abs().max()
    assert off < (0.3 if kind == "int8" else 1e-3)
    assert load_scalar(tmp_path / "theirs", device="cpu").output.weight.dtype == torch.float32
    with pytest.raises(SteersmanError, match=r"quantised already; remove model\.quantise"):
        load_policy(tmp_path / "theirs", device="cpu", quantise=kind)
    config, run = ModelConfig.model_validate({"path": str(tmp_path / "theirs")}), RunConfig(dir="unused")
    for make in (policy_from, scalar_from):
        with pytest.raises(
            SteersmanError, match=r"quantised already, and such weights can not be trained; give model"
        ):
            make(config, run, torch.device("cpu"))


def test_weights_of_another_quantiser_are_refused_by_its_name(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(SteersmanError, match="quantised by gptq"):
        load_policy(tmp_path / "theirs", device="cpu")


@BNB
def test_models_share_a_quantised_base(folder):
    policy = load_policy(folder, device="cpu", quantise="nf4")
    base = SharedBase(policy)
    critic = base.fresh()
    policy.adapt(LORA)
    critic.adapt(LORA)
    stirred(critic)
    own = {p.data_ptr() for p in policy.parameters()}
    assert all("lora_" in n or "score" in n for n, p in critic.named_parameters() if p.data_ptr() not in own)
    tokens = Tokens.from_ids(**ragged())
    critic.value(tokens).square().sum().backward()
    assert all(p.grad is not None for p in critic.parameters() if p.requires_grad)
    with policy.reference() as reference:
        start = load_policy(folder, device="cpu", quantise="nf4")
        with torch.no_grad():
            torch.testing.assert_close(reference.logp(tokens).logp, start.logp(tokens).logp)


KNOBS = [LoraConfig(r=2, dora=True), LoraConfig(r=4, rslora=True), LoraConfig(r=2, train_whole=("norm", "lm_head")),
         LoraConfig(r=2, targets=r".*layers\.1\..*(q|v)_proj")]  # fmt: skip


@pytest.mark.parametrize("lora", KNOBS, ids=["dora", "rslora", "train_whole", "pattern"])
def test_knobs_start_at_the_model_merge_to_what_they_compute_and_have_a_reference(lora, folder, tmp_path):
    policy, start = load_policy(folder, device="cpu", lora=lora), load_policy(folder, device="cpu")
    tokens = Tokens.from_ids(**ragged())
    with torch.no_grad():
        torch.testing.assert_close(policy.logp(tokens).logp, start.logp(tokens).logp, atol=1e-4, rtol=1e-4)
        stirred(policy)
        expected = policy.logp(tokens).logp
        assert (expected - start.logp(tokens).logp).abs().max() > 1e-3
        with policy.reference() as reference:
            torch.testing.assert_close(reference.logp(tokens).logp, start.logp(tokens).logp, atol=1e-4, rtol=1e-4)
        with folded(policy.model):
            torch.testing.assert_close(policy.logp(tokens).logp, expected, atol=1e-4, rtol=1e-4)
        save(policy, None, tmp_path / "merged")
        saved = load_policy(tmp_path / "merged", device="cpu")
        torch.testing.assert_close(saved.logp(tokens).logp, expected, atol=1e-4, rtol=1e-4)
        save(policy, None, tmp_path / "adapters", merged=False)
        again = load_policy(tmp_path / "adapters", device="cpu")
        torch.testing.assert_close(again.logp(tokens).logp, expected, atol=1e-4, rtol=1e-4)
    assert set(merged_state(policy.model)) == set(start.model.state_dict())


@BNB
@pytest.mark.parametrize("lora", [None, LORA])
def test_while_it_samples_a_4_bit_model_is_a_plain_one(lora, folder, monkeypatch):
    policy = load_policy(folder, device="cpu", quantise="nf4", lora=lora)
    stirred(policy)
    tokens, layers = Tokens.from_ids(**ragged()), dict(policy.model.named_modules())
    with torch.no_grad():
        expected = policy.logp(tokens).logp
        with folded(policy.model):
            assert why_no_compiled_step(policy.model) is None
            torch.testing.assert_close(policy.logp(tokens).logp, expected, atol=1e-4, rtol=1e-4)
            if lora:
                bare = policy.model.state_dict()
        assert dict(policy.model.named_modules()) == layers
        assert torch.equal(policy.logp(tokens).logp, expected)
        if lora:
            with policy.adapters.disable_adapter(), folded(policy.model):
                plain = policy.model.state_dict()
            assert any(not torch.equal(x, plain[name]) for name, x in bare.items())
    narrow = [m for m in policy.model.modules() if is_narrow(m)]
    assert folded_bytes(policy.model) == sum(4 * m.in_features * m.out_features for m in narrow) > 0
    monkeypatch.setattr(folded_room, "MAX_WIDENED_BYTES", folded_bytes(policy.model) - 1)
    assert folded_bytes(policy.model) == 0
    with folded(policy.model):
        assert dict(policy.model.named_modules()) == layers


def test_a_pattern_reaches_what_it_names_and_no_more(folder):
    policy = load_policy(folder, device="cpu", lora=KNOBS[3])
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all(".layers.1." in name and ("q_proj" in name or "v_proj" in name) for name in trained)


def test_dropout_acts_while_learning_and_nowhere_else(folder):
    policy = load_policy(folder, device="cpu", lora=LoraConfig(r=2, dropout=0.5))
    stirred(policy)
    tokens = Tokens.from_ids(**ragged())
    assert any(isinstance(m, LearningDropout) for m in policy.modules())
    with torch.no_grad():
        assert torch.equal(policy.logp(tokens).logp, policy.logp(tokens).logp)
        plain = policy.logp(tokens).logp
    torch.manual_seed(0)
    assert not torch.equal(policy.logp(tokens).logp.detach(), plain)


@BNB
@pytest.mark.parametrize("kind", KINDS)
def test_a_critic_on_a_quantised_base_keeps_its_head_and_saves_adapters_that_load_again(kind, folder, tmp_path):
    critic = load_scalar(folder, device="cpu", quantise=kind)
    assert not critic.score(Tokens.from_ids([[5, 6]], [[7]])).any()
    critic.adapt(LORA)
    stirred(critic)
    assert critic.output.weight.dtype == torch.float32
    tokens = Tokens.from_ids(**ragged())
    save(critic, None, tmp_path / "critic", merged=False)
    again = load_scalar(tmp_path / "critic", device="cpu", quantise=kind)
    with torch.no_grad():
        torch.testing.assert_close(again.score(tokens), critic.score(tokens))


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_acts_in_layers_that_run_again_too(dora, folder):
    policy = load_policy(folder, device="cpu", lora=LoraConfig(r=2, dropout=0.5, dora=dora))
    stirred(policy)
    checkpoint_activations(policy.model)
    tokens = Tokens.from_ids(**ragged())
    assert not torch.equal(policy.logp(tokens).logp.detach(), policy.logp(tokens).logp.detach())
    with torch.no_grad():
        assert torch.equal(policy.logp(tokens).logp, policy.logp(tokens).logp)
