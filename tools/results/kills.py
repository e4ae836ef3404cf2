"""Kills runs of every verb at random moments, resumes them, and compares what they leave with an unbroken run's.

    python tools/results/kills.py --kills 200 --seed 0 --out runs/kills --docs docs/results

Each case is a shipped recipe made short. It runs once unbroken; then again and again from an empty folder, killed
by SIGKILL at moments drawn evenly over the unbroken run's time, up to three times in a row, and resumed until it is
done.
Then every file that a run is for must be the same: weights byte for byte, samples, tables and findings text for text,
and metrics number for number, times aside. Runs are forked from this process, which has imported everything but run
nothing, so that a kill costs a second or two. A later call with the same `--out` goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import matplotlib.figure
import torch
import torch._inductor
import transformers
import yaml

import steersman.run.report.page  # noqa: F401  (imported before the forks)
from steersman import cli
from steersman.assets import story_model
from steersman.verbs import feedback, preference, reward_model, rl, sft  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = {"train.epochs": 1, "run.save_every": 2, "run.eval_every": 3}
RL = {
    "rollout.prompts": 4, "rollout.samples": 2, "rollout.max_new_tokens": 16, "rollout.held_out": 6, "iterations": 8,
    "run.save_every": 2, "run.eval_every": 3,
}  # fmt: skip
WHEEL = {
    "rollout.prompts": 8, "rollout.max_new_tokens": 16, "rollout.held_out": 4, "data.held_out": 4,
    "run.save_every": 1,
}  # fmt: skip
LORA = {"model.lora": {"r": 4}}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("sft", "sft", OFFLINE),
    "sft, LoRA": ("sft", "sft", OFFLINE | LORA),
    "reward": ("reward", "reward", OFFLINE),
    "dpo": ("dpo", "dpo", OFFLINE),
    "dpo, LoRA": ("dpo", "dpo", OFFLINE | LORA),
    "kto": ("kto", "kto", OFFLINE),
    "kto, LoRA": ("kto", "kto", OFFLINE | LORA),
    "ppo": ("ppo", "grpo", RL | {"reward.normalise": True, "algorithm.kl_target": 0.5}),
    "ppo, LoRA": ("ppo", "grpo", RL | LORA),
    "nlpo": ("nlpo", "grpo", RL | {"algorithm.mask_every": 2}),
    "dapo": ("dapo", "grpo", RL),
    "grpo": ("grpo", "grpo", RL | {"rollout.samples": 4}),
    "trpo": ("trpo", "grpo", RL | {"algorithm.cg_steps": 3}),
    "online-dpo": ("online-dpo", "online-dpo", WHEEL),
    "best-of-n": ("best-of-n", "best-of-n", WHEEL),
    "arena": ("arena", "arena", WHEEL | {"ppo.iterations": 2, "ppo.prompts": 4}),
}
"""Name -> verb, shipped recipe, and what makes it short."""
MOST = 3
"""Kills of one run, at most."""
LATE = (
    transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification, transformers.AutoTokenizer,
    transformers.LlamaForCausalLM, transformers.LlamaForSequenceClassification, matplotlib.figure.Figure,
)  # fmt: skip
"""What a run would import late, imported before the forks."""


def recipe(name: str, path: Path) -> None:
    """Writes the case's recipe to `path`: the shipped one, with whole paths and its folder beside the recipe."""
    _, shipped, changes = CASES[name]
    text = (ROOT / "recipes" / f"{shipped}.yaml").read_text(encoding="utf-8")
    text = text.replace("src/steersman/assets/story-model", str(story_model()))
    for folder in ("recipes/data", "src/steersman/assets"):
        text = text.replace(f" {folder}/", f" {ROOT / folder}/")
    values = yaml.safe_load(text)
    for key, value in {**changes, "run.dir": "run", "run.threads": 1}.items():
        *sections, last = key.split(".")
        spot = values
        for section in sections:
            spot = spot.setdefault(section, {})
        spot[last] = value
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def forked(work: Callable[[], Any], out: Path) -> int:
    """A process that does the work, which gives its exit code, its words in a file; gives its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        log = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(name: str, folder: Path, *flags: str) -> int:
    """Forks a process that runs the case's command line in `folder`; gives its id."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe(name, folder / "recipe.yaml")

    def work() -> int:
        os.chdir(folder)
        return cli.main([CASES[name][0], "recipe.yaml", *flags])

    return forked(work, folder / "out.txt")


