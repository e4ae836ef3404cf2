"""Rows in the order in which TRL's GRPO draws its prompts, run by the Python of an environment that has it.

PYTHON tools/results/chat/trl_order.py ROWS SEED COUNT > OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from tasks import GRPO
from trl.trainer.utils import RepeatSampler


def main() -> None:
    path, seed, count = sys.argv[1:]
    rows = Path(path).read_text().rstrip("\n").split("\n")
    samples = GRPO["samples"]
    sampler = RepeatSampler(rows, mini_repeat_count=samples, batch_size=GRPO["prompts"], shuffle=True, seed=int(seed))
    order: list[int] = []
    while len(order) < int(count):
        order += list(sampler)[::samples]
    print("\n".join(rows[i] for i in order[: int(count)]))


if __name__ == "__main__":
    main()
