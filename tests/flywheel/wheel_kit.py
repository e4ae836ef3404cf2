"""Recipes of the loops on a mini model, and what two runs are compared by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from letter_models import WORDS, rows_of, write_jsonl
from safetensors.torch import load_file


def loop_settings(folder: Path, model: Path, run: str, **extra: Any) -> dict[str, Any]:
    """12 prompts, 3 of them held out; 2 rounds of 4 prompts; the judge counts the letter a."""
    data = write_jsonl(folder / "prompts.jsonl", [{"prompt": w} for w in WORDS])
    (folder / "rewards.py").write_text(
        "def count_a(prompts, completions):\n    return [float(c.count('a') - c.count('e')) for c in completions]\n"
    )
    return {
        "model": {"path": str(model)},
        "data": {"path": str(data)},
        "judge": {"reward": {"a": {"function": f"{folder / 'rewards.py'}:count_a"}}},
        "watch": {"words": {"builtin": "length"}},
        "rollout": {"prompts": 4, "samples": 3, "max_new_tokens": 10, "held_out": 3, "max_batch": 1},
        "unfinished": "keep",
        "rounds": 2,
        "run": {"dir": str(folder / run), "threads": 1, "save_every": 1, "eval_every": 1},
        **extra,
    }


def left(run: Path) -> dict[str, Any]:
    """All data, provenance, weights and numbers that a run left; times and absolute paths aside."""
    out: dict[str, Any] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = str(path.relative_to(run))
        inside_stage = any((folder / "config.yaml").exists() for folder in path.parents if folder != run)
        if path.name == "metrics.jsonl":
            timed = ("seconds", "time/", "throughput")
            out[name] = [{k: v for k, v in r.items() if not k.startswith(timed)} for r in rows_of(path)]
        elif path.suffix == ".safetensors":
            out[name] = {k: x.tolist() for k, x in load_file(path).items()}
        elif path.name == "inputs.json":
            out[name] = {key: list(paths.values()) for key, paths in json.loads(path.read_text()).items()}
        elif (path.suffix in (".jsonl", ".json") and not inside_stage) and path.name != "summary.json":
            out[name] = path.read_text()
        elif path.suffix == ".parts" or path.name.startswith(".tmp-"):
            out[name] = "left over"
    return out
