"""Round trips through plain transformers, adapters, and disks that fill."""

from __future__ import annotations

import errno
import json
import weakref
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MixtralConfig,
)

from steersman.model import LoraConfig, Policy, adapted, load_policy, load_scalar, save, weight_files
from steersman.model.fast.plain import plain_layers
from steersman.types import SteersmanError


def nudge(module: torch.nn.Module) -> None:
    torch.manual_seed(7)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


def test_policy_round_trip(family, model_folder, tmp_path, tokens):
    policy = load_policy(model_folder(family))
    nudge(policy)
    folder = save(policy, None, tmp_path / "out" / "model")
    plain = (AutoModelForSeq2SeqLM if policy.decoder_start else AutoModelForCausalLM).from_pretrained(folder)
    read = {"decoder_input_ids": tokens.response} if policy.decoder_start else {}
    with torch.no_grad(), plain_layers():  # bit for bit, so both in the same words
        assert torch.equal(plain(tokens.prompt, **read).logits, policy.model(tokens.prompt, **read).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert tokenizer.pad_token is None
    assert torch.equal(load_policy(folder).logp(tokens).logp, policy.logp(tokens).logp)


def test_scalar_round_trip(family, model_folder, tmp_path, tokens):
    scalar = load_scalar(model_folder(family))
    nudge(scalar)
    folder = save(scalar, scalar.tokenizer, tmp_path / "reward")
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    assert plain.config.num_labels == 1
    row = tokens.rows(torch.tensor([0]))
    ids = torch.cat([row.prompt, row.response], 1)
    if not scalar.decoder_start:  # the class of an encoder-decoder reads one text on both sides
        with torch.no_grad():
            torch.testing.assert_close(plain(ids).logits[:, 0], scalar.score(row))
    state = plain.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in scalar.model.state_dict().items())
    again = load_scalar(folder)
    assert again.notes == []
    # the weights are equal to the bit; where they lie in memory decides the last bit of a product
    torch.testing.assert_close(again.value(tokens), scalar.value(tokens), atol=2e-6, rtol=2e-6)


def test_tied_embeddings_stay_tied(model_folder, tmp_path):
    policy = load_policy(model_folder("gpt2"))
    nudge(policy)
    again = load_policy(save(policy, None, tmp_path / "tied"))
    assert again.model.lm_head.weight is again.model.transformer.wte.weight
    assert torch.equal(again.model.lm_head.weight, policy.model.lm_head.weight)


def test_precision_on_disk(model_folder, tmp_path):
    policy = load_policy(model_folder())
    folder = save(policy, None, tmp_path / "half", dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.dtype == torch.bfloat16
    assert policy.model.dtype == torch.float32
    exact = policy.model.lm_head.weight
    assert ((plain.lm_head.weight - exact).abs() <= 2**-7 * exact.abs()).all()  # one of the two neighbours


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "t5", "bart"])
def test_lora(family, model_folder, tmp_path, tokens):
    base_folder = model_folder(family)
    with torch.no_grad():  # a T5 whose position bias is trained takes another attention kernel
        base = load_policy(base_folder).logp(tokens).logp
    policy = load_policy(base_folder, lora=LoraConfig(r=4, alpha=8.0))
    names = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert names
    assert all(".lora_" in n for n in names)
    assert torch.equal(policy.logp(tokens).logp, base)  # B starts at zero
    nudge(policy)
    tuned = policy.logp(tokens).logp
    assert (tuned - base).abs().max() > 1e-2
    with policy.reference() as reference:
        logp = reference.logp(tokens).logp
        assert not logp.requires_grad
        assert torch.equal(logp, base)
    assert torch.equal(policy.logp(tokens).logp, tuned)

    before = {n: x.clone() for n, x in policy.state_dict().items()}
    merged = save(policy, None, tmp_path / "merged")
    assert all(torch.equal(x, before[n]) for n, x in policy.state_dict().items())
    assert not (merged / "adapter_config.json").exists()
    plain = load_policy(merged)
    torch.testing.assert_close(plain.logp(tokens).logp, tuned, rtol=1e-4, atol=1e-3)

    adapters = save(policy, None, tmp_path / "adapters", merged=False)
    assert not (adapters / "model.safetensors").exists()
    again = load_policy(adapters)
    torch.testing.assert_close(again.logp(tokens).logp, tuned, rtol=1e-5, atol=1e-5)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == names
    with again.reference() as reference:
        assert torch.equal(reference.logp(tokens).logp, base)


