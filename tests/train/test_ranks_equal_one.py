"""N ranks learn what one process learns: weights in float64 to 1e-9 after several updates, for every verb.

Every rank also compares its weights with rank 0's, bit for bit, whenever a checkpoint is saved.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_kit import evaluation
from letter_models import rows_of, write_jsonl
from ranks_kit import judge_on, launch, trained_weights
from train_kit import merge, prompts_file, save_tiny, settings, weights

pytestmark = pytest.mark.slow
ON_POLICY = ("ppo", "trpo", "nlpo", "a2c", "reinforce", "rloo", "remax", "grpo", "dapo", "gspo", "ppo-kl")
OFFLINE = ("sft", "reward", "dpo", "kto", "bco")
MIXTURE = {
    "model_type": "mixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "initializer_range": 0.5,
    "experts_implementation": "eager",  # which takes float64
}  # fmt: skip
EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo-shared-critic": ("ppo", {"critic.init": "shared"}),
    "ppo-reward-model": ("ppo", {"reward.parts": {"judge": {"model": "its folder"}}}),
    "ppo-lora": ("ppo", {"model.lora": {"r": 2}, "optimizer.lr": 0.02}),
    "ppo-two-epochs": ("ppo", {"algorithm.epochs": 2, "algorithm.minibatches": 2, "algorithm.stop_kl": 0.05}),
    "grpo-micro": ("grpo", {"run.micro_tokens": 16}),
    "grpo-process": ("grpo", {"rollout.engine": "process", "rollout.timeout": 200}),
    "grpo-ahead": ("grpo", {"rollout.engine": "process", "rollout.timeout": 200, "rollout.ahead": 1}),
    "dapo-ahead": ("dapo", {"rollout.engine": "process", "rollout.timeout": 200, "rollout.ahead": 2}),
    "grpo-curriculum": ("grpo", {"curriculum": {"right_from": 0.25}, "iterations": 4}),
    "a2po-several": ("a2po", {"algorithm.value_samples": 3, "algorithm.minibatches": 2, "algorithm.beta": 0.1}),
    "rloo-stop": ("rloo", {"stop": {"judge": "score"}, "iterations": 12, "optimizer.lr": 0.03, "run.eval_every": 1}),
    "dapo-masks": (
        "dapo",
        {
            "algorithm.top_entropy": 0.4,
            "algorithm.off_policy_threshold": 1e-4,
            "algorithm.minibatches": 2,
            "algorithm.epochs": 2,
        },
    ),
    "grpo-checkpointing": ("grpo", {"model.gradient_checkpointing": True}),
    "dpo-tdpo": ("dpo", {"loss.name": "tdpo2"}),
    "dpo-moving": ("dpo", {"moving_reference": {"decay": 0.3, "every": 2}, "run.micro_tokens": 40}),
    "dpo-bema": ("dpo", {"moving_reference": {"kind": "bema", "every": 2, "after": 1}, "loss.name": "aot"}),
    "dpo-bema-lora": ("dpo", {"moving_reference": {"kind": "bema", "every": 2}, "model.lora": {"r": 2}}),
    "kto-moving": ("kto", {"moving_reference": {"decay": 0, "every": 2}}),
    "dpo-tpo": ("dpo", {"loss.name": "simpo", "loss.gold_nll": 0.5, "run.micro_tokens": 40}),
    "dpo-aot": ("dpo", {"loss.name": "aot_unpaired", "loss.also": {"aot": 1.0}, "run.micro_tokens": 40}),
    "sft-cache": ("sft", {"data.cache": "its folder"}),
    "reward-cache": ("reward", {"data.cache": "its folder", "run.micro_tokens": 40}),
    "sft-packed": ("sft", {"train.pack": 48}),
    "sft-routers": (  # each row is a micro-batch, of which the routers' loss is
        "sft",
        {
            "model.scratch": MIXTURE,
            "train.router_loss": 0.5,
            "run.micro_tokens": 1,
            "model.gradient_checkpointing": True,
        },
    ),
    "reward-lora": ("reward", {"model.lora": {"r": 2}}),
    "ppo-t5": ("ppo", {"model.path": "t5"}),
    "grpo-bart": ("grpo", {"model.path": "bart"}),
    "dpo-t5": ("dpo", {"model.path": "t5"}),
    "gspo-segments": (  # each turn is one; most episodes are in several micro-batches, some on both ranks
        "gspo",
        {
            "model.path": "bart",
            "environment": {"max_turns": 3},
            "reward.parts": {"play": {"environment": "turn"}},
            "run.micro_tokens": 24,
            "algorithm.minibatches": 2,
            "algorithm.epochs": 2,
            "algorithm.clip_low": 0.2,
            "algorithm.clip_high": 0.2,
            "algorithm.beta": 0.1,
            "algorithm.kl_in": "loss",
            "algorithm.kl_estimator": "k1_to_go",
            "rollout.max_new_tokens": 4,
            "rollout.held_out": 0,
        },
    ),
    "ppo-judge": ("ppo", {"reward.parts": {"judge": {"function": "steersman.judge.reward:grade"}}}),
    "sft-adafactor": ("sft", {"optimizer.kind": "adafactor"}),
    "sft-muon": ("sft", {"optimizer.kind": "muon"}),
    "dpo-evaluated": ("dpo", {"evaluation": {}}),
}
ECHO = """
class Echo:
    def begin(self, row):
        return None

    def step(self, text):
        return "go on,", text.count("a") / 4, False
