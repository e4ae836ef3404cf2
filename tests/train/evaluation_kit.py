"""A section `evaluation` over rows of letters: two metrics of answers, and a task of lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from letter_models import WORDS, write_jsonl

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: ["a cat", "no", "dog"]
metric_list:
  - metric: acc
"""


def evaluation(folder: Path) -> dict[str, Any]:
    rows = [{"prompt": word, "completion": f"{word[-1]} is a"} for word in WORDS]
    asked = [{"question": word, "answer": i % 3} for i, word in enumerate(WORDS)]
    (folder / "tasks").mkdir(exist_ok=True)
    file = write_jsonl(folder / "tasks/rows.jsonl", asked)
    (folder / "tasks/letters.yaml").write_text(TASK.replace("ROWS", json.dumps(str(file))))
    return {
        "data": {"path": str(write_jsonl(folder / "asked.jsonl", rows))}, "max_new_tokens": 6,
        "metrics": {"chrf": {"columns": {"references": "completion"}}, "letters": {"metric": "length"}},
        "harness": {"tasks": ["letters"], "include": str(folder / "tasks")},
    }  # fmt: skip
