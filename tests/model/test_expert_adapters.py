"""Adapters on mixtures of experts: on experts and no routers, saved, merged and read back, or refused at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from letter_models import LETTERS, letters, write_jsonl
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from steersman import cli
from steersman.model import LoraConfig, SharedBase, load_policy, load_scalar, save
from steersman.model.lora_targets import adapted_names
from steersman.model.merge import merged_state
from steersman.rollout.remote.snapshot import require_plain_adapters
from steersman.types import SteersmanError, Tokens

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from families import small_config  # type: ignore

TOKENS = Tokens.from_ids([[5, 6, 9], [7]], [[7, 8, 9], [4, 5, 6, 11]])
ROWS = [{"prompt": "hm", "completion": text} for text in ("a cat", "no dog", "it is", "oh")]


def mixture(kind: str, folder: Path, **sizes: Any) -> Path:
    torch.manual_seed(0)
    config = small_config(kind, len(LETTERS), whole=True)
    for name, value in sizes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0 if p.ndim > 1 else 1.0)
    model.save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


@pytest.fixture
def mixtral(tmp_path):
    return mixture("mixtral", tmp_path / "base")


def stir(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


def plain_logp(model: Any, row: int) -> torch.Tensor:
    """The log-probabilities of a row's response by transformers' own forward pass."""
    one = TOKENS.rows(torch.tensor([row]))
    prompt, response = (
        one.prompt[:, : one.prompt_length[0]],
        one.response[:, : one.response_length[0]],
    )
    logits = model.eval()(torch.cat([prompt, response], 1)).logits[:, prompt.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(-1, response[..., None])[0, :, 0]


EXPERTS = {"experts.gate_up_proj", "experts.down_proj"}
FAMILIES = {
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    # peft takes the layers of the shared expert for those of the others
    "qwen3_next": EXPERTS | {"gate_proj.weight", "up_proj.weight", "down_proj.weight"},
    "glm4_moe": EXPERTS | {"gate_proj.weight", "up_proj.weight", "down_proj.weight"},
    "gpt_oss": EXPERTS,  # [experts, in, out]
    "nemotron_h": {"experts.up_proj", "experts.down_proj"},
    "jetmoe": {"input_linear.weight", "output_linear.weight"},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_adapters_of_a_mixture_are_saved_merged_and_read_back_as_peft_reads_them(kind, tmp_path):
    base = mixture(kind, tmp_path / "base")
    policy = load_policy(base, lora=LoraConfig(r=2, alpha=4))
    assert policy.adapters is not None
    assert set(policy.adapters.peft_config["default"].target_parameters) == FAMILIES[kind]
    names = adapted_names(policy.model)
    assert not any("router" in name or ".gate" in name.replace(".gate_", "_") for name in names)
    start = policy.logp(TOKENS).logp
    stir(policy)
    expected = policy.logp(TOKENS).logp
    assert (expected - start).abs().max() > 0.01
    alone = save(policy, None, tmp_path / "adapters", merged=False)
    whole = save(policy, None, tmp_path / "merged")
    for folder in (alone, whole):
        torch.testing.assert_close(load_policy(folder).logp(TOKENS).logp, expected, atol=1e-5, rtol=1e-5)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), alone)
    for row in range(2):
        length = int(TOKENS.response_length[row])
        for model in (theirs, AutoModelForCausalLM.from_pretrained(whole)):
            found = plain_logp(model, row)
            torch.testing.assert_close(found, expected[row, :length], atol=1e-5, rtol=1e-5)


def test_every_matrix_of_experts_gets_a_gradient_and_the_router_none(mixtral):
    policy = load_policy(mixtral, lora=LoraConfig(r=2))
    policy.logp(TOKENS).logp.sum().backward()
    moved = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {name for name, p in policy.named_parameters() if "lora_B" in name} <= moved
    assert all(".lora_" in name for name in moved)


@pytest.mark.parametrize("merge", ["true", "false"])
def test_a_run_with_adapters_on_a_mixture_ends_in_a_model_that_answers(merge, mixtral, tmp_path):
    data, run = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "run"
    asked = [
        "sft",
        "--model.path",
        str(mixtral),
        "--data.path",
        str(data),
        "--run.dir",
        str(run),
        "--run.threads",
        "1",
    ]
    asked += ["--train.batch_size", "2", "--train.max_steps", "2", "--model.lora", "{r: 2}", "--model.merge", merge]
    assert cli.main(asked) == 0
    assert (run / "model" / "adapter_config.json").exists() == (merge == "false")
    answers = [
        "generate",
        "--model.path",
        str(run / "model"),
        "--data.path",
        str(data),
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main([*answers, "--rollout.max_new_tokens", "3"]) == 0
    assert cli.main(["export", str(run / "model"), "--out", str(tmp_path / "exported")]) == 0


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (["q_proj"], {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        (["w1", "w3"], {"0.mlp.experts.gate_up_proj", "1.mlp.experts.gate_up_proj"}),
        (r".*layers\.1\..*(v_proj|down_proj)", {"1.self_attn.v_proj", "1.mlp.experts.down_proj"}),
        (["1.mlp.gate"], {"1.mlp.gate.weight"}),  # a router that is named
    ],
)
def test_what_is_named_carries_adapters_and_nothing_else(targets, adapted, mixtral, tmp_path, caplog):
    policy = load_policy(mixtral, lora=LoraConfig(r=2, targets=targets))
    assert {name.partition("layers.")[2] for name in adapted_names(policy.model)} == adapted
    stir(policy)
    again = load_policy(save(policy, None, tmp_path / "saved", merged=False))
    assert adapted_names(again.model) == adapted_names(policy.model)
    again.adapt(LoraConfig(r=2, targets=targets))
    assert not any("targets" in note for note in again.notes)
    again.adapt(LoraConfig(r=2, targets=["o_proj"]))
    assert any("targets" in note for note in again.notes)


def test_layers_of_a_family_of_mixtures_without_experts_all_carry_adapters(tmp_path):
    """peft looks for the experts of such a family, and adapts none of the layers that have their names."""
    base = mixture("deepseek_v3", tmp_path / "base", first_k_dense_replace=2)
    policy = load_policy(base, lora=LoraConfig(r=2))
    for layer in range(2):
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert f"model.layers.{layer}.mlp.{name}.weight" in adapted_names(policy.model)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"dropout": 0.1}, r"lora\.dropout can not act on the weights of a mixture of experts \(experts\.down_proj"),
        ({"dora": True}, r"lora\.dora can not act on the weights"),
        ({"targets": ["q_proj", "w1"]}, r"name w1 of the experts in (model\.)?layers\.0\.mlp\.experts without w3"),
        ({"targets": ["nothing"]}, r"lora\.targets \['nothing'\] do not fit"),
    ],
)
def test_what_adapters_of_experts_can_not_do_is_refused_at_once(lora, said, mixtral):
    for load in (load_policy, load_scalar):
        with pytest.raises(SteersmanError, match=said):
            load(mixtral).adapt(LoraConfig(r=2, **lora))


def test_saved_adapters_of_experts_do_not_go_on_with_dropout(mixtral, tmp_path):
    folder = save(load_policy(mixtral, lora=LoraConfig(r=2)), None, tmp_path / "saved", merged=False)
    with pytest.raises(SteersmanError, match=r"lora\.dropout can not act"):
        load_policy(folder, lora=LoraConfig(r=2, dropout=0.1))
    load_policy(mixtral, lora=LoraConfig(r=2, dropout=0.1, dora=True, targets=["q_proj"]))


@torch.no_grad()
def test_adapters_that_a_family_would_rename_are_read_back(tmp_path):
    """Laguna's files call its `shared_experts` by another name; those of adapters do not."""
    policy = load_policy(mixture("laguna", tmp_path / "base"), lora=LoraConfig(r=2))
    stir(policy)
    again = load_policy(save(policy, None, tmp_path / "adapters", merged=False))
    now = dict(again.model.named_parameters())
    assert any("shared_experts" in name and ".lora_" in name for name in now)
    assert all(torch.equal(p, now[name]) for name, p in policy.model.named_parameters())


