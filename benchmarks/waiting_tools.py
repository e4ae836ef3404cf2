"""Episodes whose tools wait 50 to 500 ms beside the same episodes without waiting, in one process, alternating.

    python benchmarks/waiting_tools.py [--episodes 256] [--rows 64] [--new 24] [--steps 64] [--repeats 3] [--json out]

Every episode has 2 to 6 turns; a turn is at most `--new` tokens of a Llama-style model of 5 million random weights.
How long a tool waits is drawn per episode and turn, so all sides play the same episodes. Printed are policy tokens
per second: without waiting, with it while turns join the running batch (`environment.overlap`), the same where an
episode may speak again after `--steps` steps of decoding (`overlap_steps`), and with it turn by turn. The first round
warms up and is not counted. `--page` puts the shares into docs/results/environments.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import build_model, build_tokenizer

from steersman.data import Layout
from steersman.environments.config import EnvironmentConfig, open_environment
from steersman.environments.runner import Episodes
from steersman.rollout import Engine, Sampling
from steersman.types import Prompt

TOOL = '''
import random, time

class Waiting:
    """Answers after a while, for some turns."""

    def __init__(self, waits):
        self.waits = waits

    def begin(self, row, seed=0):
        self.luck = random.Random(seed)
        self.left = self.luck.randint(2, 6)
        return None

    def step(self, text):
        pause = self.luck.uniform(0.05, 0.5)
        if self.waits:
            time.sleep(pause)
        self.left -= 1
        return "t7 t8 t9", 0.0, self.left == 0
'''
SIDES = {
    "no waiting": (False, True, 0),
    "joining": (True, True, 0),
    "joining, with steps between": (True, True, 1),
    "turn by turn": (True, False, 0),
}
"""Whether tools wait, whether turns join the batch, and how often `--steps` pass between the turns of an episode."""


def episodes(
    engine: Engine, tokenizer: Any, tool: Path, waits: bool, overlap: bool, steps: int, count: int
) -> Episodes:
    config = EnvironmentConfig(
        path=f"{tool}:Waiting", args={"waits": waits}, overlap=overlap, overlap_steps=steps, workers=count,
        max_tokens=400,
    )  # fmt: skip
    layout = Layout(tokenizer, wrap_in_chat=False)
    return Episodes(engine, open_environment(config), layout, engine.end_ids, config, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="docs/results/environments.md, whose table is filled in")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = build_model("llama5m").eval(), build_tokenizer(4096)
    luck = random.Random(0)
    prompts = [Prompt([luck.randrange(4, 4096) for _ in range(16)], "", {}, i) for i in range(args.episodes)]
    for prompt in prompts:
        prompt.turns = [{"role": "user", "content": tokenizer.decode(prompt.ids)}]
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    said: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        tool = Path(folder) / "tool.py"
        tool.write_text(TOOL)
        engine = Engine(model, tokenizer, max_batch=args.rows)
        for repeat in range(args.repeats + 1):  # the first warms up
            for side, (waits, overlap, apart) in SIDES.items():
                play = episodes(engine, tokenizer, tool, waits, overlap, apart * args.steps, args.episodes)
                start = time.monotonic()
                samples = play.generate(prompts, Sampling(args.new), seed=1)
                speed = sum(sum(s.mask or []) for s in samples) / (time.monotonic() - start)
                said[side] = [(s.ids, s.logp) for s in samples]
                if repeat:
                    speeds[side].append(speed)
                    print(f"{repeat}  {side:28} {speed:8.0f} tokens/s", flush=True)
    base = statistics.median(speeds["no waiting"])
    out = {
        side: {"tokens/s": statistics.median(x), "of no waiting": statistics.median(x) / base}
        for side, x in speeds.items()
    }
    out["same bits with and without waiting"] = said["no waiting"] == said["joining"]
    print(json.dumps(out, indent=1))
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "page")}
    if args.json:
        args.json.write_text(json.dumps({"settings": settings, "speeds": speeds, **out}, indent=1) + "\n")
    if args.page:
        write_rows(args.page, args.new, {side: out[side]["of no waiting"] for side in SIDES if side != "no waiting"})


def write_rows(page: Path, new: int, shares: dict[str, float]) -> None:
    """Replaces the column of `new` tokens a turn in the page's table of shares."""
    lines, name = page.read_text().splitlines(), f"{new} tokens a turn"
    head = next(i for i, line in enumerate(lines) if line.startswith("| share of the speed without waiting"))
    column = [cell.strip() for cell in lines[head].split("|")].index(name)
    for i in range(head + 2, len(lines)):
        cells = [cell.strip() for cell in lines[i].split("|")]
        if len(cells) <= column:
            break
        if cells[1] in shares:
            cells[column] = f"{shares[cells[1]]:.2f}"
            lines[i] = " | ".join(cells).strip()
    page.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
