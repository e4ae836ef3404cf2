"""Where each layout stops scaling: the simulation of `steersman plan`, on 8 to 4,096 devices.

    python benchmarks/plan_scale.py

Writes docs/results/plan-scale.json, .png and .md. Takes a minute; no model is made.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steersman.model import shape_of
from steersman.plan.devices import KNOWN, Cluster
from steersman.plan.layouts import Role, Work
from steersman.plan.simulate import Lengths, SimulatedIteration, best_apart, simulate

RESULTS = Path(__file__).parents[1] / "docs" / "results"
COUNTS = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
LENGTHS = Lengths(1024, 8192)
WORK = Work(
    samples=4096, prompt=512, new=8192, epochs=1, micro=16_384, weight=4, compute=2, checkpointing=True
)  # fmt: skip


def measured() -> list[dict[str, Any]]:
    shape = shape_of("7b")
    roles = [Role("actor", shape, shape.parameters), Role("reference", shape)]
    found = []
    for n in COUNTS:
        there = Cluster(KNOWN["H100-80GB"], 8, n // 8)
        rows: list[SimulatedIteration | None] = [simulate(there, roles, WORK, LENGTHS)]
        rows += [best_apart(there, roles, WORK, LENGTHS, ahead) for ahead in (0, 1, 2, 4)]
        found += [asdict(row) for row in rows if row is not None]
        print(n, [f"{row.seconds:.1f}" for row in rows if row is not None], flush=True)
    return found


def picture(found: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for label, take in layouts().items():
        rows = [r for r in found if take(r)]
        counts = [r["devices"] for r in rows]
        left.plot(counts, [WORK.samples / r["seconds"] for r in rows], marker="o", ms=3, label=label)
        right.plot(counts, [WORK.samples / r["seconds"] / r["devices"] for r in rows], marker="o", ms=3, label=label)
    for axes, title in ((left, "responses a second"), (right, "responses a second and device")):
        axes.set(xscale="log", xlabel="devices", title=title)
        axes.set_xticks(COUNTS, [str(c) for c in COUNTS], fontsize=7)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.set_yscale("log")
    right.set_ylim(bottom=0)
    left.legend(fontsize=8)
    figure.savefig(RESULTS / "plan-scale.png", dpi=130)


def layouts() -> dict[str, Any]:
    named: dict[str, Any] = {"all sample, then all train": lambda r: not r["apart"]}
    for k in (0, 1, 2, 4):
        named[f"apart, {k} ahead"] = lambda r, k=k: r["apart"] and r["ahead"] == k
    return named


def page(found: list[dict[str, Any]]) -> str:
    by = {n: [r for r in found if r["devices"] == n] for n in COUNTS}
    lines = ["| devices | together | apart, 0 ahead | 1 ahead | 2 ahead | 4 ahead | 1 ahead / best without |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for n, rows in by.items():
        together = next(r for r in rows if not r["apart"])
        ahead = {r["ahead"]: r for r in rows if r["apart"]}
        best = min(together["seconds"], ahead[0]["seconds"])
        cells = [f"{together['seconds']:.1f} s"]
        cells += [f"{ahead[k]['seconds']:.1f} s ({ahead[k]['apart']})" for k in (0, 1, 2, 4)]
        lines.append(f"| {n} | {' | '.join(cells)} | {best / ahead[1]['seconds']:.2f} |")
    wait = [
        f"| {n} | {together['samplers_wait']:.0%} | {one['samplers_wait']:.0%} | {one['trainers_wait']:.0%} |"
        for n, rows in by.items()
        for together in rows[:1]
        for one in [next(r for r in rows if r["apart"] and r["ahead"] == 1)]
    ]
    return "\n".join([
        "# Where each layout stops scaling", "",
        "Written by `python benchmarks/plan_scale.py`; do not edit. A simulation, not a measurement: nothing",
        "here ran on",
        "a GPU. `steersman plan RECIPE --devices 8xH100-80GB --nodes 16 --simulate true` does the same for a",
        "recipe.", "",
        "GRPO of a 7B model with a reference on nodes of eight H100: 4,096 responses an iteration to prompts of 512",
        f"tokens. Responses are log-normal with a mean of {LENGTHS.mean:,.0f} tokens and a deviation of",
        f"{LENGTHS.spread:g} of it, cut at {LENGTHS.longest:,}. Training is at 40% of the data sheet's rate,",
        "decoding at",
        "60% of its bandwidth, weights are sharded inside a node and copied over nodes. Seconds of an iteration; in",
        "brackets how many devices sample, the best of an eighth to seven eighths.", "",
        *lines, "",
        "The last column is what sampling one update ahead gains over the faster of the two that do not.", "",
        "![responses a second](plan-scale.png)", "",
        "Shares of an iteration in which devices wait for others:", "",
        "| devices | together | 1 ahead: samplers | 1 ahead: trainers |", "| --- | --- | --- | --- |", *wait, "",
        "What bounds each: a response of 8,192 tokens is decoded one token after the other, each reading all weights",
        "once, so no layout is faster than the longest response of an iteration (sampling ahead hides it behind",
        "training, but one batch must end before the next version is more than `ahead` old). With more devices each",
        "decodes fewer responses side by side, so reading the weights is shared by fewer. What is left out:",
        "prompts that",
        "share a cache, responses that are handed from a slow device to a free one, failures.", "",
    ])  # fmt: skip


def main() -> None:
    found = measured()
    (RESULTS / "plan-scale.json").write_text(json.dumps(found, indent=1))
    picture(found)
    (RESULTS / "plan-scale.md").write_text(page(found))


if __name__ == "__main__":
    main()
