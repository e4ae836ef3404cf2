"""Run folders as runs leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HOSTILE = "<script>document.title='owned'</script> \u202e"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def some_runs(root: Path) -> None:
    """A run of grpo with three looks at two held-out prompts, and a wheel with one round."""
    run = root / "grpo"
    data = root.parent / "train.jsonl"
    write_rows(data, [{"prompt": "trained on", "chosen": "this", "rejected": "that"}])
    values = {0: 0.1, 5: 0.4, 10: 0.6}
    write_rows(
        run / "metrics.jsonl",
        [
            {"step": step, "seconds": 1.0, "loss/policy": 0.5, "held_out/reward/total": values.get(step)}
            for step in range(11)
        ],
    )
    write_rows(
        run / "samples.jsonl",
        [
            {
                "step": step, "index": i, "prompt": prompt, "completion": f"answer {step} to {prompt} {HOSTILE}",
                "reward": {"total": round(value - i, 2)},
            }
            for step, value in values.items()
            for i, prompt in enumerate(("one", "two"))
        ],
    )  # fmt: skip
    with (run / "samples.jsonl").open("a") as file:
        file.write("[" * 5000 + "\n3\n{half")
    (run / "inputs.json").write_text(json.dumps({"data.path": {str(data): "0"}}))
    wheel = root / "wheel"
    write_rows(wheel / "metrics.jsonl", [{"step": 1, "human/accuracy": 0.61, "length": 1.1, "win_rate": 0.6}])
    write_rows(wheel / "round-01/readings.jsonl", [{"id": "j-1", "answer": 0, "logp": -3.0}])
    write_rows(wheel / "round-01/answers-candidate.jsonl", [{"prompt": "one", "completion": "the candidate's"}])
    write_rows(wheel / "round-01/collected.jsonl", [{"prompt": "one", "answers": ["a", "b"], "choice": "first"}])
