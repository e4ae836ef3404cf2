"""Two ranks under DeepSpeed's ZeRO learn what one process learns, in float32, as DeepSpeed updates nothing else.

AdamW divides by the root of a mean square, so where a gradient is near zero rounding decides the step; the recipes
here have an epsilon above that. Run it with an environment that has DeepSpeed beside steersman's packages:

    DS_BUILD_OPS=0 pip install --no-deps deepspeed==0.19.8 einops hjson msgpack ninja py-cpuinfo
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from letter_models import rows_of, write_jsonl
from ranks_kit import launch, trained_weights
from safetensors.torch import load_file
from test_ranks_equal_one import offline_rows, pair_on
from test_ranks_faults import begin, children, gone, wait_for_steps
from train_kit import merge, save_tiny, settings

from steersman.extras import installed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not installed("deepspeed"), reason="needs DeepSpeed"),
]
CLOSE = 1e-6
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "sft-micro": ("sft", {"run.micro_tokens": 24, "model.gradient_checkpointing": True}),
    "reward": ("reward", {}),
    "dpo": ("dpo", {}),
    "dpo-lora": ("dpo", {"model.lora": {"r": 2}, "optimizer.weight_decay": 0.0}),
    "kto": ("kto", {}),
    "ppo": ("ppo", {"algorithm.epochs": 2, "algorithm.minibatches": 2, "algorithm.stop_kl": 0.02}),
    "ppo-shared-critic": ("ppo", {"critic.init": "shared"}),
    "ppo-t5": ("ppo", {"model.path": "t5"}),  # whose first layer makes what all layers read
    "grpo": ("grpo", {"run.micro_tokens": 16}),
    "grpo-process": ("grpo", {"rollout.engine": "process", "rollout.ahead": 1}),
}
SMALL = {
    "train_batch_size": "auto",
    "gradient_clipping": 0.3,
    "zero_optimization": {"stage": "auto", "reduce_bucket_size": 700, "allgather_bucket_size": 900},
}
"""A file of DeepSpeed's whose buckets are filled several times by a tiny model."""


