"""docs/results/performance.md from the JSON files of the benchmarks."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import write_inputs
from duel import HERE
from floor import Phase, Rates, measure, offline, on_policy, work_of

DOCS = HERE.parent / "docs" / "results"
TITLES = {
    "ppo": "PPO iteration: 64 prompts of 32 tokens, 64 new tokens, critic, reward model, reference",
    "grpo": "GRPO iteration: 8 prompts x 8 samples, 64 new tokens, KL to a reference",
    "dpo": "DPO epoch: batches of 16 pairs of mixed lengths, reference included",
    "reward": "Reward-model epoch: the same pairs",
    "sft": "SFT epoch: batches of 16 of mixed lengths",
    "vllm_rollout": "Rollout beside vLLM's CPU build, 128 new tokens, prompts x samples",
}
HEAD = """# Performance

Written by `python benchmarks/run_all.py`; do not edit. The arithmetic of the floor is in `benchmarks/floor.py`, how
the peers' environments are made in `benchmarks/README.md`, what was tried in `docs/log.md`.

Both sides have the same random Llama-style model (llama5m: hidden 256, 4 layers; llama36m: hidden 512, 8 layers;
vocabulary 4,096), the same data, hyper-parameters and number of tokens. Each runs in a process of its own; they take
turns on the same machine, the first turn of each is not counted, and the ratio is the median of the pairs. TRL runs
without the gradient checkpointing that is its default: that makes it faster, and its memory larger. That the two
learn the same per sample is shown in [another page](learning-vs-trl.md).
"""


def write_page(folder: Path, *, measured: bool) -> Path:
    """Measures the machine's rates (unless `measured` is False and they are known), then writes the page."""
    rates = _rates(folder, measured)
    text = [HEAD, _machine(folder, rates), "## Times and floors\n", _times(folder, rates)]
    text += ["## A real chat model\n", _chat(folder)]
    text += ["## Where the time goes\n", _phases(folder, rates), "## Rollout beside `generate`\n", _rollout(folder)]
    text += ["## Log-probabilities over 128,000 words\n", _memory(folder), "## Growth\n", _growth(folder)]
    text += ["## GPU\n", _gpu(folder)]
    path = DOCS / "performance.md" if folder.parent == DOCS else folder / "performance.md"
    path.write_text("\n".join(part for part in text if part))
    return path


