"""Distillation of a model into its own first layers, beside fine-tuning on the same data for the same CPU time.

    python tools/results/distillation.py run --data ../shared/data --out runs/distillation
    python tools/results/distillation.py table --out runs/distillation

`run` cuts the student out of the teacher, measures for every arm how long an update takes, trains each for
`--seconds` of that time, and measures all students in the same way. Cells that are there already are not made again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from recording import options, verb

from steersman.assets import story_model
from steersman.data import Encoded, collate
from steersman.distill import run as distill
from steersman.distill.objective import Distillation
from steersman.distill.recipe import DistillLoss, DistillRecipe
from steersman.distill.teacher import Answer, LocalTeacher
from steersman.jsonl import jsonl_text, read_jsonl
from steersman.model import Policy, load_policy
from steersman.ops.masked import masked_sum
from steersman.rollout import Engine, Sampling
from steersman.types import Prompt
from steersman.verbs import rl, sft
from steersman.verbs.on_policy_recipes import RECIPES

OPENING, REST, NEW = 8, 40, 56
"""Words of a prompt, words of a given answer, and tokens of the student's own."""
HELD, OWN = 200, 64
"""Held-out stories, and how many of their openings are answered."""
ARMS: dict[str, dict[str, Any]] = {
    "fine-tuning": {},
    "forward KL, given answers": {"loss": {"name": "forward_kl"}, "train": {"on_policy": 0.0}},
    "forward KL + likelihood, given answers": {
        "loss": {"name": "forward_kl", "nll": 1.0}, "train": {"on_policy": 0.0},
    },
    "reverse KL, own answers": {"loss": {"name": "reverse_kl"}, "train": {"on_policy": 1.0}},
    "JSD, half own answers": {"loss": {"name": "jsd"}, "train": {"on_policy": 0.5}},
    "GRPO, the teacher's likelihood": {},
}  # fmt: skip


def stem_of(name: str) -> str:
    """An arm's name as the beginning of its files' names."""
    return name.replace(" ", "-").replace(",", "").replace("+", "and").replace("'", "")


def main() -> None:
    parser = options(__doc__, ("run", "table"), "runs/distillation")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--teacher", type=Path, default=story_model())
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    if args.what == "table":
        print(table(args.out))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    rows = stories(args.data / "tinystories", args.out)
    student = first_layers(args.teacher, args.layers, args.out / "student")
    measured(args.out / "start.json", student, args.teacher, rows[1])
    for name, extra in ARMS.items():
        folder = args.out / stem_of(name)
        pace = folder.with_suffix(".pace.json")
        values = settings(student, args, rows[0])
        if not pace.exists():
            pace.write_text(json.dumps(seconds_per_update(folder.with_suffix(".pilot"), name, values, extra)))
        steps = max(1, round(args.seconds / json.loads(pace.read_text())))
        for seed in args.seeds:
            run = train(folder.with_suffix(f".{seed}"), name, values, extra, seed, steps)
            found = measured(folder.with_suffix(f".{seed}.json"), run / "model", args.teacher, rows[1], steps)
            print(f"{name}, seed {seed}: {steps} updates, {found['loss']:.3f} nats, KL {found['kl']:.2f}", flush=True)


def stories(folder: Path, out: Path) -> tuple[Path, Path]:
    """Openings with what follows, in two files: to train on, and held out."""
    texts = " ".join(p.read_text(encoding="utf-8") for p in sorted(folder.glob("*.txt"))).split("<|endoftext|>")
    words = [w for w in (t.split() for t in texts) if len(w) >= OPENING + REST]
    rows = [
        {"prompt": " ".join(w[:OPENING]), "completion": " " + " ".join(w[OPENING : OPENING + REST])} for w in words
    ]
    files = out / "train.jsonl", out / "held.jsonl"
    for file, part in zip(files, (rows[HELD:], rows[:HELD]), strict=True):
        file.write_text(jsonl_text(part))
    return files


def first_layers(teacher: Path, layers: int, out: Path) -> Path:
    """The teacher with its first layers alone, the other weights as they are."""
    if not (out / "config.json").exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(teacher).save_pretrained(out)
    return out


def settings(student: Path, args: Any, rows: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(student)},
        "teacher": {"path": str(args.teacher)},
        "data": {"path": str(rows), "append_eos": False, "wrap_in_chat": False},
        "rollout": {"max_new_tokens": NEW, "held_out": 0},
        "optimizer": {"lr": args.lr, "warmup": 0.05, "schedule": "linear"},
        "train": {"batch_size": args.batch, "epochs": 1000},
        "run": {"eval_every": 10**6, "save_every": 10**6},
        "health": {"expect_eos": False},
    }


def train(folder: Path, name: str, values: dict[str, Any], extra: dict[str, Any], seed: int, steps: int) -> Path:
    """The run of one arm and seed, made now or found there."""
    training = {**values["train"], **extra.get("train", {}), "max_steps": steps}
    if name == "fine-tuning":
        kept = {k: v for k, v in values.items() if k not in ("teacher", "rollout")}
        verb(sft, sft.SFTRecipe, folder, seed, {**kept, "train": training})
    elif name.startswith("GRPO"):
        verb(rl, RECIPES["grpo"], folder, seed, rewarded(values, steps))
    else:
        verb(distill, DistillRecipe, folder, seed, {**values, **extra, "train": training})
    return folder


