"""DeepSpeed's JSON and its modes in a recipe: what is taken, and what is refused by name before any rank starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from steersman import extras
from steersman.config.load import load_recipe
from steersman.distributed.deepspeed_file import read_deepspeed
from steersman.distributed.parallel import ParallelConfig
from steersman.types import SteersmanError
from steersman.verbs.generate import GenerateRecipe
from steersman.verbs.on_policy_recipes import RECIPES
from steersman.verbs.reward_model import RewardModelRecipe
from steersman.verbs.sft import SFTRecipe

CLIP = {"optimizer.max_grad_norm": 1.0}


def written(tmp_path: Path, settings: Any) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return path


def test_what_the_recipe_says_may_be_said_again_and_auto_asks_for_nothing(tmp_path):
    path = written(tmp_path, {
        "train_batch_size": "auto", "bf16": {"enabled": False}, "fp16": {"enabled": "auto"}, "optimizer": None,
        "gradient_clipping": 0.5, "communication_data_type": "fp32", "wall_clock_breakdown": False,
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000, "reduce_scatter": False,
                              "cpu_offload": False, "allgather_bucket_size": "auto"},
    })  # fmt: skip
    assert read_deepspeed(path, 2, {"optimizer.max_grad_norm": 0.5}) == {
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000, "reduce_scatter": False},
    }
    assert read_deepspeed(written(tmp_path, {}), 1, CLIP) == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": {"type": "Adam"}}, ["optimizer is said by optimizer"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["train_micro_batch_size_per_gpu", "run.micro_tokens"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping is 1.0", "optimizer.max_grad_norm is 0.5"]),
        ({"bf16": {"enabled": True}}, ["bf16", "model.dtype"]),
        ({"zero_optimization": {"stage": 3}}, ["stage is 3", "zero1"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["zero_optimization.offload_optimizer"]),
        ({"zero_optimization": {"overlap_comm": True}}, ["overlap_comm", "stages 2 and 3"]),
        ({"zero_optimization": 2}, ["zero_optimization is no mapping"]),
        ({"zero_optimisation": {}}, ["zero_optimisation is not for steersman"]),
        ([1], ["no mapping"]),
        ("{", ["can not be read"]),
        ("[" * 5000, ["can not be read"]),
    ],
)
def test_what_contradicts_the_recipe_is_refused_by_name(settings, words, tmp_path):
    with pytest.raises(ValueError, match=r"ds\.json") as caught:
        read_deepspeed(written(tmp_path, settings), 1, {"optimizer.max_grad_norm": 0.5})
    assert all(word in str(caught.value) for word in words), caught.value


ON_POLICY = {"reward": {"parts": {"score": {"builtin": "vader_sentiment"}}}}


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (SFTRecipe, {"parallel": {"mode": "zero3", "reshard": False}}, ["reshard goes with mode: fsdp"]),
        (RECIPES["trpo"], {**ON_POLICY, "parallel": {"mode": "zero3"}}, ["zero3", "TRPO"]),
        (
            RECIPES["ppo"],
            {**ON_POLICY, "parallel": {"mode": "zero3"}, "offload": True},
            ["offload moves whole models", "zero3"],
        ),
        (SFTRecipe, {"parallel": {"mode": "zero1", "offload": True}}, ["offload goes with mode: fsdp"]),
        (SFTRecipe, {"parallel": {"mode": "fsdp", "deepspeed": "x.json"}}, ["deepspeed goes with mode: zero1"]),
        (SFTRecipe, {"parallel": {"mode": "zero1", "deepspeed": "gone.json"}}, ["gone.json", "can not be read"]),
        (SFTRecipe, {"optimizer": {"kind": "adamw-8bit"}}, ["optimizer.kind adamw-8bit", "zero1"]),
        (SFTRecipe, {"model": {"path": "m", "dtype": "bfloat16"}}, ["model.dtype bfloat16", "float32"]),
        (SFTRecipe, {"model": {"path": "m", "quantise": "int8", "lora": {}}}, ["model.quantise int8"]),
        (RewardModelRecipe, {"train": {"heads": 3}}, ["train.heads", "ensembles"]),
        (RewardModelRecipe, {"stage": "gating"}, ["zero1", "stage gating", "fsdp or replicas"]),
        (
            RewardModelRecipe,
            {"stage": "gating", "parallel": {"mode": "zero2"}},
            ["zero2", "stage gating", "fsdp or replicas"],
        ),
        (RECIPES["trpo"], ON_POLICY, ["zero1", "TRPO"]),
        (
            RECIPES["ppo"],
            {**ON_POLICY, "share": "base", "model": {"path": "m", "lora": {}}},
            ["zero1", "share: base"],
        ),
        (GenerateRecipe, {}, ["zero1 serves sft", "fsdp or replicas"]),
    ],
)
def test_what_deepspeed_does_not_serve_is_refused(kind, changes, words, tmp_path):
    values = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}, "parallel": {"mode": "zero1"}, **changes}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(SteersmanError) as caught:
        load_recipe(kind, path, [])
    assert all(word in str(caught.value) for word in words), caught.value


def asked(verb: str, ds: Path, changes: dict[str, Any]) -> list[str]:
    """The keys of the optimizers of a recipe whose own clip is that of DeepSpeed's file."""
    values = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}, **ON_POLICY, "optimizer": {"max_grad_norm": 0.3},
              "parallel": {"mode": "zero2", "deepspeed": str(ds)}, **changes}  # fmt: skip
    path = ds.with_name("recipe.yaml")
    path.write_text(yaml.safe_dump(values))
    return list(load_recipe(RECIPES[verb], path, []).optimizers)


