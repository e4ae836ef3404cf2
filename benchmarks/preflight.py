"""The memory that preflight announces beside the memory that is used: recipes, each in a process of its own.

    python benchmarks/preflight.py [--only NAME ...]

A run of two steps; what is announced is the largest phase that preflight tells, what is used is the process's largest
resident memory. Models have random weights, one of SmolLM2-135M's shape and one of 36M parameters. Needs 6 GiB; with
glibc on Linux. Writes docs/results/preflight.md and .json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import resource
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from common import SHAPES, build_tokenizer, peak_mib, write_inputs

RESULTS = Path(__file__).parents[1] / "docs" / "results"
MODELS = {
    "135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True,
    },
    "36M": {
        "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 4096, "tie_word_embeddings": False,
    },
}  # fmt: skip
OFFLINE = {"train": {"max_steps": 2, "batch_size": 8}}
SAMPLED = {"rollout": {"prompts": 8, "samples": 4, "max_new_tokens": 64, "held_out": 8}, "iterations": 2}
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "sft": ("sft", "135M", "sft", OFFLINE),
    "sft, checkpointing": ("sft", "135M", "sft", {**OFFLINE, "model": {"gradient_checkpointing": True}}),
    "sft, LoRA": ("sft", "135M", "sft", {**OFFLINE, "model": {"lora": {}}}),
    "sft, short rows": ("sft", "135M", "short_sft", OFFLINE),
    "sft, LoRA, short rows": ("sft", "135M", "short_sft", {**OFFLINE, "model": {"lora": {}}}),
    "dpo": ("dpo", "135M", "pairs", OFFLINE),
    "dpo, LoRA, short rows": ("dpo", "135M", "short_pairs", {**OFFLINE, "model": {"lora": {}}}),
    "grpo": ("grpo", "135M", "prompts", {**SAMPLED, "reward": "function"}),
    "grpo, LoRA": ("grpo", "135M", "prompts", {**SAMPLED, "model": {"lora": {}}, "reward": "function"}),
    "kto": ("kto", "36M", "pairs", OFFLINE),
    "reward": ("reward", "36M", "pairs", OFFLINE),
    "ppo": ("ppo", "36M", "prompts", {**SAMPLED, "reward": "model"}),
    "ppo, shared critic": ("ppo", "36M", "prompts", {**SAMPLED, "reward": "function", "critic": {"init": "shared"}}),
    "sft, bfloat16": ("sft", "36M", "sft", {**OFFLINE, "model": {"dtype": "bfloat16"}}),
    "grpo, QLoRA": (
        "grpo",
        "135M",
        "prompts",
        {**SAMPLED, "model": {"quantise": "nf4", "lora": {}}, "reward": "function"},
    ),
    "dpo, QLoRA": ("dpo", "36M", "pairs", {**OFFLINE, "model": {"quantise": "nf4", "lora": {}}}),
    "ppo, share: base": (
        "ppo",
        "36M",
        "prompts",
        {**SAMPLED, "reward": "function", "share": "base", "model": {"lora": {}}},
    ),
}
"""Verb, model, data and settings of each recipe."""
TOKENS = {"135M": 1024, "36M": 2048}
SHORT, DEFAULT = 128, 2048
"""Words of a short row's texts, and the tokens of the micro-batches that these are read in, the default on a CPU."""


def inputs(folder: Path, name: str) -> None:
    """A policy, a reward model and data, as `common.write_inputs` makes them."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[name], max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config.num_labels = 1
    tokenizer = build_tokenizer(MODELS[name]["vocab_size"])
    for kind, model in (("policy", LlamaForCausalLM), ("scalar", LlamaForSequenceClassification)):
        model(config).save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    SHAPES[name] = {"vocab": MODELS[name]["vocab_size"]}
    write_inputs(folder, name, 64, models=False)
    for file in ("sft", "pairs"):
        rows = [row for row in (folder / f"{file}.jsonl").read_text().splitlines() if len(row.split()) <= SHORT]
        (folder / f"short_{file}.jsonl").write_text("\n".join(rows) + "\n")


def settings(case: str, folder: Path) -> dict[str, Any]:
    """The recipe's settings."""
    verb, size, data, given = CASES[case]
    rewards = {"function": {"function": f"{folder / 'rewards.py'}:even"}, "model": {"model": str(folder / "scalar")}}
    found = {key: value for key, value in given.items() if key not in ("model", "reward")}
    found["model"] = {"path": str(folder / ("scalar" if verb == "reward" else "policy")), **given.get("model", {})}
    if "reward" in given:
        found["reward"] = {"parts": {"r": rewards[given["reward"]]}}
    tokens = DEFAULT if data.startswith("short") else TOKENS[size]
    run = {"dir": str(folder / "run"), "device": "cpu", "threads": 1, "micro_tokens": tokens}
    return {**found, "data": {"path": str(folder / f"{data}.jsonl")}, "run": {**run, "eval_every": 1000}}