def test_lora_targets(model_folder):
    folder = model_folder()
    with pytest.raises(SteersmanError, match=r"do not fit LlamaForCausalLM.*\n.*q_proj"):
        load_policy(folder, lora=LoraConfig(targets=["query"]))
    with pytest.raises(SteersmanError, match="include the output layer"):
        load_policy(folder, lora=LoraConfig(targets=["q_proj", "lm_head"]))


def test_lora_on_the_shared_embeddings_of_a_pair(model_folder):
    with pytest.raises(SteersmanError, match="include the embeddings, which the encoder"):
        load_policy(model_folder("t5"), lora=LoraConfig(targets=["shared"]))


def test_a_disk_that_fills_loses_nothing(model_folder, tmp_path, monkeypatch):
    policy = load_policy(model_folder())
    folder = save(policy, None, tmp_path / "kept")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    nudge(policy)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(policy.tokenizer, "save_pretrained", full)  # after the weights, before the end
    with pytest.raises(SteersmanError, match="kept: the disk is full"):
        save(policy, None, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".kept")]


def test_a_folder_is_replaced_whole(model_folder, tmp_path):
    policy = load_policy(model_folder())
    folder = save(policy, None, tmp_path / "again")
    (folder / "stale.txt").write_text("from before")
    nudge(policy)
    save(policy, None, folder)
    assert not (folder / "stale.txt").exists()
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_saving_does_not_need_the_folder_it_came_from(tmp_path, tokenizer, tokens):
    policy = Policy(tiny_model("qwen2"), tokenizer)
    again = load_policy(save(policy, None, tmp_path / "fresh"))
    assert torch.equal(again.logp(tokens).logp, policy.logp(tokens).logp)


