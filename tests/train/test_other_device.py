"""Every verb on a device that is not the CPU (`pretend_device.py`): it runs, learns what the CPU learns, and seldom
makes the host wait.

One process runs all cases on the device, one on the CPU. On the device a tensor of the CPU among others, a generator
of the CPU or an index left behind is an error, as on CUDA.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pretend_device
import pytest
import torch
from letter_models import WORDS, save_mini, write_jsonl
from ranks_kit import launch, trained_weights
from test_ranks_equal_one import EXTRA, ON_POLICY, recipe_of
from train_kit import merge, prompts_file, rewards_file, save_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not pretend_device.available(), reason="needs Linux and a C++ compiler"),
]
WORKER = Path(__file__).with_name("pretend_worker.py")
ALSO: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo-nucleus": ("grpo", {"rollout.top_p": 0.8, "rollout.min_new_tokens": 2}),
    "grpo-recomputed": ("grpo", {"rollout.recompute_logp": True}),
    "sft-kahan": ("sft", {"model.dtype": "bfloat16", "optimizer.rounding": "kahan"}),
    "sft-stochastic": ("sft", {"model.dtype": "bfloat16", "optimizer.rounding": "stochastic"}),
    "dpo-offload-activations": ("dpo", {"model.gradient_checkpointing": True, "model.offload_activations": True}),
    "dpo-share": ("dpo", {"loss.name": "wpo", "loss.nll": 0.2}),
}
NOT_HERE = {"grpo-process", "grpo-ahead", "dapo-ahead", "sft-cache", "reward-cache", "grpo-curriculum", "rloo-stop"}
"""Another process would have to be given the device too, or what they add is the host's work alone."""
UNTIED = {"ppo-t5", "grpo-bart", "dpo-t5", "gspo-segments"}
"""Moving a module to a device of this kind gives every name of a tied weight a tensor of its own."""
TRAINED = [
    name
    for name in (*ON_POLICY, "sft", "reward", "dpo", "kto", "bco", *EXTRA, *ALSO)
    if name not in NOT_HERE
]  # fmt: skip
LOOPS = ["best-of-n", "online-dpo", "arena"]
OTHERS = ["distill", "distill-micro", "grpo-pair", "generate", "control", *LOOPS]
ROUNDED = {"ppo-reward-model": 1e-5, "sft-kahan": 0.05, "sft-stochastic": 0.05, "sft-muon": 1e-3}
"""What is not held to 1e-9: a reward model scores in float32, and the rest computes in bfloat16."""
MODEL = ("model/reader.py", "states")
"""Once in each run of a trunk: transformers asks whether positions stand for packed sequences."""
STEP = {
    ("update/optimizer.py", "not_finite"): 1,
    ("update/engines.py", "step"): 1,
    ("train/tally.py", "numbers"): 1,
}


def trained_case(name: str, folder: Path, model: Path, device: str) -> dict[str, Any]:
    EXTRA.update(ALSO)
    case = recipe_of(name, folder, model, device, 1, {})
    case["recipe"]["model"]["dtype"] = EXTRA.get(name, ("", {}))[1].get("model.dtype", "float64")
    del case["recipe"]["run"]["devices"]
    return merge(case, {"recipe.run.device": device, "name": name})