class Heap(ctypes.Structure):
    """glibc's `mallinfo2`: what its heaps hold, bytes of all arenas together."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "blocks", "fast", "maps", "mapped", "_", "fast_free", "used", "free", "top")
    ]


class Watch(threading.Thread):
    """Every few milliseconds: what the C library's heaps hold. Kept from the moment when most of it was in use, in
    bytes: `used`, `gaps` (free places between what is used; what can be given back at the end is left out), and the
    process's `resident` memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.used = self.gaps = self.resident = 0
        self.over = threading.Event()

    def run(self) -> None:
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = Heap
        while not self.over.wait(0.005):
            heap = library.mallinfo2()
            if heap.used + heap.mapped > self.used:
                self.used, self.gaps = heap.used + heap.mapped, heap.free - heap.top
                self.resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def child(case: str, folder: Path) -> dict[str, Any]:
    """Runs one recipe here; MiB announced by phase, and used."""
    from steersman import cli
    from steersman.run.preflight import Phase, Preflight

    phases: dict[str, dict[str, int]] = {}
    told = Preflight.phase

    def note(self: Preflight, phase: Phase) -> None:
        phases[phase.name] = phase.shares
        told(self, phase)

    Preflight.phase = note
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(settings(case, folder)))  # which is YAML too
    watch = Watch()
    watch.start()
    if cli.main([CASES[case][0], str(recipe)]) != 0:
        raise SystemExit(f"{case}: the recipe was refused")
    watch.over.set()
    heap = {"used": watch.used, "gaps": watch.gaps, "resident": watch.resident}
    largest = max(phases, key=lambda name: sum(phases[name].values()))
    announced = sum(phases[largest].values()) / 2**20
    return {"largest": largest, "announced_mib": announced, "used_mib": peak_mib(), "phases": phases} | {
        "heap": {name: round(number / 2**20) for name, number in heap.items()}
    }


def row(case: str, found: dict[str, Any]) -> str:
    announced, used = found["announced_mib"], found["used_mib"]
    cells = (
        case,
        CASES[case][1],
        found["largest"],
        f"{announced:,.0f}",
        f"{used:,.0f}",
        f"{announced / used:.2f}",
        f"{found['heap']['gaps']:,}",
    )
    return f"| {' | '.join(cells)} |"


def write(results: dict[str, Any]) -> None:
    """The page and its numbers."""
    ratios = [found["announced_mib"] / found["used_mib"] for found in results.values()]
    near = sum(abs(ratio - 1) <= 0.15 for ratio in ratios)
    text = f"""# Memory: what is announced and what is used

Written by `python benchmarks/preflight.py`; do not edit. Recipes of two steps, each in a process of its own on a CPU,
in float32 unless they say otherwise: the largest phase that preflight announces before work starts, beside the
largest resident memory that the process had. Random weights: 135M is of SmolLM2-135M's shape (micro-batches of
{TOKENS["135M"]:,} tokens), 36M has 8 layers of width 512 (micro-batches of {TOKENS["36M"]:,} tokens). Short rows
have at most {SHORT} words, and micro-batches of {DEFAULT:,} tokens, the default on a CPU: one holds an update's rows.

| recipe | model | largest phase | announced, MiB | used, MiB | announced / used | gaps, MiB |
| --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(row(case, found) for case, found in results.items())}

The ratios lie between {min(ratios):.2f} and {max(ratios):.2f}.
The aim is within 0.15 of 1; {near} of {len(ratios)} are that near.
Pairs are announced too high because both answers are counted with a prompt of their own.
The last column is what lay free between the blocks of the C library's heap when most of it was in use (`mallinfo2`);
it differs by some 150 MiB between two runs of one recipe.

What is announced holds gaps that a forward pass leaves on a CPU: tensors that it makes and frees between those that
are kept. glibc aligns a block by asking for more than it hands out, so a freed place does not fit the next tensor
of the same size. Where malloc maps every block by itself (M_MMAP_THRESHOLD at 128 KiB) there are no gaps, and a run
takes what its tensors have, within 2%; but new pages cost time. steersman leaves malloc as it is, adds adapters in
place, those of 4-bit bases too, and asks malloc now and then to give back what lies free (`malloc_trim`, after
every 128 MiB that a pass frees, before and after a long call of sampling, and after preflight itself). Of what a
forward pass makes and frees, one half is announced as gaps for models that compute in float32: a rule of thumb. At
least what a backward pass has freed and not yet given back is.

Another allocator leaves fewer gaps: jemalloc (`LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libjemalloc.so.2`, Debian's
`libjemalloc2`).
"""
    (RESULTS / "preflight.md").write_text(text)
    machine = {"system": platform.platform(), "python": platform.python_version(), "torch": torch.__version__}
    (RESULTS / "preflight.json").write_text(json.dumps({**machine, "recipes": results}, indent=1))


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--only", nargs="*", default=list(CASES), help="measure these anew and keep the others")
    given.add_argument("--child", nargs=2)
    args = given.parse_args()
    if args.child:
        found = child(args.child[0], Path(args.child[1]))
        Path(args.child[1], "found.json").write_text(json.dumps(found))
        return
    path = RESULTS / "preflight.json"
    results: dict[str, Any] = json.loads(path.read_text())["recipes"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as base:
        for size in sorted({CASES[case][1] for case in args.only}):
            inputs(Path(base, size), size)
        for case in args.only:
            folder = Path(base, CASES[case][1])
            subprocess.run(["rm", "-rf", str(folder / "run")], check=True)
            subprocess.run(
                [sys.executable, __file__, "--child", case, str(folder)], check=True, stdout=subprocess.DEVNULL
            )
            results[case] = json.loads((folder / "found.json").read_text())
            print(row(case, results[case]), flush=True)
            write({case: results[case] for case in CASES if case in results})


if __name__ == "__main__":
    main()