def case(folder: Path, model: Path, run: str, name: str, layout: str, **extra: Any) -> dict[str, Any]:
    verb, own = CASES[name]
    if "model.path" in own:
        own = {"model.path": str(pair_on(folder, own["model.path"]))}
    if verb in ("ppo", "grpo"):
        base = settings(folder, model)
        if verb == "ppo" and "critic.init" not in own:
            base["critic"] = {"optimizer": {"eps": 1e-3, "max_grad_norm": 0.3}}
    else:
        base = {
            "model": {"path": str(model)},
            "data": {"path": str(write_jsonl(folder / f"{verb}.jsonl", offline_rows(verb))), "held_out": 4},
            "train": {"batch_size": 5, "epochs": 9, "max_steps": 6},
            "run": {},
        }
    file = folder / f"deepspeed-{layout}.json"
    buckets = {"stage": "auto", "reduce_bucket_size": 700}
    file.write_text(json.dumps(SMALL | ({"zero_optimization": buckets} if layout == "zero3" else {})))
    base["model"] |= {"dtype": "float32"}
    base["optimizer"] = {"lr": 3e-3, "eps": 1e-3, "max_grad_norm": 0.3, "weight_decay": 0.1}
    own_file = {} if layout == "fsdp" else {"deepspeed": str(file)}
    many = {"parallel": {"mode": layout, "timeout": 60} | own_file} if layout != "alone" else {}
    base["run"] = {"dir": str(folder / run / name), "threads": 1, "eval_every": 2, "save_every": 2,
                   "devices": 2 if many else 1}  # fmt: skip
    return {"verb": verb, "recipe": merge(merge(base | many, own), extra)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def model(folder) -> Path:
    return save_tiny(folder / "model")


@pytest.fixture(scope="module")
def alone(folder, model) -> Path:
    cases = [case(folder, model, "alone", name, "alone") for name in CASES]
    cases += [case(folder, model, "first", name, "alone", **{"train.max_steps": 4}) for name in ("dpo", "kto")]
    launch(folder / "alone.json", cases, 1)
    return folder / "alone"


@pytest.fixture(scope="module")
def zero1(folder, model, alone) -> Path:
    cases = [case(folder, model, "zero1", name, "zero1") for name in CASES]
    cases.append(case(folder, model, "first", "sft", "zero1", **{"train.max_steps": 4}))
    launch(folder / "zero1.json", cases, 2)
    return folder / "zero1"


@pytest.fixture(scope="module")
def zero2(folder, model, alone) -> Path:
    cases = [case(folder, model, "zero2", name, "zero2") for name in CASES]
    cases.append(case(folder, model, "first", "dpo", "zero2") | {"resume": True})  # what one process began
    launch(folder / "zero2.json", cases, 2)
    return folder / "zero2"


@pytest.fixture(scope="module")
def zero3(folder, model, alone) -> Path:
    begun = case(folder, model, "first", "sft-micro", "fsdp", **{"train.max_steps": 4})
    launch(folder / "fsdp.json", [begun], 2)
    cases = [case(folder, model, "zero3", name, "zero3") for name in CASES]
    cases.append(case(folder, model, "first", "reward", "zero3", **{"train.max_steps": 4}))
    cases += [case(folder, model, "first", name, "zero3") | {"resume": True} for name in ("kto", "sft-micro")]
    launch(folder / "zero3.json", cases, 2)
    return folder / "zero3"


def assert_same(got: Path, wanted: Path) -> None:
    found, expected = trained_weights(got), trained_weights(wanted)
    assert found.keys() == expected.keys()
    assert len(expected) > 2
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=CLOSE, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_two_ranks_learn_what_one_process_learns(name, stage, alone, request):
    assert_same(request.getfixturevalue(stage) / name, alone / name)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_they_clip_by_the_same_norms(name, stage, alone, request):
    found, wanted = (rows_of(run / name / "metrics.jsonl") for run in (request.getfixturevalue(stage), alone))
    norms = [(key, x) for row in wanted for key, x in row.items() if key.startswith("grad_norm")]
    assert norms
    assert name == "dpo-lora" or any(x > 0.3 for _, x in norms)  # some are clipped
    got = [x for row in found for key, x in row.items() if key.startswith("grad_norm")]
    assert got == pytest.approx([x for _, x in norms], rel=1e-4)


def test_what_zero_began_one_process_finishes(zero1, zero3, folder, model, alone):
    names = ("sft", "reward")  # under ZeRO 1, and 3
    launch(folder / "on.json", [case(folder, model, "first", name, "alone") | {"resume": True} for name in names], 1)
    for name in names:
        assert_same(folder / "first" / name, alone / name)


def test_what_one_process_began_zero_finishes(zero2, folder, alone):
    assert_same(folder / "first" / "dpo", alone / "dpo")


@pytest.mark.parametrize("name", ["kto", "sft-micro"])  # begun by one process, and under fsdp
def test_what_others_began_zero_3_finishes(name, zero3, folder, alone):
    assert_same(folder / "first" / name, alone / name)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_the_saved_model_is_whole(stage, request):
    from transformers import AutoModelForCausalLM

    run = request.getfixturevalue(stage) / "sft"
    saved = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    trained = trained_weights(run)
    for name, value in saved.items():
        assert torch.equal(value, trained.get(f"model.model.{name}", value)), name
    assert any(f"model.model.{name}" in trained for name in saved)


def test_adapters_are_added_into_whole_weights(zero3, alone):
    found, wanted = (load_file(run / "dpo-lora" / "model" / "model.safetensors") for run in (zero3, alone))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=CLOSE)


def test_a_rank_holds_its_pieces_and_the_layer_that_runs(model, tmp_path):
    file, ways = tmp_path / "cases.json", [(False, False), (True, False), (True, True)]
    cases = [{"model": str(model), "checkpointing": again, "lora": lora} for again, lora in ways]
    launch(file, cases, 2, worker=Path(__file__).with_name("zero_worker.py"))
    for told in json.loads(Path(f"{file}.0").read_text()) + json.loads(Path(f"{file}.1").read_text()):
        assert told["whole"] == told["numbers"] == told["sampling"] == told["still"]
        assert told["held"] == told["after"] == told["again"] == 0
        assert told["numbers"] <= 2 * told["pieces"] <= told["numbers"] + told["most"]  # padded by less than 2 each
        assert told["gap"] < 1e-6
        assert told["forward"] == [[0, [0]], [1, [1]]]
        assert told["between"] == []
        assert told["backward"] == [[1, [1]], [0, [0]]]
        assert told["one"] == [True, 0]
        assert told["linear"]  # DeepSpeed's own is not put into torch


def test_a_rank_that_hangs_is_named_within_the_time_limit(tmp_path, model):
    base = settings(tmp_path, model)
    own = {"model.dtype": "float32", "run.devices": 2, "iterations": 4000}
    asked = merge(base, own | {"parallel.mode": "zero3", "parallel.timeout": 20})
    process = begin(tmp_path, asked, forks=False)  # the threads of a fork outlive it
    wait_for_steps(Path(base["run"]["dir"]), 2, process)
    ranks = children(process.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    try:
        _, error = process.communicate(timeout=200)  # not torch's half hour
        assert process.returncode == 2
        assert "rank 1 was last in call" in error, error
        assert gone(ranks)
    finally:
        for one in (process.pid, *ranks):
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
