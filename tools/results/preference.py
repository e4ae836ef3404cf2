"""All offline preference methods on two tasks with one small model, in one table.

    python tools/results/preference.py run --data ../shared/data --out runs/preference --seeds 0 --minutes 7
    python tools/results/preference.py table --out runs/preference --docs docs/results

`run` makes what is missing and begins no further cell after `--minutes` of CPU time; the same command goes on. Tasks:

- sentiment: stories260k; pairs of its own continuations of story openings, the one that VADER likes better chosen.
  VADER's score of new continuations is the gold reward.
- politeness: stories260k after SFT on `instruction_preference`; its pairs of polite and impolite answers. The judge
  is a reward model trained on the same pairs from the base model, so it is a judge and no gold.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from recording import OPENINGS, finished, options, over_seeds, plain_axes, rows_of, verb

from steersman.atomic import write_atomic
from steersman.data import DataConfig, encode_prompts, layout, prompts
from steersman.jsonl import jsonl_text, read_jsonl
from steersman.recipe.sections import ModelConfig, RolloutConfig
from steersman.reward import RewardConfig, build_reward
from steersman.reward.rules import BUILTINS
from steersman.run.device import set_threads
from steersman.run.run_config import RunConfig
from steersman.setup.generators import open_generator
from steersman.setup.models import policy_from
from steersman.verbs import feedback, generate, preference, reward_model, sft

METHODS: dict[str, dict[str, Any]] = {
    "DPO": {"name": "dpo"},
    "DPO, conservative": {"name": "dpo", "settings": {"label_smoothing": 0.1}},
    "DPO + NLL": {"name": "dpo", "nll": 1.0},
    "robust DPO": {"name": "robust_dpo", "settings": {"flip": 0.1}},
    "IPO": {"name": "ipo"},
    "SLiC": {"name": "hinge", "nll": 0.1},
    "RSO": {"name": "rso"},
    "DPOP": {"name": "dpop"},
    "TDPO1": {"name": "tdpo1"},
    "TDPO2": {"name": "tdpo2"},
    "SimPO": {"name": "simpo"},
    "ORPO": {"name": "orpo"},
    "CPO": {"name": "cpo"},
    "KTO": {"name": "kto"},
    "BCO": {"name": "bco"},
    "AlphaPO": {"name": "alphapo"},
    "DPO-shift": {"name": "dpo_shift"},
    "WPO": {"name": "wpo"},
    "Cal-DPO": {"name": "cal_dpo"},
    "SPPO": {"name": "sppo"},
    "DPO, length-normalised": {"name": "dpo_norm"},
    "EXO": {"name": "exo"},
    "DiscoPOP": {"name": "discopop"},
    "f-DPO, alpha-divergence": {"name": "fdpo_alpha"},
    "f-DPO, Jensen-Shannon": {"name": "fdpo_js"},
    "NCA": {"name": "nca"},
    "APO-zero": {"name": "apo_zero"},
    "APO-down": {"name": "apo_down"},
}
"""Each with its own defaults (docs/algorithms.md); SLiC with the likelihood term that belongs to it."""
LEARNING_RATE, EPOCHS, BATCH, NEW_TOKENS = 3e-4, 2, 32, 48
ENDS = {"sentiment": [1, 2], "politeness": []}


def start(task: str, data: Path, out: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The model that all methods start from, its pairs, and the judge; made once."""
    base = str(data / "stories260k/hf")
    if task == "sentiment":
        table = out / "pairs.jsonl"
        if not table.exists():
            label_pairs(base, data, table)
        return base, {"path": str(table), "held_out": 0.15}, {"builtin": "vader_sentiment"}
    pairs = {"path": str(data / "instruction_preference"), "on_bad_row": "skip", "on_too_long": "drop"}
    tuned = verb(
        sft, sft.SFTRecipe, out / "sft", 0,
        {
            "model": {"path": base}, "data": {**pairs, "held_out": 0.15}, "train": {"epochs": 6, "batch_size": 16},
            "optimizer": {"lr": 2e-3, "schedule": "cosine", "warmup": 20}, "run": {"eval_every": 100},
        },
    )  # fmt: skip
    judge = verb(
        reward_model, reward_model.RewardModelRecipe, out / "judge", 0,
        {
            "model": {"path": base}, "data": {**pairs, "held_out": 0.15}, "train": {"epochs": 4, "batch_size": 16},
            "optimizer": {"lr": 1e-3, "schedule": "linear", "warmup": 10}, "run": {"eval_every": 25},
        },
    )  # fmt: skip
    return tuned["model"], {**pairs, "held_out": 0.15, "max_length": 400}, {"model": judge["model"]}