"""
CLOSE = {"ppo-reward-model": 1e-6, "ppo-judge": 1e-6, "ppo-t5": 1e-6}
"""What is not held to 1e-9: a reward model scores in float32, and rows stand in other batches; where T5's gradients
are near zero, AdamW makes rounding as large as the rest."""
NOT_IN_PIECES = {"trpo", "dapo-ahead", "sft-adafactor", "sft-muon"}
LIKE_OTHERS = {
    *("a2c", "nlpo", "reinforce", "rloo", "remax", "dapo", "gspo", "ppo-kl", "kto", "bco", "ppo-two-epochs"),
    *("ppo-judge", "grpo-ahead", "grpo-curriculum", "gspo-segments", "a2po-several", "dapo-masks"),
    *("sft-cache", "reward-cache", "dpo-tpo", "dpo-aot", "dpo-bema", "kto-moving"),
}
"""Their losses, rows and prompts do not touch how weights lie: they run on replicas; in pieces, others stand for
them."""
NAMES = [*ON_POLICY, *OFFLINE, *EXTRA]
ANSWERS = ["generate", "evaluate"]
"""Verbs that train nothing: their files are compared."""


def offline_rows(verb: str) -> list[dict[str, Any]]:
    words = ["yes it is.", "no", "a cat, a dog, and two", "ok", "look there", "e", "so she said", "hm", "what?"]
    rows: list[dict[str, Any]] = [
        {"prompt": "ask" + "?" * (i % 4) + "abcdef"[i % 6], "completion": words[i % 9]} for i in range(22)
    ]
    if verb in ("dpo", "reward"):
        return [{"prompt": r["prompt"], "chosen": r["completion"] + " a", "rejected": words[i % 5],
                 "gold": r["completion"] + " it is"} for i, r in enumerate(rows)]  # fmt: skip
    return [{**row, "label": i % 3 != 0} for i, row in enumerate(rows)] if verb in ("kto", "bco") else rows


def recipe_of(name: str, folder: Path, model: Path, run: str, world: int, parallel: dict[str, Any]) -> dict[str, Any]:
    verb, extra = EXTRA.get(name, (name, {}))
    if verb in ANSWERS:
        return {"verb": verb, "recipe": answers(verb, folder, model, run, world, parallel)}
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
    if "environment" in extra:
        (folder / "echo.py").write_text(ECHO)
        extra = extra | {"environment": {"path": f"{folder / 'echo.py'}:Echo", **extra["environment"]}}
    elif "reward.parts" in extra:
        judge = {"model": str(judge_on(model, folder / "judge"))}
        asked = extra["reward.parts"]["judge"]
        if "function" in asked:  # the same model behind a judge, which rank 0 asks
            judge = asked | {"args": {"judge": {"reward": {"score": judge}}}}
        extra = {"reward.parts": {"judge": judge}}
    if "data.cache" in extra:
        extra = extra | {"data.cache": str(folder / "cache")}
    if "evaluation" in extra:
        extra = {"evaluation": evaluation(folder)}
    if "model.path" in extra:
        extra = extra | {"model.path": str(pair_on(folder, extra["model.path"]))}
    return {"verb": verb, "recipe": merge(merge(base, own), extra)}


def answers(verb: str, folder: Path, model: Path, run: str, world: int, parallel: dict[str, Any]) -> dict[str, Any]:
    asked = {
        "model": {"path": str(model), "dtype": "float64"},
        "data": {"path": str(prompts_file(folder))},
        "rollout": {"samples": 2, "max_new_tokens": 8},
        "out": str(folder / run / f"{verb}.jsonl"),
        "run": {"threads": 1, "devices": world},
        "parallel": parallel,
    }
    if verb == "generate":
        return asked
    return {"generate": asked, "metrics": {"distinct": {}, "length": {}}, "out": str(folder / run / "table.json")}


def pair_on(folder: Path, family: str) -> Path:
    """A tiny encoder-decoder, saved once."""
    return folder / family if (folder / family).exists() else save_tiny(folder / family, family)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def launched(folder: Path, model: Path, run: str, world: int, names: list[str], parallel: dict[str, Any]) -> Path:
    (folder / run).mkdir()
    names = [*names, *ANSWERS]
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
    names = [name for name in NAMES if name not in NOT_IN_PIECES | LIKE_OTHERS]
    return launched(folder, model, "sharded", 2, names, {"mode": "fsdp"})


FOUR = ["ppo", "grpo", "dpo", "sft"]


@pytest.fixture(scope="module")
def four(folder, model) -> Path:
    return launched(folder, model, "four", 4, FOUR, {"mode": "fsdp", "replicas": 2})


@pytest.mark.parametrize("run", ["replicas", "sharded", "four"])
def test_ranks_answer_and_measure_as_one_process_does(run, alone, request):
    there = request.getfixturevalue(run)
    for name in ("generate.jsonl", "evaluate.jsonl"):
        assert len(rows_of(alone / name)) == 24
        assert (there / name).read_bytes() == (alone / name).read_bytes()
    found, wanted = (json.loads((folder / "table.json").read_text()) for folder in (there, alone))
    assert found["metrics"] == wanted["metrics"]


@pytest.mark.parametrize("run", ["replicas", "sharded"])
def test_ranks_evaluate_as_one_process_does(run, alone, request):
    rows = [rows_of(folder / "dpo-evaluated/metrics.jsonl") for folder in (request.getfixturevalue(run), alone)]
    found, wanted = ([{k: v for k, v in row.items() if "evaluation/" in k} for row in some] for some in rows)
    assert sum(map(bool, wanted)) > 2
    assert found == [pytest.approx(row, rel=1e-9) for row in wanted]


def assert_same(got: Path, wanted: Path, name: str) -> None:
    found, expected = trained_weights(got / name), trained_weights(wanted / name)
    assert found.keys() == expected.keys()
    assert len(expected) > 2
    for key, value in expected.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(
            found[key], value, rtol=0, atol=CLOSE.get(name, 1e-9), msg=lambda text, key=key: f"{key}: {text}"
        )


def test_training_moves_the_weights(alone, model):
    start, end = trained_weights(alone / "grpo"), trained_weights(alone / "ppo")
    assert any(not torch.equal(start[key], end[key]) for key in start)


@pytest.mark.parametrize("run", ["replicas", "sharded"])
def test_ranks_end_early_where_one_process_does_and_save_its_best_weights(run, alone, request):
    found, wanted = (request.getfixturevalue(name) / "rloo-stop" for name in (run, "alone"))
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (found, wanted)]
    assert summaries[0]["steps"] == summaries[1]["steps"] < 12
    for key, value in weights(wanted / "model").items():
        torch.testing.assert_close(weights(found / "model")[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_two_replicas_learn_what_one_process_learns(name, alone, replicas):
    assert_same(replicas, alone, name)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_IN_PIECES | LIKE_OTHERS])
def test_two_ranks_with_weights_in_pieces_learn_what_one_process_learns(name, alone, sharded):
    assert_same(sharded, alone, name)


@pytest.mark.parametrize("name", FOUR)
def test_two_copies_over_two_ranks_each_learn_what_one_process_learns(name, alone, four):
    assert_same(four, alone, name)