@pytest.mark.parametrize(("family", "target"), [("llama", "embed_tokens"), ("gpt2", "wte")])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_the_embedding_alone_unties_it_from_the_output_layer(model_folder, tmp_path, tokens, family,
                                                                           target, tied):  # fmt: skip
    config = tiny_config(family, 97)
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    policy = load_policy(model_folder(family, model=model), lora=LoraConfig(r=4, targets=[target]))
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_embedding" in name:
                weight.normal_(0, 0.3)
    assert any("the merged model has two" in note for note in policy.notes) == tied
    expected = policy.logp(tokens).logp
    before = policy.model.get_output_embeddings().weight.clone()
    folder = save(policy, None, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.config.tie_word_embeddings is False
    torch.testing.assert_close(plain.get_output_embeddings().weight, before, rtol=0, atol=0)
    torch.testing.assert_close(load_policy(folder).logp(tokens).logp, expected)
    ids = torch.cat([tokens.prompt[0, : tokens.prompt_length[0]], tokens.response[0, : tokens.response_length[0]]])
    logits = plain(ids[None]).logits[0, tokens.prompt_length[0] - 1 : -1].double().log_softmax(-1)
    said = logits.gather(1, tokens.response[0, : tokens.response_length[0], None])[:, 0]
    torch.testing.assert_close(said.float(), expected[0, : tokens.response_length[0]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "whole"),
    [
        ("llama", ("embed_tokens",)), ("llama", ("lm_head",)), ("llama", ("embed_tokens", "lm_head", "norm")),
        ("gpt2", ("wte",)), ("gpt2", ("lm_head",)),
    ],
)  # fmt: skip
def test_a_shared_table_trained_whole_stays_one_matrix(family, whole, model_folder, tmp_path, tokens):
    """It is trained, counted, saved, merged and loaded as one, here and by peft; adapters off, it is the start's."""
    config = tiny_config(family, 97)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    folder, lora = (
        model_folder(family, model=AutoModelForCausalLM.from_config(config)),
        LoraConfig(r=4, train_whole=whole),
    )
    policy, start = load_policy(folder, lora=lora), load_policy(folder)
    ends = policy.model.get_input_embeddings(), policy.model.get_output_embeddings()
    assert ends[0].weight is ends[1].weight
    assert any("are one matrix, which is trained and saved as one" in note for note in policy.notes)
    learned = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    assert adapted(str(folder), lora).trained == learned
    nudge(policy)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, logits = policy.logp(tokens).logp, policy.model(ids).logits
        with policy.reference() as reference:
            torch.testing.assert_close(reference.logp(tokens).logp, start.logp(tokens).logp, rtol=0, atol=0)
    saved = save(policy, None, tmp_path / "merged")
    assert json.loads((saved / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(saved / "model.safetensors")
    adapters = save(policy, None, tmp_path / "adapters", merged=False)
    assert adapted(str(adapters), LoraConfig()).trained == learned
    going_on = load_policy(adapters, lora=lora)
    assert not any("go on as they are" in note for note in going_on.notes)
    ends = going_on.model.get_input_embeddings(), going_on.model.get_output_embeddings()
    assert ends[0].weight is ends[1].weight
    assert ends[0].weight.requires_grad
    again = save(going_on, None, tmp_path / "again")
    with torch.no_grad():
        for path in (saved, adapters, again):
            torch.testing.assert_close(load_policy(path).logp(tokens).logp, expected, rtol=1e-4, atol=1e-4)
        theirs: Any = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapters)
        torch.testing.assert_close(theirs(ids).logits, logits, rtol=1e-4, atol=1e-4)
        assert theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight
    same = save(load_policy(folder, lora=LoraConfig(r=4)), None, tmp_path / "same")
    assert json.loads((same / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("whole", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tables_that_peft_trained_go_on_as_they_were_saved(whole, tie, model_folder, tmp_path, tokens):
    """Two matrices where it cut the tie, one where it kept it, with the numbers that they have."""
    config = tiny_config("llama", 97)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    folder = model_folder(model=AutoModelForCausalLM.from_config(config))
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=list(whole), ensure_weight_tying=tie,
                               task_type="CAUSAL_LM")  # fmt: skip
    theirs: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings)
    with torch.no_grad():
        for weight in {id(p): p for p in theirs.parameters() if p.requires_grad}.values():
            weight.add_(torch.randn_like(weight), alpha=0.1)
        ids = torch.arange(3, 40)[None]
        logits = theirs(ids).logits
    theirs.save_pretrained(tmp_path / "theirs")
    policy = load_policy(tmp_path / "theirs", lora=LoraConfig(r=2, alpha=8, train_whole=tuple(whole)))
    with torch.no_grad():
        torch.testing.assert_close(policy.model(ids).logits, logits, rtol=1e-5, atol=1e-5)
    tables = policy.model.get_input_embeddings(), policy.model.get_output_embeddings()
    assert (tables[0].weight is tables[1].weight) == tie
    assert not any("go on as they are" in note for note in policy.notes)
    learned = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    assert adapted(str(tmp_path / "theirs"), LoraConfig()).trained == learned
    saved = save(policy, None, tmp_path / "merged")
    assert json.loads((saved / "config.json").read_text())["tie_word_embeddings"] is tie
    with torch.no_grad():
        torch.testing.assert_close(
            load_policy(saved).logp(tokens).logp, policy.logp(tokens).logp, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_shared_table_of_a_pair_is_not_trained_whole(family, model_folder):
    with pytest.raises(SteersmanError, match=r"lora\.train_whole includes"):
        load_policy(model_folder(family), lora=LoraConfig(r=2, targets=["q", "q_proj"], train_whole=("lm_head",)))


def test_written_file_by_file_no_more_than_a_file_and_a_layer_lie_in_memory(model_folder, tmp_path, monkeypatch):
    policy = load_policy(model_folder())
    nudge(policy)
    sizes = {name: x.numel() * x.element_size() for name, x in policy.model.state_dict().items()}
    layer = max(sum(n for name, n in sizes.items() if f".layers.{i}." in name) for i in range(8))
    limit, alive, peak = max(sizes.values()), 0, 0

    def gathered(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal alive, peak
        copy = tensor.detach().clone()  # what putting pieces together makes
        size = copy.numel() * copy.element_size()
        alive, peak = alive + size, max(peak, alive + size)
        weakref.finalize(copy.untyped_storage(), freed, size)
        return copy

    def freed(size: int) -> None:
        nonlocal alive
        alive -= size

    monkeypatch.setattr(weight_files, "full_tensor", gathered)
    folder = save(policy, None, tmp_path / "model", max_shard_size=f"{limit / 1000}KB")
    assert layer <= peak <= limit + layer + max(sizes.values()) < 0.7 * sum(sizes.values())
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for name, value in policy.model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value), name


@pytest.mark.parametrize("size", ["5", "0GB", "big", "-1GB", "5PB"])
def test_a_size_that_is_none_is_refused_before_anything_is_written(size, model_folder, tmp_path):
    with pytest.raises(SteersmanError, match="max_shard_size"):
        save(load_policy(model_folder()), None, tmp_path / "model", max_shard_size=size)
    assert not (tmp_path / "model").exists()


def test_experts_that_lie_in_one_tensor_are_written_as_transformers_writes_them(tmp_path):
    config = MixtralConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=50, num_local_experts=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    weight_files.write_weights(model, weight_files.plain_entries(model), tmp_path / "ours", 10_000)
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = {name: x for file in (tmp_path / "ours").glob("*.safetensors") for name, x in load_file(file).items()}
    assert any(".experts.3." in name for name in theirs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", [False, True])
def test_updates_smaller_than_the_files_precision_are_kept_on_average(dtype, adapters, model_folder, tmp_path):
    """Weights that begin on the file's own numbers and move by a hundredth of the way to the next."""
    policy = load_policy(model_folder(), lora=LoraConfig(r=2) if adapters else None)
    name, base = "model.layers.0.mlp.up_proj", policy.model.get_submodule("model.layers.0.mlp.up_proj")
    layer = base.base_layer if adapters else base
    move = 0.01 * 0.05 * torch.finfo(dtype).eps
    with torch.no_grad():
        start = (0.04 + 0.02 * torch.rand_like(layer.weight)).to(dtype).float()
        layer.weight.copy_(start)
        if adapters:
            base.lora_A["default"].weight.fill_(move / base.scaling["default"] / 2)
            base.lora_B["default"].weight.fill_(1.0)
        else:
            layer.weight.add_(move)
    saved = [
        load_file(save(policy, None, tmp_path / str(i), dtype=dtype) / "model.safetensors")[f"{name}.weight"]
        for i in range(2)
    ]
    assert torch.equal(*saved)
    moved = saved[0].float() - start
    assert saved[0].dtype == dtype
    assert moved.min() >= 0
    share = 0.01 * (1 - 0.01) / start.numel()  # of the weights that go up, its variance
    gap = moved.max()
    assert abs(moved.mean() / gap - move / gap) < 4 * share**0.5


def test_what_the_files_precision_holds_is_saved_as_it_is():
    exact = torch.tensor([0.0, -0.0, 1.5, -3.0e38, 1e-40, float("inf"), float("-inf")]).to(torch.bfloat16)
    assert torch.equal(weight_files.narrowed(exact.float(), torch.bfloat16, "a"), exact)
    assert weight_files.narrowed(torch.tensor([float("nan")]), torch.bfloat16, "a").isnan().all()