def label_pairs(model: str, data: Path, table: Path) -> None:
    """Four continuations per opening: VADER's best against its worst, and the middle two, if they differ by 0.1."""
    drawn = table.with_name("drawn.jsonl")
    table.parent.mkdir(parents=True, exist_ok=True)
    recipe = {
        "model": {"path": model}, "data": {"path": str(data / "tinystories"), **OPENINGS, "held_out": 0},
        "rollout": {"samples": 4, "held_out": 0, "max_new_tokens": NEW_TOKENS, "eos_token_id": ENDS["sentiment"]},
        "out": str(drawn), "run": {"seed": 100, "threads": 1},
    }  # fmt: skip
    generate.run(generate.GenerateRecipe.model_validate(recipe))
    rows = read_jsonl(drawn)
    texts = [r["completion"] for r in rows]
    score = BUILTINS["vader_sentiment"](prompts=texts, completions=texts)
    pairs = []
    for first in range(0, len(rows), 4):
        order = sorted(range(first, first + 4), key=lambda i: score[i])
        for low, high in ((order[0], order[3]), (order[1], order[2])):
            if score[high] - score[low] > 0.1:
                chosen, rejected = texts[high], texts[low]
                pairs.append({"prompt": rows[first]["prompt"], "chosen": chosen, "rejected": rejected})
    table.write_text(jsonl_text(pairs))


def cell(task: str, method: str, seed: int, model: str, pairs: dict[str, Any], judge: dict[str, Any], out: Path):
    """One method trained and judged: `cell.json` in its run folder."""
    folder, loss = out / f"seed-{seed}" / method.replace(" ", "_").replace(",", ""), METHODS[method]
    if (folder / "cell.json").exists():
        return
    single = loss["name"] in ("kto", "bco")
    recipe = {
        "model": {"path": model},
        "data": pairs,
        "loss": loss,
        "train": {"epochs": EPOCHS, "batch_size": BATCH * (2 if single else 1)},
        "optimizer": {"lr": LEARNING_RATE, "schedule": "linear", "warmup": 0.1},
        "samples": {"prompts": 64, "max_new_tokens": NEW_TOKENS, "eos_token_id": ENDS[task]},
        "run": {"eval_every": 20, "save_every": 1000},
    }
    module, kind = (feedback, feedback.RECIPES[loss["name"]]) if single else (preference, preference.PreferenceRecipe)
    began = time.process_time()
    summary = verb(module, kind, folder, seed, recipe)
    seconds = time.process_time() - began
    looks = [row for row in rows_of(folder) if "held_out/kl" in row]
    good, bad = ("liked", "disliked") if single else ("chosen", "rejected")
    told = {
        "kl": summary["held_out/kl"],
        "perplexity": summary["held_out/perplexity"],
        "right": summary["held_out/auc" if single else "held_out/accuracy"],
        **{
            f"drift {side}": looks[-1][f"held_out/logp/{side}"] - looks[0][f"held_out/logp/{side}"]
            for side in (good, bad)
        },
        "seconds": seconds,
        **judged(task, summary["model"], pairs, judge),
    }
    for side, name in ((good, "chosen"), (bad, "rejected")):
        told[f"drift {name}"] = told.pop(f"drift {side}")
    findings = [json.loads(x) for x in read(folder / "health.jsonl")]
    told["findings"] = [f"{f['code']} at step {f['step']}" for f in findings]
    write_atomic(folder / "cell.json", json.dumps(told, indent=1))


def judged(task: str, model: str, pairs: dict[str, Any], judge: dict[str, Any]) -> dict[str, Any]:
    """The judge's mean score of two answers to each of 64 held prompts, their variety and length, and examples."""
    device = torch.device("cpu")
    policy = policy_from(ModelConfig(path=model), RunConfig(), device, trainable=False)
    config = DataConfig.model_validate(pairs)
    queries = {str(q.prompt): q for q in prompts(config).held_out}
    laid = layout(policy.tokenizer, config)
    asked, _, _ = encode_prompts(list(queries.values()), laid, config, 512, NEW_TOKENS)
    rollout = RolloutConfig(max_new_tokens=NEW_TOKENS, eos_token_id=ENDS[task])
    samples = open_generator(rollout, policy).generate(asked[:64], rollout.sampling(), n=2, seed=7)
    reward = build_reward(RewardConfig.model_validate({"parts": {"judge": judge}}), policy.tokenizer, device)
    score = reward.score(samples).total
    texts = [s.text for s in samples]
    return {
        "reward": float(score.mean()),
        "reward error": float(score.std() / len(score) ** 0.5),
        "distinct2": sum(BUILTINS["distinct_n"](prompts=[""], completions=[" ".join(texts)])),
        "length": sum(len(s.ids) for s in samples) / len(samples),
        "examples": [[s.prompt.text, s.text, round(float(r), 2)] for s, r in zip(samples, score, strict=True)][::32],
    }