def test_servers_are_not_sent_adapters_of_experts(mixtral):
    require_plain_adapters(load_policy(mixtral, lora=LoraConfig(r=2, targets=["q_proj"])))
    with pytest.raises(SteersmanError, match=r"or experts \(experts\.down_proj\); use sync: weights"):
        require_plain_adapters(load_policy(mixtral, lora=LoraConfig(r=2)))


@torch.no_grad()
def test_a_reward_model_on_a_mixture_keeps_its_adapters(mixtral, tmp_path):
    scalar = load_scalar(mixtral)
    scalar.adapt(LoraConfig(r=2))
    stir(scalar)
    expected = scalar.score(TOKENS)
    alone = save(scalar, None, tmp_path / "adapters", merged=False)
    whole = save(scalar, None, tmp_path / "merged")
    for folder in (alone, whole):
        torch.testing.assert_close(load_scalar(folder).score(TOKENS), expected, atol=1e-5, rtol=1e-5)
    shared = SharedBase(load_policy(mixtral, trainable=False)).scalar_model(str(alone), trainable=False)
    torch.testing.assert_close(shared.score(TOKENS), expected, atol=1e-5, rtol=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(mixtral, num_labels=1)
    theirs = peft.PeftModel.from_pretrained(plain, alone).eval()
    ids = torch.cat([TOKENS.prompt[:1], TOKENS.response[:1, : TOKENS.response_length[0]]], 1)
    torch.testing.assert_close(theirs(ids).logits[:, 0], expected[:1], atol=1e-5, rtol=1e-5)


def test_adapters_of_experts_that_peft_made_are_loaded_and_merged(mixtral, tmp_path):
    """Also with its own ranks for the gate's and the up projection's common matrix, and on the router."""
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    theirs = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    stir(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    told = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert "gate.weight" in told["target_parameters"]
    assert set(told["rank_pattern"].values()) == {4}
    with torch.no_grad():
        expected = plain_logp(theirs, 0)
        policy = load_policy(tmp_path / "theirs")
        torch.testing.assert_close(policy.logp(TOKENS).logp[0, :3], expected, atol=1e-5, rtol=1e-5)
        merged = AutoModelForCausalLM.from_pretrained(save(policy, None, tmp_path / "merged"))
        torch.testing.assert_close(plain_logp(merged, 0), expected, atol=1e-5, rtol=1e-5)
        assert set(merged_state(policy.model)) == set(AutoModelForCausalLM.from_pretrained(mixtral).state_dict())
