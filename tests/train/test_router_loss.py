"""`train.router_loss`: a mixture trained with it uses its experts more evenly, and every update tells what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from letter_models import LETTERS, WORDS, letters, write_jsonl
from train_kit import merge, rows

from steersman.model import Policy, load_policy
from steersman.types import SteersmanError, Tokens
from steersman.verb_table import VERBS

SIZES = {
    "vocab_size": len(LETTERS), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 1,
    "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROWS = [{"prompt": "say", "completion": word, "chosen": word, "rejected": word[:1] + "!"} for word in WORDS]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """A mixture whose states share a direction, in which its routers see most tokens to one expert."""
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES))
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] += 1.5
        for layer in model.model.layers:
            layer.mlp.gate.weight[0, 0] += 1.0
    model.save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


def run(verb: str, folder: Path, model: Path, **keys: Any) -> Path:
    kinds = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected")}
    data = write_jsonl(folder / f"{verb}.jsonl", [{k: row[k] for k in kinds[verb]} for row in ROWS])
    base = {
        "model": {"path": str(model)},
        "data": {"path": str(data)},
        "train": {"batch_size": 10, "max_steps": 2, "epochs": 99},
        "run": {"dir": str(folder / f"run-{len([*folder.iterdir()])}"), "threads": 1},
    }
    given = merge(base, {key.replace("__", "."): value for key, value in keys.items()})
    recipe = VERBS[verb].recipe_class(None, []).model_validate(given)
    VERBS[verb].here(recipe, resume=False)
    return Path(recipe.run.dir)


def tokens_of(texts: list[str]) -> Tokens:
    ids = letters()
    return Tokens.from_ids([ids("say")["input_ids"]] * len(texts), [[*ids(t)["input_ids"], 2] for t in texts])


def unevenness(policy: Policy, tokens: Tokens) -> float:
    routers = policy.routers or policy.watch_routers()
    with routers.listening():
        policy.hidden(tokens)
        return float(routers.loss().detach())


def test_experts_are_in_more_even_use_where_it_is_asked_for(mixture, tmp_path):
    learn = {"train__max_steps": 15, "optimizer__lr": 0.01, "run__eval_every": 15}
    runs = [run("sft", tmp_path, mixture, **learn, **more) for more in ({}, {"train__router_loss": 1.0})]
    policies = [load_policy(path, device="cpu") for path in (mixture, *(folder / "model" for folder in runs))]
    start, without, balanced = (unevenness(policy, tokens_of(WORDS)) for policy in policies)
    assert start > 1.3
    assert balanced < 1.05 < 1.15 < without
    plain, told = ([row for row in rows(folder) if "loss" in row] for folder in runs)
    assert not any("router_loss" in row for row in plain)
    assert told[0]["loss"] == plain[0]["loss"]  # the objective's own, without it
    assert told[0]["router_loss"] - told[-1]["router_loss"] > 0.2
    assert told[-1]["loss"] < plain[0]["loss"]


def test_what_is_told_is_the_mean_over_micro_batches_weighed_by_their_tokens(mixture, tmp_path):
    folder = run("sft", tmp_path, mixture, train__router_loss=0.5, run__micro_tokens=1,
                 train__batch_size=len(WORDS), train__max_steps=1)  # fmt: skip
    policy, one = load_policy(mixture, device="cpu"), [tokens_of([word]) for word in WORDS]
    lengths = [int(tokens.length) for tokens in one]
    mean = sum(n * unevenness(policy, tokens) for n, tokens in zip(lengths, one, strict=True)) / sum(lengths)
    found = next(row["router_loss"] for row in rows(folder) if "router_loss" in row)
    assert found == pytest.approx(mean, rel=1e-5)
    assert found > 1.02 * unevenness(policy, tokens_of(WORDS))


def test_it_stands_in_the_metrics_of_a_preference_run(mixture, tmp_path):
    """Both answers count, each with its prompt; the reference, which is the same model without adapters, does not."""
    folder = run("dpo", tmp_path, mixture, train__router_loss=0.1, model__lora={"r": 2}, samples__prompts=0,
                 train__batch_size=len(ROWS), train__max_steps=1)  # fmt: skip
    found = next(row for row in rows(folder) if "router_loss" in row)
    answers = [row[key] for key in ("chosen", "rejected") for row in ROWS]
    wanted = unevenness(load_policy(mixture, device="cpu"), tokens_of(answers))
    assert found["router_loss"] == pytest.approx(wanted, rel=1e-5)
    assert found["loss"] == pytest.approx(0.6931, abs=1e-4)
    told = json.loads((folder / "summary.json").read_text())
    assert not any("router_loss" in key and "held_out" in key for key in told)


def test_a_dense_model_is_refused_before_anything_is_read(mixture, tmp_path):
    hf.LlamaConfig(**{k: v for k, v in SIZES.items() if "expert" not in k}).save_pretrained(tmp_path / "dense")
    letters().save_pretrained(tmp_path / "dense")
    for verb in ("sft", "dpo"):
        with pytest.raises(SteersmanError, match=r"train.router_loss: .*dense is no causal mixture of experts"):
            run(verb, tmp_path, tmp_path / "dense", train__router_loss=0.1)
