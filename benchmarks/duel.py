"""Runs two sides turn by turn, in processes of their own, and writes what came out.

Both are loaded first; then they take turns, so that whatever else the machine does meets both alike. The first
turn of each warms up and is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from common import write_chat_inputs, write_inputs

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "results" / "performance"
PEERS = Path(os.environ.get("STEERSMAN_PEERS", HERE.parents[1] / "env"))
"""Where the environments of the peers are: see README.md here."""


class Side:
    """A worker process and its answers."""

    def __init__(self, python: Path | str, script: str, scenario: str, arguments: list[str], threads: int) -> None:
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "TRL_EXPERIMENTAL_SILENCE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [str(python), str(HERE / script), scenario, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment, cwd="/tmp",
        )  # fmt: skip

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise RuntimeError(f"{self.process.args} ended:\n{self.log.read()[-3000:]}")
        return json.loads(line)

    def say(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.hear()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.log.close()


def duel(
    scenario: str,
    peer: str,
    shape: str,
    args: argparse.Namespace,
    rows: int,
    samples: int,
    script: str = "trl_side.py",
) -> dict[str, Any]:
    """Median seconds of both sides, their ratio in each pair, and their peak memory."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        if Path(shape).is_dir():
            write_chat_inputs(folder, Path(shape), args.pairs)
        else:
            write_inputs(folder, shape)
        arguments = [str(folder), str(args.threads), args.device, args.dtype, str(rows), str(samples)]
        sides = {
            "peer": Side(PEERS / peer / "bin" / "python", script, scenario, arguments, args.threads),
            "steersman": Side(sys.executable, "ours.py", scenario, arguments, args.threads),
        }
        for side in sides.values():
            stack.callback(side.close)
        start = {name: side.hear() for name, side in sides.items()}
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        # a pair of the larger models takes long enough to be steady
        for repeat in range((args.repeats if shape == "llama5m" else max(args.repeats - 1, 1)) + 1):
            for name, side in sides.items():
                answer = side.say("go")
                if repeat:
                    turns[name].append(answer)
        memory = {name: side.say("end") for name, side in sides.items()}
    seconds = {name: [t["seconds"] for t in answers] for name, answers in turns.items()}
    once = {name: facts.get("once", 0.0) for name, facts in start.items()}
    total = {name: [s + once[name] for s in values] for name, values in seconds.items()}
    median = {name: statistics.median(values) for name, values in total.items()}
    last = turns["steersman"][-1]
    return {
        "model": Path(shape).name,
        "seconds": median,
        "ratio": statistics.median(a / b for a, b in zip(total["peer"], total["steersman"], strict=True)),
        "ratios": [round(a / b, 3) for a, b in zip(total["peer"], total["steersman"], strict=True)],
        "once": once["steersman"],
        "phases": last.get("phases", {}),
        "tokens": last["tokens"],
        "rows": rows,
        "samples": samples,
        "memory": memory,
    }


def told(name: str, found: dict[str, Any]) -> str:
    """One line of a result."""
    s, memory = found["seconds"], found["memory"]
    pairs = ", ".join(f"{r:.2f}" for r in found["ratios"])
    peaks = f"{memory['peer']['peak_mib']:.0f} and {memory['steersman']['peak_mib']:.0f} MiB"
    phases = ", ".join(f"{phase} {x:.2f}" for phase, x in found["phases"].items())
    return (
        f"{name:8} {found['model']:9} {found['rows']:2}x{found['samples']} {s['peer']:7.2f} s beside "
        f"{s['steersman']:6.2f} s: {found['ratio']:.2f}x ({pairs}); {peaks}; {phases}"
    )


def parser(doc: str, models: list[str], repeats: int = 3) -> argparse.ArgumentParser:
    """The options that every script has."""
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--models", nargs="+", default=models)
    out.add_argument("--pairs", type=Path, help="pairs of hh_rlhf's layout, for a folder of a chat model")
    out.add_argument("--repeats", type=int, default=repeats)
    out.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 2))
    out.add_argument("--device", default="cpu")
    out.add_argument("--dtype", default="float32")
    out.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    return out


def about(args: argparse.Namespace, peers: dict[str, str]) -> dict[str, Any]:
    """When, on what and with which versions."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "threads": args.threads,
        "dtype": args.dtype,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, **peers},
    }


def write(args: argparse.Namespace, name: str, found: dict[str, Any]) -> Path:
    """One JSON file per claim; a GPU's results stand beside the CPU's."""
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / (f"{name}.json" if args.device == "cpu" else f"{name}-{args.device.split(':')[0]}.json")
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def scenario(name: str, doc: str, peer: str, version: str, rows: dict[str, int], samples: int = 1) -> None:
    """The whole of a script: the duel for each model, printed and written."""
    args = parser(doc, ["llama5m", "llama36m"]).parse_args()
    results = []
    for shape in args.models:
        results.append(duel(name, peer, shape, args, rows.get(shape, rows["other"]), samples))
        print(told(name, results[-1]), flush=True)
    print(write(args, name, {**about(args, {"trl": version}), "scenario": name, "results": results}))


def rollout(doc: str, peer: str, version: str) -> None:
    """The whole of the script beside vLLM: rows alone and groups of 8, for each model."""
    args = parser(doc, ["llama5m", "llama36m"]).parse_args()
    results = []
    for shape in args.models:
        for rows, samples in ((64, 1), (8, 8)):
            results.append(duel("rollout", peer, shape, args, rows, samples, "vllm_side.py"))
            print(told("rollout", results[-1]), flush=True)
    print(write(args, "vllm_rollout", {**about(args, {"vllm": version}), "scenario": "rollout", "results": results}))