def other_case(name: str, folder: Path, model: Path, device: str) -> dict[str, Any]:
    run = {"dir": str(folder / device / name), "threads": 1, "device": device}
    rows = [{"prompt": w, "completion": f"{w[-1]} is {i}a"} for i, w in enumerate(WORDS)]
    rollout = {"prompts": 4, "samples": 2, "max_new_tokens": 6, "held_out": 3}
    score = f"{rewards_file(folder)}:count_a"
    base: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float64"}, "data": {"path": str(prompts_file(folder))}, "run": run,
        "rollout": rollout,
    }  # fmt: skip
    if name == "generate":
        base |= {"out": str(folder / device / "said.jsonl"), "run": {"threads": 1, "device": device}}
        base["rollout"] = {"max_new_tokens": 6, "samples": 2}
    elif name.startswith("distill"):
        base |= {"teacher": {"path": str(folder / "teacher")}, "train": {"batch_size": 4, "epochs": 1}}
        base |= {"data": {"path": str(write_jsonl(folder / "rows.jsonl", rows))}}
        base["rollout"] = {"max_new_tokens": 6, "held_out": 3}
        if name == "distill-micro":
            base["run"] = {**run, "micro_tokens": 24}
        return {"name": name, "verb": "distill", "recipe": base}
    elif name == "grpo-pair":
        base |= {"reward": {"parts": {"a": {"function": score}}}, "iterations": 2}
        base["model"] = {"path": str(folder / "pair"), "dtype": "float64"}
        return {"name": name, "verb": "grpo", "recipe": base}
    elif name == "control":
        base = {"env": "CartPole-v1", "algorithm": "ppo", "iterations": 2, "run": run}
    else:
        base |= {"judge": {"reward": {"a": {"function": score}}}, "unfinished": "keep", "rounds": 1}
        train = {"batch_size": 4, "epochs": 1}
        if name == "arena":
            base |= {
                "opponents": {"other": str(folder / "teacher")},
                "sft": {"train": train},
                "dpo": {"train": train},
            }
            base |= {"ppo": {"reward_train": {"batch_size": 4, "keep": "last"}, "iterations": 1, "prompts": 2}}
        else:
            base["train"] = train
    return {"name": name, "verb": name, "recipe": base}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    model = save_mini(folder / "model")
    save_mini(folder / "teacher", 1)
    save_tiny(folder / "pair", "t5")
    for device in ("cpu", "pretend"):
        (folder / device).mkdir()
        cases = [trained_case(name, folder, model, device) for name in TRAINED]
        cases += [other_case(name, folder, model, device) for name in OTHERS]
        again = trained_case("ppo-lora", folder, model, device)
        again = merge(again, {"recipe.iterations": 3, "resume": True, "name": "resumed"})
        (folder / f"{device}.json").write_text(json.dumps([*cases, again]))
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict[str, Any]:
    words = [sys.executable, str(WORKER), str(folder / "pretend.json"), str(folder / "found.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def on_cpu(folder) -> Path:
    cases = [c for c in json.loads((folder / "cpu.json").read_text()) if c["name"] in (*TRAINED, "resumed")]
    launch(folder / "cpu-trained.json", cases, 1)
    return folder / "cpu"


@pytest.mark.parametrize("name", [*TRAINED, *OTHERS, "resumed"])
def test_runs_on_a_device_that_is_not_the_cpu(name, found):
    assert found[name]["error"] is None, found[name]["error"]


@pytest.mark.parametrize("name", [name for name in TRAINED if name not in UNTIED])
def test_learns_what_the_cpu_learns(name, found, folder, on_cpu):
    got, wanted = trained_weights(folder / "pretend" / name), trained_weights(on_cpu / name)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(
            got[key].cpu(), value, rtol=0, atol=ROUNDED.get(name, 1e-9), msg=lambda text, key=key: f"{key}: {text}"
        )


def waits_of(found: dict[str, Any], name: str) -> tuple[Counter[tuple[str, str]], str]:
    """How often each place waited in the last step or iteration, and as text with the lines."""
    last = found[name]["waits"][-1]
    seen: Counter[tuple[str, str]] = Counter()
    for file, function, _, _, count in last:
        seen[file, function] += count
    return seen, "\n".join(f"{n} x {file}:{line} {function}: {what}" for file, function, what, line, n in last)


@pytest.mark.parametrize("name", ["sft", "sft-packed", "reward", "dpo", "kto"])
def test_an_offline_step_waits_four_times(name, found):
    seen, text = waits_of(found, name)
    assert seen == {**STEP, MODEL: 1}, text


def test_an_iteration_of_grpo_waits_once_a_token_and_eight_times(found):
    seen, text = waits_of(found, "grpo")
    assert seen.pop(("rollout/next_token.py", "_read")) <= 8, text  # one a token of the longest answer
    assert seen.pop(("rollout/decoder.py", "prefill")) == 1, text
    assert seen.pop(MODEL) == 2, text  # the reference, and the policy in training
    own = {("distributed/micro.py", "over_rows"): 1, ("train/policy_update.py", "gradients"): 1}
    assert seen == {**STEP, **own}, text


def test_an_iteration_of_ppo_waits_four_times_an_update_and_once_a_run_of_a_trunk(found):
    updates = 8
    seen, text = waits_of(found, "ppo")
    assert seen.pop(("rollout/next_token.py", "_read")) <= 8, text
    assert seen.pop(("rollout/decoder.py", "prefill")) == 1, text
    assert seen.pop(MODEL) == 2 + 2 * updates, text
    assert seen == {
        ("distributed/micro.py", "over_rows"): 2,  # the reference, the values
        ("train/policy_update.py", "gradients"): updates,
        ("update/optimizer.py", "not_finite"): updates,
        ("update/engines.py", "step"): 2 * updates,  # actor and critic
        ("train/tally.py", "numbers"): 1,
    }, text


@pytest.mark.parametrize("name", ["grpo", "distill"])
def test_more_micro_batches_wait_no_more(name, found):
    """Micro-batches cost a run of the trunk each, and nothing else."""
    few, many = (waits_of(found, one)[0] for one in (name, f"{name}-micro"))
    assert many.pop(MODEL) > few.pop(MODEL)
    assert many == few


def test_what_mixes_devices_is_refused_with_the_place(tmp_path):
    """The device itself: each of these is an error on CUDA or makes it wait."""
    script = """
import pretend_device, torch
pretend_device.start()
there = torch.arange(4.0, device="pretend")
for wrong in (
    lambda: there + torch.ones(4),
    lambda: there + torch.ones(4, device="pretend:1"),
    lambda: there[torch.tensor([1])],
    lambda: torch.ones(4)[there.long()],
    lambda: torch.rand(2, device="pretend", generator=torch.Generator()),
    lambda: there.numpy(),
):
    try:
        wrong()
    except (RuntimeError, TypeError):
        continue
    raise SystemExit("not refused")
with pretend_device.waits() as seen:
    there.sum().item(), there.tolist(), there[there > 1], there.cpu(), bool((there > 1).all())
    torch.ones(3).to("pretend")
assert sum(seen.count.values()) == 6, seen.count
with pretend_device.waits() as seen:
    torch.ones(3).to("pretend", non_blocking=True), there + 1, there.sum()
assert not seen.count, seen.count
"""
    env = {**os.environ, "PYTHONPATH": f"{WORKER.parent}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_checkpointed_layers_keep_waits_in_the_cpus_memory(tmp_path):
    """Between a forward and its backward pass the device holds no layer's input, the gradients are the same numbers,
    and the forecast counts it so."""
    script = """
import gc, pretend_device, torch
pretend_device.start()
from transformers import LlamaConfig, LlamaForCausalLM
from steersman.model import Policy
from steersman.model.modes import checkpoint_activations
from steersman.plan.memory import Load, Model, forward
from steersman.types import Tokens

there, layers, tokens, hidden = torch.device("pretend", 0), 16, 512, 64
tall = LlamaConfig(vocab_size=64, hidden_size=hidden, intermediate_size=32, num_hidden_layers=layers,
    num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
batch = Tokens.from_ids([[1] * (tokens // 2)], [[2] * (tokens // 2)])
kept, foreseen, gradients = [], [], []
for offload in (False, True):
    torch.manual_seed(0)
    policy = Policy(LlamaForCausalLM(tall).eval().to(there), None)
    checkpoint_activations(policy.model, away_from=there if offload else None)
    gc.collect()
    with pretend_device.memory() as before:
        pass
    foreseen.append(forward(Model("policy", policy.model, "", trained=policy), Load(tokens, tokens))[0])
    with pretend_device.memory() as after:
        pass
    assert after == before, f"a forecast leaves {after} behind, beyond {before}"
    loss = policy.logp(batch).logp.sum()
    with pretend_device.memory() as seen:
        pass
    kept.append(seen[0])
    loss.backward()
    gradients.append([p.grad.cpu() for p in policy.parameters()])
    del policy, loss
inputs = (layers - 1) * tokens * hidden * 4
assert kept[0] - kept[1] > inputs, (kept, inputs)
assert foreseen[0] - foreseen[1] > inputs, (foreseen, inputs)
assert all(torch.equal(a, b) for a, b in zip(*gradients))
"""
    env = {**os.environ, "PYTHONPATH": f"{WORKER.parent}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