def broken(name: str, folder: Path, seconds: float, rng: random.Random, kills: int) -> list[dict[str, Any]]:
    """One run that is killed up to `kills` times and resumed until it is done; when each kill came.

    Raises SystemExit, with the end of what the run said, where it ends in another way than done or killed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    deaths: list[dict[str, Any]] = []
    while True:
        pid = start(name, folder, *(["--resume"] if deaths else []))
        moment = rng.random() * seconds
        if len(deaths) < kills:
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            return deaths
        if code != -signal.SIGKILL:
            said = (folder / "out.txt").read_text(errors="replace")[-3000:]
            raise SystemExit(f"{name}: exit code {code} in {folder} after {len(deaths)} kills\n{said}")
        deaths.append({"seconds": round(moment, 3), "rows": len(lines(folder / "run" / "metrics.jsonl"))})


def lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def left(run: Path) -> dict[str, Any]:
    """What a run is for, by file: weights, samples, tables, findings, and metrics without times."""
    out: dict[str, Any] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file() and "checkpoints" not in p.parts):
        name = str(path.relative_to(run))
        if path.name == "metrics.jsonl":
            out[name] = [untimed(json.loads(line)) for line in lines(path)]
        elif path.name == "summary.json":
            out[name] = untimed(json.loads(path.read_text()))
        elif path.suffix in (".safetensors", ".jsonl", ".json", ".yaml", ".parts") or path.name.startswith(".tmp"):
            out[name] = path.read_bytes()
    return out


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not k.startswith(("seconds", "time/", "throughput"))}


def differences(whole: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """The names of files that differ, are missing, or are too many."""
    return sorted(name for name in whole.keys() | got.keys() if whole.get(name) != got.get(name))


def unbroken(name: str, out: Path) -> tuple[dict[str, Any], float]:
    """What the case leaves when nobody kills it, and in how many seconds."""
    folder = out / "whole" / name
    timing = folder / "seconds.json"
    if not timing.exists():
        shutil.rmtree(folder, ignore_errors=True)
        began = time.monotonic()
        broken(name, folder, 0.0, random.Random(0), kills=0)
        timing.write_text(json.dumps(time.monotonic() - began))
    return left(folder / "run"), json.loads(timing.read_text())


def campaign(out: Path, seed: int, kills: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """Runs the cases in turn until there were so many kills; gives one record per run, older ones first."""
    record = out / "record.jsonl"
    done = [json.loads(line) for line in lines(record)]
    yield from done
    count, number = sum(len(row["kills"]) for row in done), len(done)
    while count < kills:
        name = names[number % len(names)]
        whole, seconds = unbroken(name, out)
        rng = random.Random(f"{seed} {number}")
        folder = out / "cut" / name
        deaths = broken(name, folder, seconds, rng, min(rng.randint(1, MOST), kills - count))
        found = differences(whole, left(folder / "run"))
        row = {"case": name, "run": number, "unbroken_seconds": round(seconds, 2), "kills": deaths, "differ": found}
        if found:
            shutil.copytree(folder, out / "differ" / f"{number:04d}", dirs_exist_ok=True)
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        yield row
        count, number = count + len(deaths), number + 1


PAGE = """# Kills: what a run that was killed and resumed leaves

    {command}

{runs} runs of shipped recipes made short (the story model, one thread, torch {torch}, transformers {transformers})
were killed {kills} times by SIGKILL, at moments drawn evenly over the time of an unbroken run and up to {most} times
in a row, and resumed with `--resume` until they were done. **{same} of {runs} left the same as the unbroken run.**

The same means: weights byte for byte; samples, tables, findings and provenance text for text; metrics and summary
number for number, times aside; no file missing and none too many.

{table}

Before the first row: the kill came before anything was logged, while models and data were loaded.
What differed is named in kills.json, under `differ`.
"""


def page(rows: list[dict[str, Any]], command: str) -> str:
    """The page: one row per case."""
    table = ["| case | runs | kills | before the first row | unbroken, s | runs that differ |", "|" + " --- |" * 6]
    for name in [name for name in CASES if any(row["case"] == name for row in rows)]:
        own = [row for row in rows if row["case"] == name]
        deaths = [death for row in own for death in row["kills"]]
        early, differ = sum(death["rows"] == 0 for death in deaths), sum(bool(row["differ"]) for row in own)
        table.append(
            f"| {name} | {len(own)} | {len(deaths)} | {early} | {own[0]['unbroken_seconds']:.1f} | {differ} |"
        )
    return PAGE.format(
        command=command, runs=len(rows), kills=sum(len(row["kills"]) for row in rows), most=MOST,
        same=sum(not row["differ"] for row in rows), torch=torch.__version__,
        transformers=transformers.__version__, table="\n".join(table),
    )  # fmt: skip


def options(doc: str | None, written: str, out: str, *, kills: int, cases: Iterable[str]) -> argparse.ArgumentParser:
    """The options of a campaign of kills; `written` is what it leaves in `--docs`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--docs", type=Path, help=f"where {written}; without it nothing is written")
    parser.add_argument("--cases", nargs="+", choices=list(cases), default=list(cases), metavar="CASE")
    return parser


def main() -> None:
    asked = options(__doc__, "kills.md and kills.json go", "runs/kills", kills=200, cases=CASES).parse_args()
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in campaign(out, asked.seed, asked.kills, asked.cases):
        rows.append(row)
        total = sum(len(r["kills"]) for r in rows)
        at = ", ".join(f"{death['seconds']:.2f} s" for death in row["kills"])
        print(f"{total:4d}  {row['case']:<12} killed at {at or '-'}: {row['differ'] or 'the same'}", flush=True)
    if asked.docs:
        command = f"python tools/results/kills.py --kills {asked.kills} --seed {asked.seed} --docs docs/results"
        (asked.docs / "kills.md").write_text(page(rows, command), encoding="utf-8")
        (asked.docs / "kills.json").write_text(json.dumps({"command": command, "runs": rows}, indent=1) + "\n")
    sys.exit(any(row["differ"] for row in rows))


if __name__ == "__main__":
    main()
