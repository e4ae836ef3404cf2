"""What loads, what it says, and everything that is refused, by name."""

from __future__ import annotations

import json

import pytest
import torch
from model_inputs import word_tokenizer
from tiny_models import tiny_config, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from steersman.model import LoraConfig, load_policy, load_scalar, save
from steersman.model.load import gives_numbers
from steersman.model.source import dropout_off, read_tokenizer
from steersman.types import SteersmanError


def edit(folder, name="config.json", **fields):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(match: str):
    return pytest.raises(SteersmanError, match=match)


def test_loads_what_was_there(family, model_folder, tokens):
    model = tiny_model(family)
    policy = load_policy(model_folder(family), device="cpu")
    state = model.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in policy.model.state_dict().items())
    assert all(p.requires_grad for p in policy.parameters())
    assert policy.tokenizer.pad_token_id is None
    assert policy.notes == []


def test_options(model_folder):
    folder = model_folder()
    policy = load_policy(folder, dtype="bfloat16", attention="eager", trainable=False, pack=64)
    assert policy.model.dtype == torch.bfloat16
    assert policy.model.config._attn_implementation == "eager"
    assert not any(p.requires_grad for p in policy.parameters())
    assert policy.pack == 64
    with refused("dtype 'int3' is not one of float32"):
        load_policy(folder, dtype="int3")


def test_a_local_path_never_asks_a_hub(model_folder, monkeypatch):
    import socket

    def no_network(*_args):
        raise AssertionError("asked the network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    load_policy(model_folder())


def test_every_part_of_a_hub_model_is_asked_of_the_hub(model_folder, monkeypatch):
    folder, asked = str(model_folder()), []
    for auto in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):

        def fetch(name, *more, load=auto.from_pretrained, **how):
            if name != "someone/model":
                return load(name, *more, **how)
            asked.append(how["local_files_only"])
            return load(folder, *more, **how)

        monkeypatch.setattr(auto, "from_pretrained", fetch)
    load_policy("someone/model", device="cpu")
    assert asked == [False, False, False]


def test_dropout_is_off_and_it_says_so(tmp_path, tokenizer, tokens):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for model in (load_policy(tmp_path), load_scalar(tmp_path)):
        assert "resid_pdrop 0.1" in model.notes[0]
        assert not any(isinstance(m, torch.nn.Dropout) and m.p for m in model.modules())
    policy = load_policy(tmp_path).train()
    assert torch.equal(policy.logp(tokens).logp, policy.eval().logp(tokens).logp)
    assert dropout_off(tiny_config("gpt2")) == {}


def test_paths_that_lead_nowhere(model_folder, tmp_path):
    folder = model_folder("qwen2")
    with refused(r"qwen2-modle: no such model folder; in .* there is qwen2-model"):
        load_policy(tmp_path / "qwen2-modle")
    with refused("there is qwen2-model"):
        load_policy(str(tmp_path / "runs" / "deep" / "model"))
    with refused("no model there .*did you mean its folder qwen2-model"):
        load_policy(tmp_path)
    with refused("is a file; give the model's folder"):
        load_policy(folder / "config.json")
    with refused("no such folder.*no hub model of that name could be fetched"):
        load_policy("nobody/no-such-model-here")
    with refused("no such model folder"):
        load_scalar(str(tmp_path / "missing"))


def test_other_kinds_of_model(tmp_path, tokenizer):
    t5 = T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    with refused("T5ForConditionalGeneration at .*t5': its config names no decoder_start_token_id"):
        load_policy(tmp_path / "t5")
    CLIPConfig().save_pretrained(tmp_path / "clip")
    with refused("type 'clip' is not a causal language model"):
        load_policy(tmp_path / "clip")
    bert = BertConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(bert).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    with refused("weights of BertLMHeadModel are missing"):
        load_policy(tmp_path / "bert")


def test_a_reward_model_is_not_a_policy(model_folder, tmp_path):
    """Nor where its output layer is its embedding, so that no weight is missing; nor its adapters, nor any on it."""
    for tied in (False, True):
        config = tiny_config("llama")
        config.tie_word_embeddings, config.num_labels, config.pad_token_id = tied, 1, 0
        folder = model_folder(model=AutoModelForSequenceClassification.from_config(config))
        assert gives_numbers(folder)
        with refused(f"{folder}: a reward model or critic, which gives numbers and writes no text; give"):
            load_policy(folder)
    scalar = load_scalar(folder)
    scalar.adapt(LoraConfig(r=2))
    adapters = save(scalar, None, tmp_path / "adapters", merged=False)
    assert gives_numbers(adapters)
    with refused(f"{adapters}: a reward model or critic, which gives numbers"):
        load_policy(adapters)
    policy = load_policy(model_folder("qwen3"), lora=LoraConfig(r=2))
    assert not gives_numbers(save(policy, None, tmp_path / "own", merged=False))


