"""`reward` and the critic of on-policy methods on adapters: what is trained, what is saved, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from letter_models import write_jsonl
from train_kit import merge, recipe, rows, save_tiny, weights
from transformers import AutoModelForSequenceClassification

from steersman import cli
from steersman.data import Batches
from steersman.model import load_scalar
from steersman.train.on_policy import OnPolicy
from steersman.train.roles import build_roles
from steersman.types import Prompt, SteersmanError, Tokens
from steersman.verbs import reward_model

WORDS = ["yes it is.", "no", "a cat, a dog", "ok", "look there", "so she said", "hm", "what?"]


def settings(tmp_path, model, folder="run", **extra) -> dict:
    pairs = [
        {"prompt": "which" + "?" * (i % 4), "chosen": WORDS[i % 8] + " a", "rejected": WORDS[(i + 3) % 8]}
        for i in range(24)
    ]
    plain = {
        "model": {"path": str(model), "lora": {"r": 2}},
        "data": {"path": str(write_jsonl(tmp_path / "pairs.jsonl", pairs)), "held_out": 4},
        "train": {"batch_size": 4, "epochs": 2},
        "optimizer": {"lr": 0.02},
        "run": {"dir": str(tmp_path / folder), "threads": 1, "save_every": 3},
    }
    return merge(plain, extra)


def trained(asked: dict, **how) -> dict:
    return reward_model.run(reward_model.RewardModelRecipe.model_validate(asked), **how)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_and_head_are_trained_and_the_saved_model_is_a_plain_one(family, tmp_path):
    base = save_tiny(tmp_path / "base", family)
    trained(settings(tmp_path, base))
    before, after = load_scalar(base), load_scalar(tmp_path / "run" / "model")
    delta = {
        name: (x.detach() - dict(before.model.named_parameters())[name].detach())
        for name, x in after.model.named_parameters()
    }
    moved = {name for name, x in delta.items() if x.abs().max() > 1e-7}
    assert any("score" in name for name in moved)
    assert len(moved) > 2
    assert not any("norm" in name or "ln_" in name or "wte" in name or "embed" in name for name in moved)
    for name in moved:
        if "score" not in name:
            assert torch.linalg.matrix_rank(delta[name], atol=1e-5) <= 2, name
    tokens = Tokens.from_ids([[5, 6, 7]], [[9, 10]])
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    with torch.no_grad():
        torch.testing.assert_close(plain(torch.tensor([[5, 6, 7, 9, 10]])).logits[:, 0], after.score(tokens))


def test_the_saved_scores_are_those_that_were_measured(tmp_path, mini):
    summary = trained(settings(tmp_path, mini))
    asked = settings(tmp_path, tmp_path / "run" / "model", "again", stage="evaluate")
    del asked["model"]["lora"]
    again = trained(asked | {"data": {"path": asked["data"]["path"], "held_out": 4}})
    assert again["held_out/loss"] == pytest.approx(summary["held_out/loss"], rel=1e-4)


def test_a_resumed_run_has_the_same_weights(tmp_path, mini):
    looks = {"train.max_steps": 9, "run.eval_every": 3}  # both runs look after the same updates
    trained(settings(tmp_path, mini, **looks))
    cut = settings(tmp_path, mini, "cut", **looks)
    trained(cut | {"train": cut["train"] | {"max_steps": 6}})
    trained(cut, resume=True)
    assert [row["step"] for row in rows(tmp_path / "cut")] == [row["step"] for row in rows(tmp_path / "run")]
    a, b = (weights(tmp_path / name / "model") for name in ("run", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"stage": "evaluate"}, "stage evaluate trains no weights"),
    ],
)
def test_what_adapters_can_not_be_asked_for_is_refused(extra, said, tmp_path, mini, capsys):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(settings(tmp_path, mini, **extra)))
    assert cli.main(["reward", str(file.rename(tmp_path / "recipe.yaml"))]) == 2
    assert said in capsys.readouterr().err


def test_targets_that_fit_no_layer_are_named(tmp_path, mini):
    with pytest.raises(SteersmanError, match=r"lora\.targets .*nowhere.* do not fit"):
        trained(settings(tmp_path, mini, **{"model.lora.targets": ["nowhere"]}))


def test_a_critic_has_adapters_of_its_own_and_the_actor_keeps_its_own(base):
    asked = recipe("ppo", merge(base, {"model.lora": {"r": 2}, "optimizer.lr": 0.02}))
    state = OnPolicy(
        asked, build_roles(asked, torch.device("cpu")), [Prompt([3 + i], "a", index=i) for i in range(8)],
        Batches(8, asked.rollout.prompts, 0, drop_last=True),
    )  # fmt: skip
    critic = state.roles.learner.critic
    free = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert any("lora_" in name for name in free)
    assert all("lora_" in name or "score" in name for name in free)
    before = {name: p.detach().clone() for name, p in critic.named_parameters()}
    state.iteration()
    state.iteration()
    moved = {name for name, p in critic.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= free
    assert any("lora_B" in name for name in moved)
    assert any("score" in name for name in moved)
