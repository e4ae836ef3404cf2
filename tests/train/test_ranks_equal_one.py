"""N ranks learn what one process learns: weights in float64 to 1e-9 after several updates, for every verb.

Every rank also compares its weights with rank 0's, bit for bit, whenever a checkpoint is saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from letter_models import write_jsonl
from ranks_kit import launch
from train_kit import merge, save_tiny, settings

pytestmark = pytest.mark.slow
ON_POLICY = ("ppo", "trpo", "nlpo", "a2c", "reinforce", "rloo", "remax", "grpo", "dapo", "gspo", "ppo-kl")
OFFLINE = ("sft", "reward", "dpo", "kto", "bco")
EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo-shared-critic": ("ppo", {"critic.init": "shared"}),
    "ppo-lora": ("ppo", {"model.lora": {"r": 2}, "optimizer.lr": 0.02}),
    "ppo-two-epochs": ("ppo", {"algorithm.epochs": 2, "algorithm.minibatches": 2, "algorithm.stop_kl": 0.05}),
    "grpo-micro": ("grpo", {"run.micro_tokens": 16}),
    "grpo-process": ("grpo", {"rollout.engine": "process", "rollout.timeout": 200}),
    "grpo-checkpointing": ("grpo", {"model.gradient_checkpointing": True}),
    "dpo-tdpo": ("dpo", {"loss.name": "tdpo2"}),
    "sft-packed": ("sft", {"train.pack": 48}),
    "reward-lora": ("reward", {"model.lora": {"r": 2}}),
}
REPLICAS_ONLY = {"trpo", "nlpo", "ppo-shared-critic", "grpo-process"}
NAMES = [*ON_POLICY, *OFFLINE, *EXTRA]


def offline_rows(verb: str) -> list[dict[str, Any]]:
    words = ["yes it is.", "no", "a cat, a dog, and two", "ok", "look there", "e", "so she said", "hm", "what?"]
    rows: list[dict[str, Any]] = [
        {"prompt": "ask" + "?" * (i % 4) + "abcdef"[i % 6], "completion": words[i % 9]} for i in range(22)
    ]
    if verb in ("dpo", "reward"):
        return [{"prompt": r["prompt"], "chosen": r["completion"] + " a", "rejected": words[i % 5]}
                for i, r in enumerate(rows)]  # fmt: skip
    return [{**row, "label": i % 3 != 0} for i, row in enumerate(rows)] if verb in ("kto", "bco") else rows


def recipe_of(name: str, folder: Path, model: Path, run: str, world: int, parallel: dict[str, Any]) -> dict[str, Any]:
    verb, extra = EXTRA.get(name, (name, {}))
    if verb in OFFLINE:
        data = write_jsonl(folder / f"{verb}.jsonl", offline_rows(verb))
        base: dict[str, Any] = {
            "model": {"path": str(model)},
            "data": {"path": str(data), "held_out": 4},
            "train": {"batch_size": 5, "epochs": 1.4},
            "optimizer": {"lr": 3e-3, "schedule": "linear", "warmup": 2},
            "run": {},
        }
    else:
        base = settings(folder, model)
    own = {
        "model.dtype": "float64",
        "run": {"dir": str(folder / run / name), "threads": 1, "eval_every": 2, "save_every": 9, "devices": world},
        "parallel": parallel,
    }
    return {"verb": verb, "recipe": merge(merge(base, own), extra)}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every trained tensor of the newest checkpoint, optimisers left out."""
    newest = max((folder / "checkpoints").glob("step-*"))
    state = torch.load(newest / "state.pt", weights_only=True)["state"]
    roles = state.get("roles", {"model": state.get("model")})
    return {f"{role}.{name}": x for role in ("model", "policy", "critic") for name, x in roles.get(role, {}).items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def launched(folder: Path, model: Path, run: str, world: int, names: list[str], parallel: dict[str, Any]) -> Path:
    (folder / run).mkdir()
    cases = [recipe_of(name, folder, model, run, world, parallel) for name in names]
    launch(folder / f"{run}.json", cases, world)
    return folder / run


@pytest.fixture(scope="module")
def alone(folder, model) -> Path:
    return launched(folder, model, "alone", 1, NAMES, {})


@pytest.fixture(scope="module")
def replicas(folder, model) -> Path:
    return launched(folder, model, "replicas", 2, NAMES, {})


@pytest.fixture(scope="module")
def sharded(folder, model) -> Path:
    names = [name for name in NAMES if name not in REPLICAS_ONLY]
    return launched(folder, model, "sharded", 2, names, {"mode": "fsdp"})


FOUR = ["ppo", "grpo", "dpo", "sft"]


@pytest.fixture(scope="module")
def four(folder, model) -> Path:
    return launched(folder, model, "four", 4, FOUR, {"mode": "fsdp", "replicas": 2})


def assert_same(got: Path, wanted: Path, name: str) -> None:
    found, expected = weights_of(got / name), weights_of(wanted / name)
    assert found.keys() == expected.keys()
    assert len(expected) > 2
    for key, value in expected.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


def test_training_moves_the_weights(alone, model):
    start, end = weights_of(alone / "grpo"), weights_of(alone / "ppo")
    assert any(not torch.equal(start[key], end[key]) for key in start)


@pytest.mark.parametrize("name", NAMES)
def test_two_replicas_learn_what_one_process_learns(name, alone, replicas):
    assert_same(replicas, alone, name)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REPLICAS_ONLY])
def test_two_ranks_with_weights_in_pieces_learn_what_one_process_learns(name, alone, sharded):
    assert_same(sharded, alone, name)


@pytest.mark.parametrize("name", FOUR)
def test_two_copies_over_two_ranks_each_learn_what_one_process_learns(name, alone, four):
    assert_same(four, alone, name)