def test_the_folder_that_was_meant_is_named(model_folder, tmp_path):
    """A run's folder has a model in it, whole or as adapters."""
    for mark in ("config.json", "adapter_config.json"):
        run = tmp_path / mark.removesuffix(".json")
        (run / "model").mkdir(parents=True)
        (run / "model" / mark).write_text("{}")
        with refused("no model there .no config.json.; did you mean its folder model?"):
            load_policy(run)


def test_tokenizers(model_folder, tmp_path):
    with refused("no tokenizer could be loaded.*save the model's tokenizer into the same folder"):
        load_policy(model_folder("qwen2", tokenizer=None))
    with refused("no tokenizer could be loaded.*there is no folder of that name; in"):
        read_tokenizer("someone/no-such-model", local=False)
    with refused('no end-of-sequence token.*"eos_token"'):
        load_policy(model_folder("gpt2", tokenizer=word_tokenizer(eos=None)))
    with refused("ids up to 97, but the model's vocabulary has 97 rows"):
        load_policy(model_folder("llama", tokenizer=word_tokenizer(98)))
    with refused("ids up to 97"):
        load_scalar(model_folder("llama", tokenizer=word_tokenizer(98)))
    load_policy(model_folder("qwen3", tokenizer=word_tokenizer(90)))  # rows to spare


def test_broken_files(model_folder):
    folder = model_folder()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with refused("weights can not be loaded"):
        load_policy(folder)
    (folder / "config.json").write_text("{")
    with refused("config.json can not be read"):
        load_policy(folder)


def test_weights_of_another_shape(model_folder):
    folder = model_folder()
    edit(folder, intermediate_size=64)
    with refused("missing or of another shape"):
        load_policy(folder)


def test_scalar_from_a_language_model(family, model_folder, tokens):
    scalar = load_scalar(model_folder(family), device="cpu")
    assert "new scalar head of zeros" in scalar.notes[-1]
    assert not scalar.score(tokens).any()
    if scalar.decoder_start:  # nothing is drawn at random, so that the same recipe gives the same run
        assert torch.equal(scalar.model.classification_head.dense.weight, torch.eye(32))
    trunk = tiny_model(family).base_model.state_dict()
    assert all(torch.equal(x, trunk[name]) for name, x in scalar.trunk.state_dict().items())
    scalar.score(tokens).sum().backward()
    assert scalar.output.weight.grad.any()


def test_scalar_as_it_is(model_folder, tokens):
    config = tiny_config("llama")
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    folder = model_folder(model=model)
    scalar = load_scalar(folder, trainable=False)
    assert torch.equal(scalar.model.score.weight, model.score.weight)
    assert scalar.notes == []
    assert not any(p.requires_grad for p in scalar.parameters())
    assert not load_scalar(folder, init="fresh").model.score.weight.any()


def test_scalar_with_two_labels(model_folder):
    folder = model_folder(model=AutoModelForSequenceClassification.from_config(tiny_config("llama")))
    with refused(r"llama-model: config\.num_labels is 2.*exactly one.*init='fresh'"):
        load_scalar(folder)
    assert load_scalar(folder, init="fresh").model.score.weight.shape == (1, 32)
    edit(folder, num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    with refused(r"num_labels is 1, but.*\[2, 32\] and \[1, 32\]"):
        load_scalar(folder)


def test_plain_transformers_still_load_it_all(model_folder):
    folder = model_folder()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    load_policy(folder)
    load_scalar(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotations_that_depend_on_the_longest_row_are_told(kind, tmp_path, tokenizer):
    rope = {"rope_type": kind, "rope_theta": 10000.0}
    rope |= {"factor": 4.0} if kind == "dynamic" else {
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 32
    }  # fmt: skip
    config = tiny_config("llama")
    config.rope_parameters = rope
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    limit = 32 if kind == "longrope" else 128
    for load in (load_policy, load_scalar):
        assert any(f"a row longer than {limit} tokens changes the rotations" in note for note in load(tmp_path).notes)


def test_weights_outside_the_folder_are_refused(model_folder, tmp_path):
    """An index may name any file; no digest of the folder would tell what is in it."""
    folder = model_folder("llama")
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = folder / "model.safetensors.index.json"
    for name in ("../x.safetensors", str(tmp_path / "x.safetensors")):
        keys = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).state_dict()
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, name)}))
        with refused(r"index\.json: it names weights outside its folder"):
            load_policy(folder, device="cpu")