def rewarded(values: dict[str, Any], steps: int) -> dict[str, Any]:
    """GRPO on the student's own answers to the same openings, paid by their likelihood under the teacher."""
    likely = {
        "metric": "perplexity", "weight": -1.0, "empty": 10.0,
        "args": {"path": values["teacher"]["path"], "unit": "nats", "after": "source", "device": "cpu"},
    }  # fmt: skip
    batch = values["train"]["batch_size"]
    kept = {k: values[k] for k in ("model", "data", "optimizer", "run", "health")}
    return {
        **kept, "reward": {"parts": {"likely": likely}}, "iterations": steps, "algorithm": {"beta": 0.0},
        "rollout": {**values["rollout"], "prompts": max(batch // 4, 1), "samples": 4},
    }  # fmt: skip


def seconds_per_update(folder: Path, name: str, values: dict[str, Any], extra: dict[str, Any]) -> float:
    """CPU time of an update: that of a run of 14 less that of a run of 4, models loaded and saved in both."""
    took = []
    for steps in (4, 14):
        before = time.process_time()
        train(folder.with_suffix(f".{steps}"), name, values, extra, 0, steps)
        took.append(time.process_time() - before)
    return max((took[1] - took[0]) / 10, 1e-3)


@torch.no_grad()
def measured(file: Path, model: Path, teacher: Path, held: Path, steps: int = 0) -> dict[str, Any]:
    """Held-out loss (nats per token) and KL(student || teacher) of own answers (nats per answer), row by row."""
    if file.exists():
        return json.loads(file.read_text())
    student, master = (load_policy(str(p), trainable=False) for p in (model, teacher))
    rows = read_jsonl(held)
    ids = [[student.tokenizer.encode(r[k], add_special_tokens=k == "prompt") for k in ("prompt", "completion")]
           for r in rows]  # fmt: skip
    total, count = [], []
    for i in range(0, len(ids), 20):
        tokens = collate([Encoded(p, c, [True] * len(c)) for p, c in ids[i : i + 20]])
        total += masked_sum(student.logp(tokens).logp, tokens.mask, -1).neg().tolist()
        count += tokens.response_length.tolist()
    kl = own_answers(student, master, [p for p, _ in ids[:OWN]])
    found = {"steps": steps, "nll": total, "tokens": count, "kl_rows": kl.tolist(), "kl": float(kl.mean()),
             "loss": sum(total) / sum(count)}  # fmt: skip
    file.write_text(json.dumps(found))
    return found


def own_answers(student: Policy, teacher: Policy, prompts: list[list[int]]) -> torch.Tensor:
    asked = [Prompt(p, student.tokenizer.decode(p), index=i) for i, p in enumerate(prompts)]
    samples = Engine(student.model, student.tokenizer).generate(asked, Sampling(max_new_tokens=NEW), seed=1)
    answers = [Answer(s.prompt.ids, s.ids, [True] * len(s.ids), s.prompt.ids, i) for i, s in enumerate(samples)]
    compared = Distillation(student, LocalTeacher(teacher, "teacher"), DistillLoss(), limit=NEW)
    return torch.cat(
        [compared.answer_divergence(answers[i : i + 16], "reverse_kl") for i in range(0, len(answers), 16)]
    )


def table(out: Path) -> str:
    """Means over seeds; intervals are 95%, over held-out stories, of the difference to fine-tuning row by row."""
    head = [
        "",
        "updates",
        "held-out loss, nats per token",
        "less fine-tuning's",
        "KL to the teacher, nats per answer",
    ]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- | --- | --- | --- |"]
    start = json.loads((out / "start.json").read_text())
    lines.append(f"| start | 0 | {start['loss']:.3f} | | {_interval(torch.tensor(start['kl_rows']))} |")
    base = None
    for name in ARMS:
        stem = stem_of(name)
        found = [json.loads(f.read_text()) for f in sorted(out.glob(f"{stem}.[0-9].json"))]
        if not found:
            continue
        tokens = torch.tensor(found[0]["tokens"], dtype=torch.float64)
        nll = torch.tensor([f["nll"] for f in found], dtype=torch.float64).mean(0)
        kl = torch.tensor([f["kl_rows"] for f in found], dtype=torch.float64).mean(0)
        lead = ""
        if base is None:
            base = nll
        else:  # of a ratio of sums: the rows' residuals over the mean length
            change = (nll - base).sum() / tokens.sum()
            error = ((nll - base) - change * tokens).std() / tokens.mean() / len(tokens) ** 0.5
            lead = f"{change:+.3f} ± {1.96 * error:.3f}"
        loss = nll.sum() / tokens.sum()
        lines.append(f"| {name} | {found[0]['steps']} | {loss:.3f} | {lead} | {_interval(kl)} |")
    return "\n".join(lines)


def _interval(rows: torch.Tensor) -> str:
    return f"{rows.mean():.2f} ± {1.96 * rows.std() / len(rows) ** 0.5:.2f}"


if __name__ == "__main__":
    main()