OWN = {"critic": {"optimizer": {"max_grad_norm": 0.3}}}
GROUPS = {"rollout": {"samples": 2}}


@pytest.mark.parametrize(
    ("verb", "changes", "keys"),
    [
        ("grpo", GROUPS, ["optimizer"]),
        ("ppo", OWN, ["optimizer", "critic.optimizer"]),
        ("ppo", {"critic": {"init": "shared"}}, ["optimizer"]),
    ],
)
def test_a_clip_may_stand_in_the_file_where_it_is_that_of_every_optimizer(verb, changes, keys, tmp_path):
    assert asked(verb, written(tmp_path, {"gradient_clipping": 0.3}), changes) == keys


@pytest.mark.parametrize("changes", [{}, {"critic": {"warmup": 1}}])
def test_a_critic_that_clips_in_another_way_is_named(changes, tmp_path):
    """That of a recipe without a section `critic`, too: it was found in the ranks, as a traceback."""
    words = r"gradient_clipping is 0\.3, and critic\.optimizer\.max_grad_norm is 1\.0; set critic"
    with pytest.raises(SteersmanError, match=words):
        asked("ppo", written(tmp_path, {"gradient_clipping": 0.3}), changes)


def test_each_stage_refuses_what_it_does_not_read(tmp_path):
    path = written(tmp_path, {"zero_optimization": {"stage": 3, "overlap_comm": True, "reduce_bucket_size": 9}})
    assert read_deepspeed(path, 3, CLIP)["zero_optimization"]["overlap_comm"]
    for stage, key in ((1, "overlap_comm"), (3, "round_robin_gradients"), (3, "allgather_bucket_size")):
        path = written(tmp_path, {"zero_optimization": {key: 1}})
        with pytest.raises(ValueError, match=rf"{key} goes with stages .*parallel.mode is zero{stage}"):
            read_deepspeed(path, stage, CLIP)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(SteersmanError, match=r"zero2 needs deepspeed.*steersman\[deepspeed\]"):
        ParallelConfig(mode="zero2").require_engine()
    ParallelConfig(mode="fsdp").require_engine()
