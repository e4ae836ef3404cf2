"""Episodes whose tools wait 50 to 500 ms beside the same episodes without waiting, in one process, alternating.

    python benchmarks/waiting_tools.py [--episodes 256] [--rows 64] [--new 24] [--repeats 3] [--json out.json]

Every episode has 2 to 6 turns; a turn is at most `--new` tokens of a Llama-style model of 5 million random weights.
How long a tool waits is drawn per episode and turn, so all sides play the same episodes. Printed are policy tokens
per second: without waiting, with it while turns join the running batch (`environment.overlap`), and with it turn by
turn. The first round warms up and is not counted.
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
SIDES = {"no waiting": (False, True), "joining": (True, True), "turn by turn": (True, False)}


def episodes(engine: Engine, tokenizer: Any, tool: Path, waits: bool, overlap: bool, count: int) -> Episodes:
    config = EnvironmentConfig(
        path=f"{tool}:Waiting", args={"waits": waits}, overlap=overlap, workers=count, max_tokens=400
    )
    layout = Layout(tokenizer, wrap_in_chat=False)
    return Episodes(engine, open_environment(config), layout, engine.end_ids, config, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
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
            for side, (waits, overlap) in SIDES.items():
                play = episodes(engine, tokenizer, tool, waits, overlap, args.episodes)
                start = time.monotonic()
                samples = play.generate(prompts, Sampling(args.new), seed=1)
                speed = sum(sum(s.mask or []) for s in samples) / (time.monotonic() - start)
                said[side] = [(s.ids, s.logp) for s in samples]
                if repeat:
                    speeds[side].append(speed)
                    print(f"{repeat}  {side:14} {speed:8.0f} tokens/s", flush=True)
    base = statistics.median(speeds["no waiting"])
    out = {
        side: {"tokens/s": statistics.median(x), "of no waiting": statistics.median(x) / base}
        for side, x in speeds.items()
    }
    out["same bits with and without waiting"] = said["no waiting"] == said["joining"]
    print(json.dumps(out, indent=1))
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args) | {"json": None}, "speeds": speeds, **out}, indent=1))


if __name__ == "__main__":
    main()
