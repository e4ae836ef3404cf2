"""A real chat model trained by steersman and by TRL on the same rows with the same settings, judged by the same code.

    python tools/results/chat/study.py run --model MODEL --data ../shared/data --peer PYTHON_WITH_TRL --out runs/chat
    python tools/results/chat/study.py page --out runs/chat --docs docs/results

`run` makes the cells that are missing, in the order of `--tasks`, `--sides` and `--seeds`, and begins no further cell
after `--minutes`; the same command goes on. A cell is trained in a process of its own, whose processor time and peak
memory are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from recording import finished
from tasks import LOSSES, QUIET, TASKS, last_number, write_rows

from steersman.atomic import write_atomic
from steersman.jsonl import read_jsonl
from steersman.metrics import metric
from steersman.recipe.sections import ModelConfig, RolloutConfig
from steersman.reward import RewardConfig, build_reward
from steersman.reward.rules import BUILTINS
from steersman.run.device import set_threads
from steersman.run.run_config import RunConfig
from steersman.setup.generators import open_generator
from steersman.setup.models import policy_from
from steersman.types import Prompt, Sample

HERE = Path(__file__).parent
OPTIMIZER = {"weight_decay": 0.0, "max_grad_norm": 1.0}
REWARDS = {
    "sums": {"function": f"{HERE / 'tasks.py'}:last_number"}, "rules": {"metric": "ifeval"},
    "gsm8k": {"builtin": "math_answer"},
}  # fmt: skip


def recipe(task: str, method: str, seed: int, model: str, table: Path, folder: Path) -> tuple[str, dict[str, Any]]:
    """The verb and its recipe."""
    s = TASKS[task]
    run = {"dir": str(folder / "run"), "seed": seed, "threads": 1, "save_every": 1_000_000}
    values: dict[str, Any] = {"model": {"path": model}, "data": {"path": str(table), "held_out": 0}, "run": run}
    if method == "grpo":
        reward = REWARDS[task]
        return "grpo", values | {
            "reward": {"parts": {"task": reward}}, "iterations": s["iterations"],
            "rollout": {
                "prompts": s["prompts"], "samples": s["samples"], "max_new_tokens": s["new_tokens"],
                "temperature": s["temperature"], "held_out": 0,
            },
            "algorithm": {"beta": s["beta"], "clip_low": s["clip"], "clip_high": s["clip"]},
            "optimizer": {"lr": s["lr"], "schedule": "constant", **OPTIMIZER},
        }  # fmt: skip
    values["data"] |= {"max_length": s["max_length"], "on_too_long": "drop"}
    if method == "sft":
        values["data"]["columns"] = {"completion": "chosen"}
    batch = s["batch"] * (2 if method == "kto" else 1)
    optimizer = {
        "lr": s["lr"],
        "schedule": "linear",
        "warmup": s["warmup"],
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }
    values |= {"train": {"epochs": 1, "batch_size": batch}, "optimizer": optimizer}
    settings = {{"gamma": "margin"}.get(key, key): value for key, value in LOSSES[method].items()}
    if method == "kto":
        values["loss"] = settings
    elif method != "sft":
        values["loss"] = {"name": method, "settings": settings}
    return {"sft": "sft", "kto": "kto"}.get(method, "dpo"), values


def train(command: Sequence[str], folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Runs a cell's training in a process of its own: processor seconds, peak memory in MiB, where its output is."""
    with (folder / "output.txt").open("a") as output:
        child = subprocess.Popen(
            [*command], stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
        _, status, used = os.wait4(child.pid, 0)
    if status != 0:
        raise SystemExit(f"{folder}: the training ended with {os.waitstatus_to_exitcode(status)}; see output.txt")
    return {"processor_seconds": used.ru_utime + used.ru_stime, "peak_mib": used.ru_maxrss / 1024}


def ours(task: str, method: str, seed: int, args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], Path]:
    verb, values = recipe(task, method, seed, str(args.model), args.out / f"{task}.train.jsonl", folder)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    resume = ["--resume"] if (folder / "run").exists() else []
    used = train([sys.executable, "-m", "steersman", verb, str(file), *resume], folder, {})
    return used, Path((finished(folder / "run") or {})["model"])


def peer(task: str, method: str, seed: int, args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], Path]:
    table = args.out / f"{task}.train.jsonl"
    command = [args.peer, HERE / "cell_trl.py", task, method, seed, args.model, table, folder]
    used = train([str(x) for x in command], folder, QUIET | {"PYTHONPATH": str(HERE.parents[2] / "src")})
    return used, folder / "model"


SIDES = {"steersman": ours, "trl": peer}


def curve(side: str, method: str, folder: Path) -> list[float]:
    """Mean reward (or loss) of each iteration's own samples, as the side logged it."""
    key = "reward/total" if method == "grpo" else "loss"
    if side == "steersman":
        rows = read_jsonl(folder / "run/metrics.jsonl")
    else:
        rows, key = json.loads((folder / "log.json").read_text()), "reward" if method == "grpo" else "loss"
    return [row[key] for row in rows if key in row]


