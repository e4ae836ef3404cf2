"""Adapters from a folder: repeatable, with their own start as reference, whole, and refused where they do not fit."""

from __future__ import annotations

import json
import shutil
from typing import Any

import peft
import pytest
import torch
from model_inputs import word_tokenizer
from tiny_models import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from steersman.model import LoraConfig, SharedBase, keep_away, load_policy, load_scalar, save
from steersman.model.lora import LearningDropout
from steersman.model.merge import merged_state
from steersman.plan.memory import Load as MicroBatch
from steersman.plan.memory import Model, foresee
from steersman.recipe.sections import ModelConfig
from steersman.run.run_config import RunConfig
from steersman.setup.models import policy_from, scalar_from
from steersman.setup.reference import reference_from
from steersman.types import SteersmanError

CPU = torch.device("cpu")


def stir(module: torch.nn.Module, seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))


@pytest.fixture
def base(model_folder):
    return model_folder("llama", model=tiny_model("llama", scale=2.0))


@pytest.fixture
def adapters(base, tmp_path):
    """Adapters of a policy with dropout, saved alone."""
    policy = load_policy(base, lora=LoraConfig(r=4, dropout=0.3))
    stir(policy)
    return save(policy, None, tmp_path / "adapters", merged=False)


@pytest.fixture
def judge(base, tmp_path):
    """Adapters of a reward model with dropout, saved alone."""
    scalar = load_scalar(base)
    scalar.adapt(LoraConfig(r=4, dropout=0.3))
    stir(scalar)
    return save(scalar, None, tmp_path / "judge", merged=False)


@pytest.mark.parametrize("trainable", [True, False])
def test_loaded_adapters_give_the_same_numbers_every_time(trainable, adapters, judge, base, tokens):
    policy, scalar = load_policy(adapters, trainable=trainable), load_scalar(judge, trainable=trainable)
    shared = SharedBase(load_policy(base, trainable=False)).reward(str(judge), "cpu")
    with torch.no_grad():
        for read in (lambda: policy.logp(tokens).logp, lambda: scalar.score(tokens), lambda: shared.score(tokens)):
            assert torch.equal(read(), read())
        torch.testing.assert_close(shared.score(tokens), scalar.score(tokens))
    assert not any(part.training for model in (policy, scalar, shared) for part in model.model.modules())
    assert any("their dropout of 0.3 is off" in note for note in policy.notes)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_of_loaded_adapters_acts_where_gradients_are_asked_for(dora, base, tmp_path, tokens):
    for load in (load_policy, load_scalar):
        model = load(base)
        model.adapt(LoraConfig(r=4, dora=dora))
        stir(model)
        again: Any = load(save(model, None, tmp_path / load.__name__, merged=False))
        again.adapt(LoraConfig(r=4, dropout=0.5, dora=dora))
        assert any(isinstance(part, LearningDropout) for part in again.modules())

        def read(again=again, load=load):
            return again.logp(tokens).logp if load is load_policy else again.score(tokens)

        with torch.no_grad():
            assert torch.equal(read(), read())
        assert not torch.equal(read().detach(), read().detach())
        saved = save(again, None, tmp_path / f"{load.__name__}-again", merged=False)
        assert json.loads((saved / "adapter_config.json").read_text())["lora_dropout"] == 0.5


@pytest.mark.parametrize("lora", [None, {"r": 16}])
def test_the_reference_of_saved_adapters_is_where_they_began(lora, adapters, base, tokens):
    config = ModelConfig.model_validate({"path": str(adapters), "lora": lora})
    policy = policy_from(config, RunConfig(dir="unused"), CPU)
    with torch.no_grad():
        start = policy.logp(tokens).logp
        reference = reference_from("start", config, RunConfig(dir="unused"), policy)
        stir(policy, seed=8)
        assert torch.equal(reference.logp(tokens).logp, start)
        assert not torch.equal(policy.logp(tokens).logp, start)
        assert not torch.equal(load_policy(base).logp(tokens).logp, start)
    assert not any(p.requires_grad for p in reference.parameters())
    own = {id(p) for p in policy.parameters()}
    copied = sum(p.nbytes for p in reference.parameters() if id(p) not in own)
    assert copied == sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    own_model = reference.separate
    assert own_model is not None
    keep_away(own_model)  # which would take the policy's own weights with it
    assert torch.equal(reference.logp(tokens).logp, start)
    models = [Model("policy", policy.model, "", policy), Model("reference", own_model.model, "")]
    alone, both = (foresee(CPU, models[:n], MicroBatch(32, 8))[0].shares["weights"] for n in (1, 2))
    assert both - alone == copied


def test_settings_that_saved_adapters_overrule_are_told(adapters, judge):
    config = ModelConfig.model_validate({"path": str(adapters), "lora": {"r": 16, "dropout": 0.1}})
    notes = "\n".join(policy_from(config, RunConfig(dir="unused"), CPU).notes)
    assert f"adapters from {adapters}" in notes
    assert "r 4 (asked for: 16), alpha 16.0 (asked for: 32.0)" in notes
    scalar = scalar_from(config, RunConfig(dir="unused"), CPU, str(judge))
    assert "r 4 (asked for: 16)" in "\n".join(scalar.notes)
    same = ModelConfig.model_validate({"path": str(adapters), "lora": {"r": 4, "alpha": 16}})
    assert len(policy_from(same, RunConfig(dir="unused"), CPU).notes) == 1