def read(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def run(data: Path, out: Path, tasks: list[str], seeds: list[int], minutes: float, only: list[str]) -> None:
    """Makes the cells that are missing, task by task and seed by seed."""
    began = time.process_time()
    for task in tasks:
        model, pairs, judge = start(task, data, out / task)
        before = out / task / "before.json"
        if not before.exists():
            write_atomic(before, json.dumps(judged(task, model, pairs, judge), indent=1))
        for seed in seeds:
            for method in only or METHODS:
                if time.process_time() - began > 60 * minutes:
                    print("time is up; the same command goes on")
                    return
                cell(task, method, seed, model, pairs, judge, out / task)


COLUMNS = ("reward", "kl", "perplexity", "drift chosen", "drift rejected", "right", "distinct2", "length")


def table(out: Path, docs: Path) -> None:
    """Writes preference.json and the picture, and prints the tables."""
    found: dict[str, Any] = {"learning rate": LEARNING_RATE, "epochs": EPOCHS, "batch": BATCH}
    for task in ("sentiment", "politeness"):
        folder = out / task
        if not (folder / "before.json").exists():
            continue
        found[task] = {"before": json.loads((folder / "before.json").read_text())}
        if (judge := finished(folder / "judge")) is not None:
            found[task]["judge"] = judge
        print(f"\n| {task} | {' | '.join(COLUMNS)} | falls |\n|{' --- |' * (len(COLUMNS) + 2)}")
        for method in METHODS:
            name = method.replace(" ", "_").replace(",", "")
            cells = [json.loads(f.read_text()) for f in sorted(folder.glob(f"seed-*/{name}/cell.json"))]
            if not cells:
                continue
            row = {key: over_seeds([c[key] for c in cells]) for key in (*COLUMNS, "seconds")}
            falls = sum(any(f.startswith("chosen_falls") for f in c["findings"]) for c in cells)
            found[task][method] = row | {"falls": falls, "cells": cells}
            numbers = [shown(row[key]) for key in COLUMNS]
            print(f"| {method} | {' | '.join(numbers)} | {falls} of {len(cells)} |")
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "preference.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, docs / "preference.png")


def shown(value: dict[str, Any]) -> str:
    spread = f" ± {value['sd']:.2f}" if len(value["values"]) > 1 else ""
    return f"{value['mean']:.2f}{spread}"


def draw(found: dict[str, Any], file: Path) -> None:
    """Reward against KL, and how far both likelihoods went, per task."""
    import matplotlib.pyplot as plt

    tasks = [t for t in ("sentiment", "politeness") if t in found]
    figure, axes = plt.subplots(len(tasks), 2, figsize=(14, 6.5 * len(tasks)), layout="constrained", squeeze=False)
    for line, task in zip(axes, tasks, strict=True):
        rows = {m: found[task][m] for m in METHODS if m in found[task]}
        line[0].set_xscale("log")
        for scale in (line[1].set_xscale, line[1].set_yscale):
            scale("symlog", linthresh=10)
        for axis, x, y, title in (
            (line[0], "kl", "reward", f"{task}: judge's score against KL, nats per response"),
            (line[1], "drift chosen", "drift rejected", f"{task}: how far log pi moved on held-out pairs, nats"),
        ):
            plain_axes(axis, title)
            spots = {method: (row[x]["mean"], row[y]["mean"]) for method, row in rows.items()}
            for method, spot in spots.items():
                axis.plot(*spot, "o", ms=4, color="#c2571a" if rows[method]["falls"] else "#1f5f8b")
            axis.margins(0.12)
            axis.set_xlabel(x, fontsize=8)
            axis.set_ylabel(y, fontsize=8)
            name_spots(figure, axis, spots)
        line[0].axhline(found[task]["before"]["reward"], color="#888888", lw=0.8, ls=":")
        line[1].axvline(0, color="#888888", lw=0.8, ls=":")
    figure.savefig(file, dpi=110)


def name_spots(figure: Any, axis: Any, spots: dict[str, tuple[float, float]]) -> None:
    """Each spot's name where no other name or spot is, nearest places first; a thin line leads to one further off."""
    figure.canvas.draw()
    pixels, inside = figure.dpi / 72, axis.bbox
    at = {name: axis.transData.transform(spot) for name, spot in spots.items()}
    taken = [Bbox.from_bounds(*(place - 4), 8, 8) for place in at.values()]
    offsets = [
        (radius * math.cos(angle), radius * math.sin(angle))
        for radius in range(6, 150, 6)
        for angle in np.linspace(0.2, 0.2 + 2 * math.pi, 20, endpoint=False)
    ]
    for name, spot in spots.items():
        told = axis.annotate(
            name, spot, fontsize=7, xytext=offsets[0], textcoords="offset points", va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#888888", "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip
        told.set_in_layout(False)
        size = Text.get_window_extent(told, figure.canvas.get_renderer())
        for x, y in offsets:
            left = at[name][0] + x * pixels - (size.width if x < 0 else 0)
            box = Bbox.from_bounds(left, at[name][1] + y * pixels - size.height / 2, size.width, size.height)
            free = not any(box.overlaps(other) for other in taken)
            if free and inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1):
                told.set_position((x, y))
                told.set_ha("right" if x < 0 else "left")
                taken.append(box.padded(1))
                break


def main() -> None:
    parser = options(__doc__, ("run", "table"), "runs/preference", seeds=[0], minutes=60.0)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--tasks", nargs="+", default=["sentiment", "politeness"])
    parser.add_argument("--methods", nargs="*", default=[])
    args = parser.parse_args()
    set_threads(1)
    if args.what == "run":
        run(args.data, args.out, args.tasks, args.seeds, args.minutes, args.methods)
    else:
        table(args.out, args.docs)


if __name__ == "__main__":
    main()