def answers(task: str, model: Path, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Sample], Any]:
    """Held-out rows, the model's answers (four to each at the training temperature, or one greedy), its tokenizer."""
    rows = read_jsonl(args.out / f"{task}.held_out.jsonl")
    policy = policy_from(ModelConfig(path=str(model)), RunConfig(), torch.device("cpu"), trainable=False)
    tokenizer, s = policy.tokenizer, TASKS[task]
    prompts = []
    for index, row in enumerate(rows):
        turns = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompts.append(Prompt(tokenizer(text, add_special_tokens=False)["input_ids"], text, row, index))
    rollout = RolloutConfig(max_new_tokens=s["new_tokens"], temperature=s.get("temperature", 1.0))
    count = 1 if task == "polite" else 4
    sampling = rollout.sampling().as_greedy() if task == "polite" else rollout.sampling()
    samples = open_generator(rollout, policy).generate(prompts, sampling, n=count, seed=1000)
    return [row for row in rows for _ in range(count)], samples, tokenizer


def judged(task: str, model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The task's scores of the model's held-out answers, with examples to read."""
    rows, samples, tokenizer = answers(task, model, args)
    texts = [sample.text for sample in samples]
    result: dict[str, Any] = {"words": float(np.mean([len(t.split()) for t in texts]))}
    result["distinct_2"] = sum(BUILTINS["distinct_n"](prompts=[""], completions=[" ".join(texts)]))
    if task == "polite":
        result |= polite_scores(rows, samples, tokenizer, args)
    else:
        scores = np.array(task_scores(task, rows, texts)).reshape(-1, 4)
        best = scores.max(axis=1)
        result["pass@1"], result["pass@1 error"] = float(scores.mean()), error(scores.mean(axis=1))
        result["pass@4"], result["pass@4 error"] = float(best.mean()), error(best)
    shown = range(0, len(texts), max(1, len(texts) // 8))
    return result | {"examples": [[rows[i]["prompt"], texts[i]] for i in shown]}


def error(values: np.ndarray) -> float:
    """Standard error of the mean over prompts."""
    return float(values.std(ddof=1) / len(values) ** 0.5)


def task_scores(task: str, rows: list[dict[str, Any]], texts: list[str]) -> list[float]:
    if task == "sums":
        return last_number(texts, [row["answer"] for row in rows])
    if task == "gsm8k":
        return BUILTINS["math_answer"](prompts=texts, completions=texts, answer=[row["answer"] for row in rows])
    columns = {name: [row[name] for row in rows] for name in ("instruction_id_list", "kwargs")}
    return metric("ifeval").score(texts, **columns)


def polite_scores(
    rows: list[dict[str, Any]], samples: list[Sample], tokenizer: Any, args: argparse.Namespace
) -> dict[str, Any]:
    """The judge's mean score, and ROUGE-L against the plain answer, which nobody optimised."""
    parts = {"parts": {"judge": {"model": str(judge(args))}}}
    reward = build_reward(RewardConfig.model_validate(parts), tokenizer, torch.device("cpu"))
    scores = reward.score(samples).total.numpy()
    rouge = np.array(metric("rougeL").score([s.text for s in samples], [row["plain"] for row in rows]))
    return {
        "judge": float(scores.mean()), "judge error": error(scores),
        "rouge_l": float(rouge.mean()), "rouge_l error": error(rouge),
    }  # fmt: skip


def judge(args: argparse.Namespace) -> Path:
    """A reward model trained on pairs of their own, the last 80 held out; made once."""
    folder = args.out / "judge"
    if (summary := finished(folder / "run")) is None:
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            "model": {"path": str(args.model)}, "run": {"dir": str(folder / "run"), "seed": 100, "threads": 1},
            "data": {"path": str(args.out / "polite.judge.jsonl"), "held_out": 80, "max_length": 256},
            "train": {"epochs": 1, "batch_size": 8}, "optimizer": {"lr": 2e-5, "schedule": "linear", "warmup": 0.1},
        }  # fmt: skip
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
        resume = ["--resume"] if (folder / "run").exists() else []
        train([sys.executable, "-m", "steersman", "reward", str(folder / "recipe.yaml"), *resume], folder, {})
        summary = finished(folder / "run")
    return Path((summary or {})["model"])


def run(args: argparse.Namespace) -> None:
    """Makes the cells that are missing."""
    began = time.monotonic()
    write_rows(args.data, args.out)
    for task in args.tasks:
        start = args.out / task / "start.json"
        if not start.exists():
            start.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(start, json.dumps(judged(task, args.model, args), indent=1))
        for seed in args.seeds:
            for side in args.sides:
                for method in TASKS[task]["methods"]:
                    folder = args.out / task / side / f"{method}-{seed}"
                    if (folder / "cell.json").exists() or (args.methods and method not in args.methods):
                        continue
                    if time.monotonic() - began > 60 * args.minutes:
                        print("time is up; the same command goes on")
                        return
                    folder.mkdir(parents=True, exist_ok=True)
                    print(f"{task}: {method} by {side}, seed {seed}", flush=True)
                    used, model = SIDES[side](task, method, seed, args, folder)
                    cell = used | {"curve": curve(side, method, folder)} | judged(task, model, args)
                    write_atomic(folder / "cell.json", json.dumps(cell, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--model", type=Path, help="the folder of the chat model")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--peer", help="a Python that has TRL")
    parser.add_argument("--out", type=Path, default=Path("runs/chat"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    args = parser.parse_args()
    set_threads(1)
    if args.what == "run":
        run(args)
    else:
        from page import write_page

        write_page(args.out, args.docs)


if __name__ == "__main__":
    main()
