"""The loops on two ranks: the tables, numbers and weights of one process, to rounding; in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from letter_models import rows_of, save_mini
from ranks_kit import judge_on, launch
from safetensors.torch import load_file
from wheel_kit import loop_settings

from steersman.flywheel.best_of_n import BestOfNRecipe

TRAIN = {"batch_size": 4, "epochs": 1}
CASES: dict[str, dict[str, Any]] = {
    "best-of-n": {
        "train": TRAIN, "rounds": 2, "refresh": {"by": "words", "train": {"batch_size": 4, "keep": "last"}},
    },
    "online-dpo": {"train": TRAIN, "rounds": 2, "stop": {"judge": "words", "patience": 1}},
    "arena": {
        "sft": {"train": TRAIN}, "dpo": {"train": TRAIN},
        "ppo": {"reward_train": {"batch_size": 4, "keep": "last"}, "iterations": 1, "prompts": 2},
    },
}  # fmt: skip


def case(verb: str, folder: Path, model: Path, run: str, world: int, parallel: dict[str, Any]) -> dict[str, Any]:
    recipe = loop_settings(folder, model, f"{run}/{verb}", parallel=parallel, **{"rounds": 1, **CASES[verb]})
    recipe["model"]["dtype"] = "float64"
    recipe["run"]["devices"] = world
    if verb == "best-of-n":
        recipe["judge"] = {"reward": {"learned": {"model": str(judge_on(model, folder / "judge"))}}}
    if verb == "arena":
        recipe["opponents"] = {"other": str(save_mini(folder / "other", 1))}
    return {"verb": verb, "recipe": recipe}


def assert_alike(found: Any, wanted: Any, where: str) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key, value in wanted.items():
            if not key.startswith(("seconds", "time/", "throughput")):
                assert_alike(found[key], value, f"{where}: {key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for place, value in enumerate(wanted):
            assert_alike(found[place], value, f"{where}: {place}")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=2e-6, abs=1e-6), where  # grades are float32
    else:
        assert found == wanted, where


RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}), "replicas": (2, {}), "shards": (2, {"mode": "fsdp"}),
}  # fmt: skip


@pytest.mark.slow
def test_two_ranks_leave_what_one_process_leaves(tmp_path):
    model = save_mini(tmp_path / "model", 0)
    for run, (world, how) in RUNS.items():
        launch(tmp_path / f"{run}.json", [case(verb, tmp_path, model, run, world, how) for verb in CASES], world)
    for run, verb in ((run, verb) for run in ("replicas", "shards") for verb in CASES):
        alone, two = tmp_path / "alone" / verb, tmp_path / run / verb
        files = {str(p.relative_to(alone)) for p in alone.rglob("*") if p.suffix in (".jsonl", ".safetensors")}
        assert files == {str(p.relative_to(two)) for p in two.rglob("*") if p.suffix in (".jsonl", ".safetensors")}
        assert any(name.endswith("model.safetensors") for name in files)
        for name in files:
            if name.endswith(".jsonl"):
                assert_alike(rows_of(two / name), rows_of(alone / name), f"{run}/{verb}/{name}")
            else:
                for key, value in load_file(alone / name).items():
                    assert (load_file(two / name)[key] - value).abs().max() < 1e-6, f"{run}/{verb}/{name}: {key}"
        assert json.loads((two / "summary.json").read_text())["finished"]
    assert (tmp_path / "replicas/best-of-n/round-01/refresh/train/model/model.safetensors").exists()


@pytest.mark.parametrize("launched", [False, True])
def test_sampling_by_other_processes_is_refused_by_name(launched, tmp_path, monkeypatch):
    settings = loop_settings(tmp_path, tmp_path / "model", "run")
    settings["rollout"]["engine"] = "process"
    if launched:
        monkeypatch.setenv("WORLD_SIZE", "2")
    else:
        settings["run"]["devices"] = 2
    with pytest.raises(ValueError, match="other processes"):
        BestOfNRecipe.model_validate(settings)