FOREIGN = {
    "lora_bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "bias": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "trainable_token_indices": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    "init_lora_weights": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_adapters_that_would_be_left_out_are_refused_by_name(name, tmp_path, model_folder):
    config = tiny_config("llama", 97)
    if name in ("lora_bias", "bias"):
        config.attention_bias = True
    folder = model_folder("foreign", model=AutoModelForCausalLM.from_config(config))
    model = AutoModelForCausalLM.from_pretrained(folder)
    theirs = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **FOREIGN[name]))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(SteersmanError, match=rf"adapter_config\.json: {name}.*merge_and_unload"):
        load_policy(tmp_path / "theirs")
    if name not in ("bias", "init_lora_weights"):  # these are added in with the base
        with pytest.raises(SteersmanError, match="can not be merged here"):
            merged_state(model)


def test_what_a_reward_model_trains_whole_is_saved_with_its_adapters(base, tmp_path, tokens):
    scalar = load_scalar(base)
    scalar.adapt(LoraConfig(r=4, targets=r"layers\.\d+\.self_attn\.[qv]_proj", train_whole=("norm",)))
    stir(scalar)
    folder = save(scalar, None, tmp_path / "judge", merged=False)
    with torch.no_grad():
        expected = scalar.score(tokens)
        again = load_scalar(folder)
        torch.testing.assert_close(again.score(tokens), expected)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in scalar.named_parameters() if p.requires_grad
    }
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    theirs = peft.PeftModel.from_pretrained(plain, folder).eval()
    row = tokens.rows(torch.tensor([0]))
    ids = torch.cat([row.prompt[:, : row.prompt_length[0]], row.response[:, : row.response_length[0]]], 1)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits[:, 0], expected[:1], atol=1e-4, rtol=1e-4)


def broken(folder, what):
    """Makes a folder of adapters what it is called."""
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    told = json.loads(file.read_text())
    if what == "no weights":
        weights.unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:500])
    elif what == "no JSON":
        file.write_text("{")
    elif what == "no base":
        del told["base_model_name_or_path"]
    elif what == "unknown":
        told["peft_type"] = "NOPE"
    elif what == "gone":
        told["base_model_name_or_path"] = "/old/base"
    if what in ("no base", "unknown", "gone"):
        file.write_text(json.dumps(told))


BROKEN = {
    "no weights": r"no weights of adapters there \(no adapter_model\.safetensors\)",
    "truncated": "the weights of its adapters can not be read",
    "no JSON": r"adapter_config\.json: can not be read",
    "no base": r"base_model_name_or_path is null; write there",
    "unknown": r"adapter_config\.json: peft_type NOPE",
    "gone": "its adapters are on /old/base, which is not there",
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("kind", ["adapters", "judge"])
def test_folders_that_can_not_be_read_are_refused(what, kind, request):
    folder = request.getfixturevalue(kind)
    broken(folder, what)
    with pytest.raises(SteersmanError, match=BROKEN[what]):
        (load_policy if kind == "adapters" else load_scalar)(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 64}, r"lora_[AB]\.weight is \[.*\], not \["),
        ({"num_hidden_layers": 1}, "has no place"),
        ({"num_hidden_layers": 3}, None),
    ],
)
def test_adapters_of_another_base_are_refused_or_told(change, said, base, adapters):
    config = tiny_config("llama", 97)
    for name, value in change.items():
        setattr(config, name, value)
    if "num_hidden_layers" in change:
        config.layer_types = None
    shutil.rmtree(base)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    if said is None:  # their names say on which layers they are, and that may be meant
        assert "on its first 2 of 3 layers alone" in load_policy(adapters).notes[0]
        return
    with pytest.raises(SteersmanError, match=said):
        load_policy(adapters)
    assert adapters.exists()


def test_a_grown_vocabulary_is_refused_and_the_folders_own_tokenizer_is_read(base, adapters, judge, tmp_path):
    for folder, load in ((adapters, load_policy), (judge, load_scalar)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        tokenizer.save_pretrained(folder)
        assert load(folder).tokenizer.chat_template == tokenizer.chat_template
    model, grown = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    grown.add_tokens(["<|a|>", "<|b|>"])
    model.resize_token_embeddings(len(grown))
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "theirs")
    with pytest.raises(SteersmanError, match=r"embed_tokens.* has no place.*vocabulary had grown"):
        load_policy(tmp_path / "theirs")
    grown.save_pretrained(tmp_path / "theirs")
    with pytest.raises(SteersmanError, match="tokens were added"):
        load_policy(tmp_path / "theirs")


@pytest.mark.filterwarnings("error")
def test_loading_adapters_says_nothing_of_what_libraries_call_each_other(base, adapters, judge, capfd):
    load_policy(adapters)
    load_policy(base, lora=LoraConfig(r=2))
    load_scalar(judge)
    assert "Warning" not in capfd.readouterr().err
