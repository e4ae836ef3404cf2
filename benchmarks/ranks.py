"""The same recipe on one process and on several: are the weights the same, what does a rank hold, how long is a step?

    python benchmarks/ranks.py equality [VERB ...] # verbs x layouts, the story model in float64
    python benchmarks/ranks.py zero [VERB ...]     # the same under DeepSpeed, which updates float32
    python benchmarks/ranks.py memory MODEL        # what a rank holds of weights, gradients and moments, and its peak
    python benchmarks/ranks.py scale [RECIPE ...]  # the recipes of recipes/scale, one under torchrun as two nodes
    python benchmarks/ranks.py cost                # what every rank holds of the whole batch, against batch and world

Prints Markdown tables. Everything runs over gloo on this machine's CPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from steersman.distributed.stored import StoredTensor
from steersman.jsonl import read_jsonl
from steersman.run.files.checkpoint import Checkpointer

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "2 replicas": (2, {}),
    "4 replicas": (4, {}),
    "2 shards": (2, {"parallel.mode": "fsdp"}),
    "2 copies x 2 shards": (4, {"parallel.mode": "fsdp", "parallel.replicas": 2}),
}
ZERO: dict[str, tuple[int, dict[str, Any]]] = {
    "2 ranks, ZeRO 1": (2, {"parallel.mode": "zero1"}),
    "2 ranks, ZeRO 2": (2, {"parallel.mode": "zero2"}),
    "2 ranks, ZeRO 3": (2, {"parallel.mode": "zero3"}),
}
RANKS = {"1-gpu": "1", "8-gpus": "2 shards", "4-nodes": "2 nodes of 2 shards, a copy on each"}
SHORT = {"rollout.prompts": 8, "rollout.max_new_tokens": 16, "iterations": 4, "algorithm.minibatches": 2}
VERBS: dict[str, dict[str, Any]] = {
    "sft": {"train.max_steps": 8},
    "reward": {"train.max_steps": 8},
    "dpo": {"train.max_steps": 8},
    "kto": {"train.max_steps": 8},
    "ppo": SHORT,
    "grpo": SHORT,
    "trpo": SHORT,
}


def run(verb: str, settings: dict[str, Any], recipe: str | None = None) -> tuple[float, str]:
    """Seconds and output of one command."""
    words = [str(recipe or ROOT / "recipes" / f"{verb}.yaml")] if recipe != "" else []
    words += [f"--{key}={json.dumps(value)}" for key, value in settings.items()]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "steersman", verb, *words],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{verb} {settings}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    return time.monotonic() - began, done.stdout


def trained(folder: Path) -> dict[str, torch.Tensor]:
    found = Checkpointer(folder).load()
    if found is None:
        raise SystemExit(f"{folder} has no checkpoint")
    roles = found.state["state"].get("roles", {"model": found.state["state"].get("model")})
    return {
        f"{role}.{name}": x.full_tensor() if isinstance(x, StoredTensor) else x
        for role in ("model", "policy", "critic")
        for name, x in roles.get(role, {}).items()
    }


def equality(layouts: dict[str, tuple[int, dict[str, Any]]] = LAYOUTS, dtype: str = "float64", **more: Any) -> None:
    """The largest difference of a weight between one process and several, after training."""
    print("| verb | " + " | ".join(layouts) + " |\n|---|" + "---|" * len(layouts))
    with tempfile.TemporaryDirectory() as folder:
        for verb, own in ((verb, own) for verb, own in VERBS.items() if not sys.argv[2:] or verb in sys.argv[2:]):
            base = {**own, "model.dtype": dtype, "run.save_every": 1000, "run.threads": 1, **more}
            recipe = ROOT / "recipes" / f"{'ppo' if verb == 'trpo' else verb}.yaml"
            if verb == "trpo":
                recipe, base = trpo_recipe(Path(folder)), {**base}
                base.pop("algorithm.minibatches")
            alone = Path(folder, f"{verb}-alone")
            run(verb, {**base, "run.dir": str(alone)}, str(recipe))
            cells = []
            for name, (world, layout) in layouts.items():
                if verb == "trpo" and "parallel.mode" in layout:
                    cells.append("refused")
                    continue
                there = Path(folder, f"{verb}-{name.replace(' ', '-')}")
                run(verb, {**base, **layout, "run.devices": world, "run.dir": str(there)}, str(recipe))
                one, many = trained(alone), trained(there)
                cells.append(f"{max(float((one[key] - many[key]).abs().max()) for key in one):.1e}")
            print(f"| {verb} | " + " | ".join(cells) + " |", flush=True)


def trpo_recipe(folder: Path) -> Path:
    """The recipe of PPO without what TRPO does not read."""
    import yaml

    values = yaml.safe_load((ROOT / "recipes" / "ppo.yaml").read_text())
    values.pop("optimizer")
    values["algorithm"] = {"beta": 0.1}
    path = folder / "trpo.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def memory(model: str) -> None:
    """Bytes of weights, gradients and moments on the fullest rank, and the peak of its process, in one SFT step."""
    code = ROOT / "benchmarks" / "ranks_side.py"
    found = {}
    for name, (world, mode) in {
        "one process": (1, "replicas"),
        "2 replicas": (2, "replicas"),
        "2 shards": (2, "fsdp"),
    }.items():
        words = [sys.executable, str(code), model, mode]
        if world > 1:
            words = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", *words[1:]]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        lines = [json.loads(x) for x in re.findall(r"RESULT (\{.*?\})", done.stdout)]
        if len(lines) != world:
            raise SystemExit(done.stderr[-4000:])
        found[name] = {key: max(line[key] for line in lines) for key in lines[0]}
    one = found["one process"]
    print("| | weights, gradients, moments MiB | share | peak MiB | share | tokens/s, all ranks | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, row in found.items():
        speed = row["tokens"] / row["seconds"]
        print(
            f"| {name} | {row['held'] / 2**20:.0f} | {row['held'] / one['held']:.2f} | {row['peak'] / 2**20:.0f} | "
            f"{row['peak'] / one['peak']:.2f} | {speed:.0f} | {speed / (one['tokens'] / one['seconds']):.2f} |"
        )


def scale() -> None:
    """Runs each recipe of recipes/scale with the small model, that of four nodes as two nodes of two ranks each."""
    nodes = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:29511"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *nodes, "-m", "steersman"]
    alone = [sys.executable, "-m", "steersman"]
    commands = {
        "1-gpu": (1, [*alone, "ppo"], []),
        "8-gpus": (1, [*alone, "ppo"], ["--run.devices", "2"]),
        "4-nodes": (2, [*launcher, "grpo"], ["--parallel.replicas", "2"]),
    }
    print("| recipe | ranks | held-out reward, before | after | every step logged |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (count, words, changes) in commands.items():
            if sys.argv[2:] and name not in sys.argv[2:]:
                continue
            there = Path(folder, name)
            asked = [*words, f"recipes/scale/{name}.yaml", *changes, "--run.dir", str(there)]
            env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            running = [subprocess.Popen(asked, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        text=True) for _ in range(count)]  # fmt: skip
            said = [one.communicate()[0] for one in running]
            if any(one.returncode for one in running):
                raise SystemExit(f"{name}: {said[0][-3000:]}")
            rows = read_jsonl(there / "metrics.jsonl")
            reward = [row["held_out/reward/total"] for row in rows if "held_out/reward/total" in row]
            whole = [row["step"] for row in rows] == list(range(5))
            print(f"| {name} | {RANKS[name]} | {reward[0]:.3f} | {reward[-1]:.3f} | {whole} |", flush=True)


def cost() -> None:
    """Bytes that every rank holds of the whole batch: ids, masks and eight `[B, T]` numbers a token."""
    print("| samples x tokens | on every rank | share of an 80 GB device |\n|---|---|---|")
    for samples, tokens in ((64, 512), (1024, 2048), (4096, 8192), (16384, 16384), (65536, 32768)):
        held = samples * tokens * (8 * 4 + 8 + 1 + 8)
        print(f"| {samples:,} x {tokens:,} | {held / 2**20:,.0f} MiB | {held / 80e9:.1%} |")


if __name__ == "__main__":
    {
        "equality": lambda: equality(), "memory": lambda: memory(sys.argv[2]), "scale": lambda: scale(),
        "cost": lambda: cost(), "zero": lambda: equality(ZERO, "float32", **{"optimizer.eps": 1e-4}),
    }[sys.argv[1]]()  # fmt: skip
