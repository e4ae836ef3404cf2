"""Distillation on two ranks: the student of one process, to rounding; in float64, one launch for each layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks_kit import launch, trained_weights
from train_kit import merge, rewards_file

from steersman.distill.recipe import DistillRecipe

CASES: dict[str, dict[str, Any]] = {
    "own answers": {},
    "given answers": {"train.on_policy": 0, "loss.name": "forward_kl", "loss.nll": 0.2, "data.held_out": 2},
    "minillm, LoRA": {"loss.name": "minillm", "model.lora": {"r": 2}, "run.micro_tokens": 24},
    "its own average": {
        "teacher": {"path": "ema", "decay": 0.8, "prompt": "{hint} {prompt}"},
        "loss.skip_first": 1,
        "train.epochs": 4,
    },
    "its own average, LoRA": {
        "teacher": {"path": "ema", "decay": 0.8, "prompt": "{hint} {prompt}"},
        "model.lora": {"r": 2},
        "train.epochs": 4,
    },
    "what another answer achieved": {
        "teacher": {
            "path": "ema",
            "decay": 0.8,
            "prompt": "{solution} {prompt}",
            "feedback": {"success": 0.25, "solution": "so {answer}"},
        },
        "loss": {"name": "jsd", "top_k": 6, "average": "sequence", "reward_weight": 0.0},
    },
    "itself with a hint": {"teacher": {"path": "start", "prompt": "{hint} {prompt}"}, "loss.name": "jsd"},
}


def case(settings: dict[str, Any], name: str, folder: Path, world: int, parallel: dict[str, Any]) -> dict[str, Any]:
    own = {
        "model.dtype": "float64", "run.dir": str(folder / name.replace(" ", "-")), "run.devices": world,
        "train.epochs": 2, "rollout.held_out": 3, "run.eval_every": 2, "run.save_every": 9, "parallel": parallel,
    }  # fmt: skip
    reward = {"reward": {"parts": {"a": {"function": f"{rewards_file(folder.parent)}:count_a"}}}}
    more = reward | {"rollout.samples": 3} if name in ("minillm, LoRA", "what another answer achieved") else {}
    return {"verb": "distill", "recipe": merge(settings, own | more | CASES[name])}


RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}), "replicas": (2, {}), "shards": (2, {"mode": "fsdp"}),
}  # fmt: skip


@pytest.mark.slow
def test_two_ranks_teach_what_one_process_teaches(settings, tmp_path):
    for run, (world, how) in RUNS.items():
        (tmp_path / run).mkdir()
        launch(tmp_path / f"{run}.json", [case(settings, name, tmp_path / run, world, how) for name in CASES], world)
    for run, name in ((run, name) for run in ("replicas", "shards") for name in CASES):
        wanted, found = (trained_weights(tmp_path / folder / name.replace(" ", "-")) for folder in ("alone", run))
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            gap = float((found[key] - value).abs().max())
            assert gap < 1e-9, f"{run}, {name}: {key} differs by {gap:g}"


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"run.devices": 2, "rollout.engine": "process"}, "other processes"),
        (
            {"run.devices": 2, "parallel.mode": "fsdp", "teacher.path": "live", "teacher.prompt": "{prompt} (go on)"},
            "live teacher",
        ),
    ],
)
def test_what_ranks_can_not_do_is_refused_by_name(settings, extra, said):
    with pytest.raises(ValueError, match=said):
        DistillRecipe.model_validate(merge(settings, extra))


def test_it_is_refused_where_a_launcher_started_the_ranks(settings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="other processes"):
        DistillRecipe.model_validate(merge(settings, {"rollout.engine": "process"}))
