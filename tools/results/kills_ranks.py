"""Kills runs on several ranks at random moments, resumes each on another layout, and compares with an unbroken run.

    python tools/results/kills_ranks.py --kills 50 --seed 0 --out runs/kills-ranks --docs docs/results

Each case is a shipped recipe made short, in float64. It runs once alone and unbroken; then from an empty folder on a
layout drawn at random, where SIGKILL ends one rank, or what started the ranks, at a random moment (drawn evenly over
the processor time of the unbroken run, so that a busy machine changes nothing). What is left goes
on with `--resume` on another layout, is killed again, and so on up to three times, until it is done. Then the steps
must be those of the unbroken run, every answer the same, and every number and weight the same to rounding. A process
that outlives its run by more than its time limit is a hang, and ends the campaign.

Ranks are forked from this process, which has imported everything but run nothing, with the environment that
`--run.devices` gives them, so that a kill costs seconds. A later call with the same `--out` goes on where it was;
`--minutes` ends a call after the run that it is at by then.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kills
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor
from safetensors.torch import load_file

from steersman import cli
from steersman.distributed import launch
from steersman.distributed.join import free_port
from steersman.train import session

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1 process": (1, []),
    "2 replicas": (2, []),
    "2 shards": (2, ["--parallel.mode", "fsdp"]),
    "2 copies x 2 shards": (4, ["--parallel.mode", "fsdp", "--parallel.replicas", "2"]),
}
SHORT = ["--model.dtype", "float64", "--run.save_every", "1", "--data.held_out", "6"]
CASES: dict[str, list[str]] = {
    "sft": [*SHORT, "--train.max_steps", "5"],
    "dpo": [*SHORT, "--train.max_steps", "5"],
    "grpo": [*SHORT, "--iterations", "4", "--rollout.samples", "2"],
    "ppo": [*SHORT, "--iterations", "4"],
}
LIMIT, ENDED, GRACE = 900.0, 300.0, 30.0
"""Seconds that a launch may take, that its processes may outlive a kill, and that ranks have after SIGTERM."""
CLOSE = 1e-5
"""Largest difference of a number, in parts of it or absolute; AdamW makes rounding larger."""


def rank(case: str, layout: str, flags: list[str], environment: dict[str, str], folder: Path) -> int:
    """Forks one rank of the case in the folder; gives its id."""
    world, how = LAYOUTS[layout]
    words = [kills.CASES[case][0], "recipe.yaml", *CASES[case], "--run.devices", str(world), *how, *flags]

    def work() -> int:
        session.write_report = lambda folder: folder / "report.html"  # half a short run's time, and nothing of it
        os.environ.update(environment)
        os.chdir(folder)
        return cli.main([*words, "--parallel.timeout", "60"])

    return kills.forked(work, folder / "out.txt")


def starter(case: str, layout: str, flags: list[str], folder: Path, pids: Path) -> int:
    """Forks what starts the ranks and ends all where one fails, as `distributed/launch.py` does; gives its id."""
    pid = os.fork()
    if pid:
        return pid
    world = LAYOUTS[layout][0]
    place, port = Path(tempfile.mkdtemp(dir=folder)), free_port()
    own = {r: launch._environment(r, world, port, place) if world > 1 else {} for r in range(world)}
    ranks = [rank(case, layout, flags, own[r], folder) for r in range(world)]
    pids.write_text(json.dumps(ranks))
    codes: list[int] = []
    asked = math.inf
    while len(codes) < len(ranks):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes.append(os.waitstatus_to_exitcode(status))
        elif time.monotonic() < asked + GRACE and (asked < math.inf or not any(codes)):
            time.sleep(0.05)
        else:
            for other in filter(alive, ranks):
                os.kill(other, signal.SIGKILL if asked < math.inf else signal.SIGTERM)
            asked = time.monotonic()
    os._exit(next((70 if code < 0 else code for code in codes if code), 0))


def processor(pid: int) -> float:
    """Seconds of processor time that a process has used; 0 where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def launched(case: str, layout: str, folder: Path, resume: bool, rng: random.Random, seconds: float | None) -> Any:
    """One launch, killed once rank 0 has used a random share of `seconds` of processor time, where they are given.

    Gives the record of the kill, or None where the run was done before.
    """
    pids = folder / "pids.json"
    pids.unlink(missing_ok=True)
    top = starter(case, layout, ["--resume"] if resume else [], folder, pids)
    while not pids.exists() or not pids.read_text():
        time.sleep(0.01)
    ranks, began, killed = json.loads(pids.read_text()), time.monotonic(), None
    moment = math.inf if seconds is None else 0.9 * rng.random() * seconds
    whom = rng.choice([*ranks, top])
    code = None
    while code is None or any(alive(pid) for pid in ranks):
        now = time.monotonic() - began
        if killed is None and code is None and processor(ranks[0]) >= moment and alive(whom):
            os.kill(whom, signal.SIGKILL)
            killed = {
                "layout": layout,
                "whom": "the starter" if whom == top else f"rank {ranks.index(whom)}",
                "seconds": round(now, 2),
                "rows": len(kills.lines(folder / "run" / "metrics.jsonl")),
            }
        if now > LIMIT or (killed and now > killed["seconds"] + ENDED):
            for pid in (*ranks, top):
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)
            raise SystemExit(f"{case}, {layout}: it hangs\n{(folder / 'out.txt').read_text()[-3000:]}")
        if code is None and (found := os.waitpid(top, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.02)
    if killed is None and code:
        raise SystemExit(f"{case}, {layout}: exit code {code}\n{(folder / 'out.txt').read_text()[-3000:]}")
    if killed is not None:
        killed["ended_after"] = round(time.monotonic() - began - killed["seconds"], 2)
    return killed


def broken(case: str, folder: Path, seconds: float, rng: random.Random, most: int) -> list[Any]:
    """A run that is killed up to `most` times, each time on another layout than before, and then done."""
    prepared(case, folder)
    deaths: list[Any] = []
    layout = ""
    while True:
        layout = rng.choice([name for name in LAYOUTS if name != layout])
        death = launched(case, layout, folder, bool(deaths), rng, seconds if len(deaths) < most else None)
        if death is None:
            return [*deaths, {"layout": layout, "whom": "nobody"}]
        deaths.append(death)


def prepared(case: str, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kills.recipe(case, folder / "recipe.yaml")


def unbroken(case: str, out: Path) -> float:
    """Runs the case once alone, which all others are compared with; how much processor time it took, in seconds."""
    timing = out / "whole" / case / "seconds.json"
    if not timing.exists():
        prepared(case, out / "whole" / case)
        before = os.times()
        launched(case, "1 process", out / "whole" / case, False, random.Random(0), None)
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        timing.write_text(json.dumps(used))
    return json.loads(timing.read_text())


def differences(whole: Path, got: Path) -> tuple[list[str], float]:
    """What is not the same, by name, and the largest difference of a weight."""
    wrong: list[str] = []
    rows, wanted = (
        [kills.untimed(json.loads(x)) for x in kills.lines(run / "metrics.jsonl")] for run in (got, whole)
    )
    if [row["step"] for row in rows] != [row["step"] for row in wanted]:
        wrong.append(f"steps {[row['step'] for row in rows]}")
    for row, other in zip(rows, wanted, strict=False):
        wrong += [f"step {row['step']}: {key}" for key in other if not close(row.get(key), other[key])]
    told, expected = (
        [json.loads(x).get("completion") for x in kills.lines(run / "samples.jsonl")] for run in (got, whole)
    )
    if told != expected:
        wrong.append("samples.jsonl")
    weights, others = (load_file(run / "model" / "model.safetensors") for run in (got, whole))
    gap = max(float((weights[name] - others[name]).abs().max()) for name in others)
    return wrong + (["weights"] if gap > CLOSE else []), gap


def close(x: Any, y: Any) -> bool:
    number = isinstance(x, float | int) and isinstance(y, float | int)
    return math.isclose(x, y, rel_tol=CLOSE, abs_tol=CLOSE) if number else x == y


def campaign(out: Path, seed: int, wanted: int, names: list[str], minutes: float) -> Iterator[dict[str, Any]]:
    """Runs the cases in turn until there were so many kills, or the time is over; one record per run, older ones
    first."""
    until = time.monotonic() + 60 * minutes
    record = out / "record.jsonl"
    done = [json.loads(line) for line in kills.lines(record)]
    yield from done
    count, number = sum(len(row["launches"]) - 1 for row in done), len(done)
    while count < wanted and time.monotonic() < until:
        case = names[number % len(names)]
        rng = random.Random(f"{seed} {number}")
        seconds = unbroken(case, out)
        launches = broken(case, out / "cut" / case, seconds, rng, min(rng.randint(2, 3), wanted - count))
        wrong, gap = differences(out / "whole" / case / "run", out / "cut" / case / "run")
        row = {"case": case, "run": number, "launches": launches, "differ": wrong, "weights": gap}
        if wrong:
            shutil.copytree(out / "cut" / case, out / "differ" / f"{number:04d}", dirs_exist_ok=True)
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        yield row
        count, number = count + len(launches) - 1, number + 1


def table(rows: list[dict[str, Any]]) -> str:
    """One row per case, in Markdown."""
    heads = ("case", "runs", "kills", "of the starter", "longest until all had ended, s")
    heads += ("largest difference of a weight", "runs that differ")
    text = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        deaths = [death for row in own for death in row["launches"] if "seconds" in death]
        text.append(
            f"| {case} | {len(own)} | {len(deaths)} | {sum(d['whom'] == 'the starter' for d in deaths)} | "
            f"{max((d['ended_after'] for d in deaths), default=0.0):.1f} | "
            f"{max(row['weights'] for row in own):.1e} | {sum(bool(row['differ']) for row in own)} |"
        )
    return "\n".join(text)


PAGE = """# Kills of runs on several devices

    {command}

Shipped recipes made short (the story model in float64, a checkpoint after every step, torch {torch}, gloo) were begun
on a layout drawn at random: 1 process, 2 replicas, 2 shards, or 2 copies of 2 shards. SIGKILL ended one rank, or what
had started the ranks, at a moment drawn evenly over the processor time of an unbroken run; what was left went on with
`--resume` on another layout, was killed again, up to three times in a row, and then ended. {count} kills in {runs}
runs.

**{same} of {runs} left what the unbroken run of one process left**: the same steps, the same answers, every number
and weight the same to {close:g}. No process outlived its run by more than {longest:.0f} s; ranks that wait give up
after a minute, and what is left of a rank {grace:.0f} s after SIGTERM is killed.

{table}

Reports are not drawn in these runs. Each kill, with its layout, moment and rank, is in kills-ranks.json.
"""


def page(rows: list[dict[str, Any]], command: str) -> str:
    deaths = [death for row in rows for death in row["launches"] if "seconds" in death]
    return PAGE.format(
        command=command, torch=torch.__version__, count=len(deaths), runs=len(rows), close=CLOSE, grace=GRACE,
        same=sum(not row["differ"] for row in rows), table=table(rows),
        longest=max((death["ended_after"] for death in deaths), default=0.0),
    )  # fmt: skip


def main() -> None:
    parser = kills.options(
        __doc__, "kills-ranks.md and kills-ranks.json go", "runs/kills-ranks", kills=50, cases=CASES
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many minutes")
    asked = parser.parse_args()
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in campaign(out, asked.seed, asked.kills, asked.cases, asked.minutes):
        rows.append(row)
        count = sum(len(r["launches"]) - 1 for r in rows)
        at = ", ".join(f"{d['whom']} of {d['layout']}" for d in row["launches"])
        print(f"{count:4d}  {row['case']:<5} {at}: {row['differ'] or 'the same'} ({row['weights']:.1e})", flush=True)
    print(table(rows))
    if asked.docs:
        command = f"python tools/results/kills_ranks.py --kills {asked.kills} --seed {asked.seed} --docs docs/results"
        told = {"command": command, "torch": torch.__version__, "runs": rows}
        (asked.docs / "kills-ranks.md").write_text(page(rows, command), encoding="utf-8")
        (asked.docs / "kills-ranks.json").write_text(json.dumps(told, indent=1) + "\n")
    sys.exit(any(row["differ"] for row in rows))


if __name__ == "__main__":
    main()
