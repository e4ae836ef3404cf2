"""Kills learner, generator or both of asynchronous runs at random moments, and holds what is left against a replay.

    python tools/results/asynchronous_kills.py --kills 100 --docs docs/results
    python tools/results/asynchronous_kills.py --kills 10 --cases vllm --python ../env/vllm/bin/python \\
        --out runs/asynchronous-kills-vllm --docs docs/results

A run is killed up to five times, each time at a moment drawn evenly over its start and the iterations that are left:
its learner, one of the processes that sample for it, or both, by SIGKILL. A dead learner is resumed. Learners and
engines are forked from processes that have imported everything (`forked_engines.py`), vLLM is started as ever. When
the run is done (`asynchronous_replay.py` has the rules): every prompt was used as often as its order says, no token
is older than the limit, every recorded log-probability is that of the weights whose version it carries, and weights
and optimisers are, bit for bit, what one process alone makes of the recorded samples by the schedule; where the
sampler is ours, that process draws the same samples too (one engine; two have other batches, whose last bits may
differ). Within 20 seconds no process of the run is left, and nothing in shared memory.

It runs in namespaces of its own (`unshare`), where it sees its own processes and an empty /dev/shm only. A later call
with the same `--out` goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import torch._dynamo
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama  # noqa: F401  (imported before the forks)
import yaml
from asynchronous_replay import check, reward_file
from forked_engines import Nursery, engines
from kills import forked, options

from steersman import cli
from steersman.assets import openings, story_model
from steersman.jsonl import read_jsonl
from steersman.train import session
from steersman.verbs import rl  # noqa: F401

INSIDE = "STEERSMAN_KILLS_INSIDE"
MOST, PATIENCE = 5, 20.0
"""Kills of one run at most; seconds within which nothing of a finished run is left."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo, k = 1": ("grpo", {"ahead": 1, "engine": "process"}),
    "ppo, k = 2": ("ppo", {"ahead": 2, "engine": "process"}),
    "grpo, k = 2, cut": (
        "grpo", {"ahead": 2, "engine": "process", "in_flight": "cut", "max_new_tokens": 64, "samples": 4},
    ),
    "rloo, k = 4, two engines": ("rloo", {"ahead": 4, "engine": "process", "servers": 2}),
    "vllm": ("grpo", {"ahead": 1, "engine": "vllm"}),
}  # fmt: skip
"""Name -> verb, and what its section `rollout` has beside the shared settings."""
VICTIMS = ("learner", "generator", "both")


def recipe(name: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    verb, rollout = CASES[name]
    vllm = rollout["engine"] == "vllm"
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in openings()))
    made = {
        "model": {"path": str(story_model()), "dtype": "float32"},
        "data": {"path": str(folder / "prompts.jsonl"), "held_out": 4},
        "reward": {"parts": {"the": {"function": reward_file(folder / "reward.py", str(folder / "trace"), 0.1)}}},
        "rollout": {
            "prompts": 4, "samples": 2, "max_new_tokens": 24, "held_out": 4, "timeout": 1800.0,
            **({"python": given.python} if vllm else {}), **rollout,
        },
        "optimizer": {"lr": 3e-4},
        "iterations": iterations(name),
        "run": {"dir": str(folder / "run"), "threads": 1, "save_every": 2, "eval_every": 3},
    }  # fmt: skip
    return made if verb == "ppo" else {**made, "algorithm": {"beta": 0.05}}


def iterations(name: str) -> int:
    return 6 if CASES[name][1]["engine"] == "vllm" else 8


def learner(name: str, folder: Path, nursery: Nursery, *flags: str) -> int:
    """Forks a learner, without the report's charts, which would take longer than the run."""

    def work() -> int:
        session.write_report = lambda folder: folder / "report.html"
        if CASES[name][1]["engine"] == "process":
            nursery.adopt()
        return cli.main([CASES[name][0], str(folder / "recipe.yaml"), *flags])

    return forked(work, folder / "out.txt")


def generators() -> list[int]:
    """Processes of servers: our engine, or any process of vLLM's."""
    found = engines()
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                words = (path / "cmdline").read_bytes()
            except OSError:
                continue
            if (b"vllm.entrypoints" in words or b"VLLM::" in words) and b"keeper.py" not in words:
                found.append(int(path.name))
    return found


def ended(pid: int, seconds: float | None = None) -> int | None:
    """The exit code of a child, waited for so long; None where it runs on."""
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        there, status = os.waitpid(pid, os.WNOHANG)
        if there:
            return os.waitstatus_to_exitcode(status)
        if until is not None and time.monotonic() > until:
            return None
        time.sleep(0.01)


def broken(
    name: str, folder: Path, nursery: Nursery, usual: dict[str, float] | None, rng: random.Random, kills: int
) -> list[dict[str, Any]]:
    """A run that is killed up to `kills` times and resumed until it is done; what was killed when. `usual` has the
    seconds of a start and of an iteration; without them the run is left alone.

    Raises SystemExit, with the end of what the run said, where it ends in another way than done or killed.
    """
    deaths: list[dict[str, Any]] = []
    pid, code, last = learner(name, folder, nursery), None, iterations(name) + 1
    for _ in range(kills if usual else 0):
        assert usual is not None
        there, victim = _rows(folder), rng.choice(VICTIMS)
        moment = rng.uniform(there, last)
        while code is None and _rows(folder) < int(moment):
            code = ended(pid, 0.02)
        wait = usual["start"] if int(moment) == there else usual["iteration"]
        code, servers = ended(pid, moment % 1 * wait) if code is None else code, generators()
        while code is None and victim != "learner" and not servers:  # none is there yet
            code, servers = ended(pid, 0.02), generators()
        if code is not None:
            break
        deaths.append({"at": round(moment, 2), "victim": victim, "rows": _rows(folder)})
        if victim != "learner":
            _kill(rng.choice(servers))
        if victim != "generator":
            _kill(pid)
            code = ended(pid)
            if code == -signal.SIGKILL:
                pid, code = learner(name, folder, nursery, "--resume"), None
    code = ended(pid) if code is None else code
    if code != 0:
        said = (folder / "out.txt").read_text(errors="replace")[-3000:]
        raise SystemExit(f"{name}: exit code {code} in {folder} after {deaths}\n{said}")
    return deaths