def read(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def phases_of(name: str, result: dict[str, Any], dtype: str) -> list[Phase]:
    """The work that a result's algorithm must do."""
    work = work_of(result["model"], dtype)
    rows, samples = result["rows"], result["samples"]
    if name in ("ppo", "grpo"):
        return on_policy(work, name, rows, samples)
    if name == "vllm_rollout":
        prompt = work.run("rollout", [(32, 0)] * rows, rows * samples)
        return [prompt, *work.decode("rollout", rows * samples, 32, 128)]
    with tempfile.TemporaryDirectory() as made:
        write_inputs(Path(made), result["model"], models=False)
        return offline(work, name, Path(made), rows)


def _rates(folder: Path, fresh: bool) -> Rates:
    path = folder / "machine.json"
    if fresh or not path.exists():
        rates = measure()
        path.write_text(json.dumps({"flops": rates.flops, "bandwidth": rates.bandwidth}) + "\n")
    return Rates(**json.loads(path.read_text()))


def _machine(folder: Path, rates: Rates) -> str:
    known = next((found for name in TITLES if (found := read(folder, name))), None)
    about = ""
    if known:
        versions = {k: v for name in TITLES if (f := read(folder, name)) for k, v in f["versions"].items()}
        both = sorted(
            {f["versions"]["trl"] for name in TITLES if (f := read(folder, name)) and "trl" in f["versions"]}
        )
        versions["trl"] = " and ".join(both)
        told = ", ".join(f"{k} {v}" for k, v in versions.items())
        about = f"{known['date']}, {known['machine']}, {known['threads']} threads, {known['dtype']}; {told}. "
    return (
        f"{about}Measured rates: {rates.flops / 1e9:.0f} GFLOP/s (matrix products), "
        f"{rates.bandwidth / 1e9:.0f} GB/s (copies).\n"
    )


def _times(folder: Path, rates: Rates) -> str:
    lines = [
        "Peak memory is that of the whole process, libraries included. The floor is the least time for this work.\n",
        "| what | model | peer, s | steersman, s | ratio (pairs) | floor, s | floor / ours | peer, MiB | ours, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, title in TITLES.items():
        found = read(folder, name)
        for r in found["results"] if found else []:
            floor = sum(rates.seconds(phases_of(name, r, found["dtype"])).values())
            s, memory, pairs = r["seconds"], r["memory"], ", ".join(f"{x:.2f}" for x in r["ratios"])
            size = f" {r['rows']} x {r['samples']}" if name == "vllm_rollout" else ""
            lines.append(
                f"| {title}{size} | {r['model']} | {s['peer']:.2f} | {s['steersman']:.2f} | "
                f"{r['ratio']:.2f} ({pairs}) | {floor:.2f} | {floor / s['steersman']:.2f} | "
                f"{memory['peer']['peak_mib']:.0f} | {memory['steersman']['peak_mib']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def _chat(folder: Path) -> str:
    machines = read(folder, "chat")
    if not machines:
        return "Not measured.\n"
    lines = [
        "SmolLM2-135M-Instruct by `python benchmarks/chat.py MODEL --pairs FILE`: SFT, reward and DPO steps on 8 "
        "real pairs of up to 512 tokens; GRPO and PPO 4 prompts of up to 128 tokens x 4 samples of 48 new tokens, "
        "ppo16 16 prompts x 1 (TRL's PPO has no samples of a prompt and gets each of 4 four times). LoRA has rank "
        "16 on all linear layers; QLoRA a base of NF4 beneath it. How much faster depends on the processor, because "
        "float32 products go through oneDNN here and through MKL in TRL ([log](../log.md)); each table says what a "
        "layer's product reaches by either. The first table is from before padding was left out and freed memory "
        "given back. In the second the rows of GRPO and PPO (but for QLoRA) are of 2026-11-30, after prompts and "
        "answers became one read, in an hour in which the machine was slower, its MKL most of all; the others are of "
        "the day before, when a layer's product reached 186 and 200 GFLOP/s and TRL's GRPO took 30 s. The third is "
        "of an Intel processor, where MKL reaches what oneDNN does: TRL's GRPO takes half of its time on the AMD "
        "one, ours seven tenths, so the ratio is smaller. There the version of 2026-11-27, turn by turn with "
        "that of 2026-12-01, takes 9.57 s for an iteration of GRPO beside 9.44 s, with 4,747 MiB beside 3,210; "
        "linear layers, the output's products and the compiled decoding step are three quarters of it. Products in "
        "place reach about 200 GFLOP/s: the second core's share comes and goes (the same product in 2 threads "
        "reaches 148 or 300 within seconds). GRPO and PPO of whole models have "
        "`offload: true`.\n",
    ]
    for processor, found in machines.items():
        rate = found["products"]
        lines += [
            f"**{processor}**, {found['machine']}, {found['date']}; a product of {rate['of']} reaches "
            f"{rate['torch']:.0f} GFLOP/s in torch, {rate['steersman']:.0f} here.\n",
            "| what | TRL, s | steersman, s | ratio (pairs) | TRL, MiB | ours, MiB | ours / TRL |",
            "| --- " * 7 + "|",
        ]
        for name, r in found["results"].items():
            s, memory = r["seconds"], {side: r["memory"][side]["peak_mib"] for side in ("peer", "steersman")}
            pairs = ", ".join(f"{x:.2f}" for x in r["ratios"])
            lines.append(
                f"| {name} | {s['peer']:.2f} | {s['steersman']:.2f} | {r['ratio']:.2f} ({pairs}) | "
                f"{memory['peer']:.0f} | {memory['steersman']:.0f} | {memory['steersman'] / memory['peer']:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def _phases(folder: Path, rates: Rates) -> str:
    lines = ["| iteration | model | phase | seconds | GFLOP | floor, s | floor / ours |", "| --- " * 7 + "|"]
    for name in ("ppo", "grpo"):
        found = read(folder, name)
        for r in found["results"] if found else []:
            phases = phases_of(name, r, found["dtype"])
            floor = rates.seconds(phases)
            for phase, seconds in r["phases"].items():
                if phase not in floor:  # GRPO's reward is a function of words
                    continue
                flops = sum(p.flops for p in phases if p.name == phase) / 1e9
                lines.append(
                    f"| {name} | {r['model']} | {phase} | {seconds:.2f} | {flops:.0f} | {floor[phase]:.2f} | "
                    f"{floor[phase] / seconds:.2f} |"
                )
    lines.append(
        "\nThe time above the floor goes, in decoding, into reading keys and values from memory and into processing "
        "prompts; in passes over whole batches, into matrix products that reach 85 to 95% of the peak rate, into "
        "attention, into the operations between the products, and into adding up gradients, none of which the floor "
        "counts.\n"
    )
    return "\n".join(lines)


def _rollout(folder: Path) -> str:
    found = read(folder, "rollout")
    if not found:
        return "Not measured.\n"
    lines = [
        "Tokens per second, transformers' `generate` and steersman's engine in one process, alternating.\n",
        "| model | scenario | generate | steersman | ratio (pairs) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in found["results"]:
        rate, pairs = r["tokens_per_second"], ", ".join(f"{x:.2f}" for x in r["ratios"])
        lines.append(
            f"| {r['model']} | {r['scenario']} | {rate['generate']:.0f} | {rate['steersman']:.0f} | "
            f"{r['ratio']:.2f} ({pairs}) |"
        )
    return "\n".join(lines) + "\n"


def _memory(folder: Path) -> str:
    found = read(folder, "memory")
    if not found:
        return "Not measured.\n"
    told = {way: f"{found[way]['peak_mib']:.0f} MiB and {found[way]['seconds']:.2f} s" for way in ("fused", "plain")}
    return (
        f"{found['tokens']:,} tokens, hidden {found['hidden']}, forward and backward, the gradient of the output "
        f"layer included: fused {told['fused']}, plain {told['plain']}. The share of the plain memory is "
        f"{found['share']:.2f} (aim: 0.25).\n"
    )


def _growth(folder: Path) -> str:
    found = read(folder, "growth")
    if not found:
        return "Not measured.\n"
    lines = [
        "Exponent of the time per token in each size; what the algorithm must is at most the number beside it.\n",
        "| what | against | exponent | at most | microseconds per token at each size |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in found["results"]:
        pairs = zip(r["sizes"], r["microseconds_per_token"], strict=True)
        told = ", ".join(f"{n}: {t:.0f}" for n, t in pairs)
        lines.append(f"| {r['side']} | {r['axis']} | {r['exponent']:+.2f} | {r['at_most']:.0f} | {told} |")
    return "\n".join(lines) + "\n"


def _gpu(folder: Path) -> str:
    files = sorted(folder.glob("*-cuda.json"))
    if not files:
        return (
            "None could be had. `python benchmarks/run_all.py --device cuda --dtype bfloat16 --only ppo grpo memory` "
            "runs the same on a model of about 1B random weights and adds its table here.\n"
        )
    lines = ["| what | device | model | peer, s | steersman, s | ratio | MFU | device MiB, peer | device MiB, ours |"]
    lines.append("| --- " * 9 + "|")
    for path in files:
        found = json.loads(path.read_text())
        for r in found.get("results", []):
            if "seconds" not in r:
                continue
            name = path.stem.removesuffix("-cuda")
            rates = measure("cuda", getattr(torch, found["dtype"])) if torch.cuda.is_available() else None
            flops = sum(p.flops for p in phases_of(name, r, found["dtype"]))
            used = f"{flops / r['seconds']['steersman'] / rates.flops:.2f}" if rates else "-"
            memory = [f"{r['memory'][side].get('device_peak_mib', 0):.0f}" for side in ("peer", "steersman")]
            s = r["seconds"]
            lines.append(
                f"| {name} | {found['device']} | {r['model']} | {s['peer']:.2f} | {s['steersman']:.2f} | "
                f"{r['ratio']:.2f} | {used} | {memory[0]} | {memory[1]} |"
            )
    return "\n".join(lines) + "\n"
