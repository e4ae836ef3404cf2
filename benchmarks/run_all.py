"""Runs the benchmarks and writes docs/results/performance.md from the JSON files beside it.

    python benchmarks/run_all.py [--only ppo dpo ...] [--page] [--quick] [--device cpu --dtype float32]

`--page` writes the page from the results that are there, without running anything. A peer that is not installed
(README.md here) is named and left out. On two cores everything takes about 15 minutes; `--quick` takes one pair of
each, on the small model.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from duel import HERE, PEERS, RESULTS
from page import write_page

SCRIPTS: dict[str, tuple[str | None, list[str]]] = {
    "rollout": (None, ["--models", "llama5m", "llama36m", "--json", "{out}/rollout.json"]),
    "ppo": ("trl112", []),
    "grpo": ("trl116", []),
    "dpo": ("trl116", []),
    "reward_model": ("trl116", []),
    "sft": ("trl116", []),
    "memory": (None, []),
    "growth": (None, []),
    "vllm_rollout": ("vllm", []),
}
"""The environment that a script needs, and what it is given."""

ONE_MODEL = {"memory", "growth"}


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--only", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS))
    given.add_argument("--page", action="store_true", help="write the page from what is there")
    given.add_argument("--quick", action="store_true", help="one pair of each, on the small model")
    given.add_argument("--repeats", type=int, default=2)
    given.add_argument("--threads", type=int, default=2)
    given.add_argument("--device", default="cpu")
    given.add_argument("--dtype", default="float32")
    given.add_argument("--out", type=Path, default=RESULTS)
    args = given.parse_args()
    failed = [] if args.page else [name for name in args.only if not run(name, args)]
    torch.set_num_threads(args.threads)
    print(write_page(args.out, measured=not args.page))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run(name: str, args: argparse.Namespace) -> bool:
    """One script; False where it failed."""
    peer, extra = SCRIPTS[name]
    if peer is not None and not (PEERS / peer / "bin" / "python").exists():
        print(f"{name}: no environment {PEERS / peer}, left out (see benchmarks/README.md)", flush=True)
        return True
    args.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / f"{name}.py"), *(x.format(out=args.out) for x in extra)]
    command += ["--repeats", str(1 if args.quick or name == "rollout" else args.repeats)]
    command += ["--threads", str(args.threads)]
    command += ["--device", args.device, "--dtype", args.dtype]
    if name != "rollout":
        command += ["--out", str(args.out)]
    if name not in ONE_MODEL and (args.quick or args.device != "cpu"):
        command += ["--models", "llama5m" if args.device == "cpu" else "llama1b"]
    print(f"== {name}", flush=True)
    start = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)
    return code == 0


if __name__ == "__main__":
    main()