def seconds_of(folder: Path) -> dict[str, float]:
    """What the start and an iteration of an unbroken run took."""
    rows = read_jsonl(folder / "run" / "metrics.jsonl")
    first, last = rows[0]["seconds"], rows[-1]["seconds"]
    return {"start": first, "iteration": (last - first) / (len(rows) - 1)}


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _rows(folder: Path) -> int:
    file = folder / "run" / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def left_behind(nursery: Nursery) -> list[str]:
    """Processes beside this one, its shell and the nursery, and files in shared memory, when their time is over."""
    until, ours = time.monotonic() + PATIENCE, (1, os.getpid(), nursery.pid)
    while True:
        found = [f"shared memory {path.name}" for path in Path("/dev/shm").iterdir()]
        for path in Path("/proc").iterdir():
            if path.name.isdigit() and int(path.name) not in ours:
                try:
                    found.append("process " + (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
                except OSError:
                    continue
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.1)


def one_run(
    name: str, number: int, nursery: Nursery, rng: random.Random, kills: int, given: argparse.Namespace
) -> dict[str, Any]:
    """One run from an empty folder, and what is wrong with it in the end."""
    folder = given.out / "runs" / f"{number:04d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = recipe(name, folder, given)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(made, sort_keys=False))
    timing = given.out / "seconds.json"
    usual = json.loads(timing.read_text()) if timing.exists() else {}
    deaths = broken(name, folder, nursery, usual.get(name), rng, kills)
    if name not in usual:
        timing.write_text(json.dumps(usual | {name: seconds_of(folder)}))
    left = left_behind(nursery)

    def judge() -> int:
        where = made["rollout"]
        ours = where["engine"] == "process" and where.get("in_flight") != "cut" and "servers" not in where
        with torch.inference_mode(False):
            result = check(made, CASES[name][0], folder / "trace", limit=1e-4, draws_the_same=ours)
        (folder / "result.json").write_text(json.dumps(result))
        return 0

    if ended(forked(judge, folder / "replay.txt")) != 0:
        raise SystemExit(f"{folder}: the replay failed\n{(folder / 'replay.txt').read_text()[-3000:]}")
    result = json.loads((folder / "result.json").read_text())
    wrong = [*result["wrong"], *left]
    if not wrong:
        shutil.rmtree(folder)
    return {"case": name, "run": number, "kills": deaths, "wrong": wrong, "gap": result["gap"]}


def campaign(given: argparse.Namespace, nursery: Nursery) -> Iterator[dict[str, Any]]:
    """Runs the cases in turn, the first of each unbroken, until there were so many kills; older records first."""
    record = given.out / "record.jsonl"
    done = read_jsonl(record) if record.exists() else []
    yield from done
    count, number = sum(len(row["kills"]) for row in done), len(done)
    while count < given.kills:
        rng = random.Random(f"{given.seed} {number}")
        name, kills = given.cases[number % len(given.cases)], min(rng.randint(1, MOST), given.kills - count)
        row = one_run(name, number, nursery, rng, kills, given)
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        yield row
        count, number = count + len(row["kills"]), number + 1


def go_inside() -> None:
    """Begins again in namespaces where no other process is, and no other's shared memory."""
    if INSIDE in os.environ:
        return
    mount = 'mount -t tmpfs none /dev/shm && "$@"; exit $?'  # the shell stays, and takes leave of orphans
    words = ["unshare", "-rmpf", "--mount-proc", "--kill-child", "sh", "-c", mount, "sh", sys.executable, *sys.argv]
    os.execvpe("unshare", words, {**os.environ, INSIDE: "1"})


def main() -> None:
    parser = options(__doc__, "asynchronous-kills.json is", "runs/asynchronous-kills", kills=100, cases=CASES)
    parser.set_defaults(cases=[name for name in CASES if name != "vllm"])
    parser.add_argument("--python", help="the Python that has vLLM")
    given = parser.parse_args()
    go_inside()
    given.out = given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    rows = []
    nursery = Nursery()
    for row in campaign(given, nursery):
        rows.append(row)
        at = ", ".join(f"{death['victim']} at {death['at']:.1f}" for death in row["kills"])
        total = sum(len(r["kills"]) for r in rows)
        print(f"{total:4d}  {row['case']:<26} {at or 'unbroken'}: {row['wrong'] or 'right'}", flush=True)
    os.kill(nursery.pid, signal.SIGKILL)
    if given.docs:
        file = given.docs / "asynchronous-kills.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        engine = "vllm" if "vllm" in given.cases else "process"
        command = f"python tools/results/asynchronous_kills.py --kills {given.kills} --seed {given.seed}"
        if engine == "vllm":
            command += " --cases vllm --python ../env/vllm/bin/python"
        kept[engine] = {"command": command, "date": str(date.today()), "runs": rows}
        file.write_text(json.dumps(kept, indent=1) + "\n")
    sys.exit(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    main()
