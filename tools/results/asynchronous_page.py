"""Writes docs/results/asynchronous.md from what the scripts beside it, and benchmarks/asynchronous.py, have recorded.

    python tools/results/asynchronous_page.py --docs docs/results

A part that was not recorded yet is named as such.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from steersman.atomic import write_atomic

HEAD = """# Asynchronous runs: nothing lost, and what old samples cost

`rollout.ahead: k` samples up to k batches while the policy learns from earlier ones
([how-to](../how-to/vllm.md#sampling-ahead)). This page is written by `tools/results/asynchronous_page.py`; the
numbers are in the JSON files beside it, and `tools/results/asynchronous.py` makes all of them.
"""
KILLS = """## Kills: {engine}

    {command}

{date}. {runs} runs of the story model were killed {kills} times by SIGKILL, at moments drawn evenly over
their start and iterations ({early} of them while a run started for the first time): their learner {learner}
times, a process that samples {generator} times, both {both} times. A dead learner was resumed with `--resume`; dead
servers are started again by steersman. **{right} of {runs} runs ended right.**

A run counts as right if its own record of prompts, versions and samples agrees with a replay of the same schedule in
one process: each prompt was used as often as its order says; no token is older than k versions (with `finish`
each has exactly its version); each recorded log-probability is that of the weights whose version it carries, within
1e-4 nats (the largest difference was {gap:.1e}); weights and optimisers are those of the replay, bit for
bit{draws}; and after 20 seconds no process of the run was left, and no file in shared memory.

{table}
{wrong}"""
DRAWS = """; the samples are those which that
process draws itself, bit for bit, where one engine finishes them (k = 1 and k = 2 without `cut`)"""
TOKENS = """## Learning against k, exactly

    python tools/results/asynchronous_tokens.py --docs docs/results

A table of logits over four tokens climbs a random reward by REINFORCE with samples of version max(0, b - k): the
share of the way from the start to the best answer that is gone, by enumeration, on average over 60 iterations of 32
answers and 10 seeds. k = 0 stands ± standard deviation over the seeds, which draw another reward each; any other k as
the difference from k = 0 of the same seed, ± its standard error. The bias behind it is in `steersman verify`.

{tables}
"""
LEARNING = """## Learning by engine and by k, on a language model

    python tools/results/asynchronous_learning.py engines --python ../env/vllm/bin/python
    python tools/results/asynchronous_learning.py lag

The story model towards VADER's positive sentiment, 16 iterations of 8 prompts x 4 answers of at most 20 tokens, four
updates each, beta 0.05; mean ± standard deviation over the seeds.

{engines}

{lag}

{receipts}
"""
RECEIPTS = """A real chat model: SmolLM2-135M-Instruct in float32 through vLLM's CPU build, three iterations of each
method (`asynchronous_learning.py receipts`). The largest difference of a canary's log-probability from the policy's,
in nats, after each update:
"""
SPEED = """## Wall time with a slow reward

    python benchmarks/asynchronous.py

Sampling takes {sampling:.2f} s a batch, the reward {reward:.2f} s; runs of one seed take turns on one machine.

{table}
"""
SIMULATED = """## At 8 to 512 devices, simulated

[What layouts and `ahead` gain on many devices](plan-scale.md) is a simulation, with its assumptions.
"""
MISSING = "## {title}\n\n    {command}\n\nNot recorded yet.\n"


def rows(head: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(value: dict[str, Any], digits: int = 3) -> str:
    return f"{value['mean']:.{digits}f} ± {value['sd']:.{digits}f}"


def apart(value: dict[str, Any], start: dict[str, Any]) -> str:
    """The mean difference of two values over the same seeds, with its standard error."""
    gaps = [a - b for a, b in zip(value["values"], start["values"], strict=True)]
    return f"{mean(gaps):+.3f} ± {stdev(gaps) / len(gaps) ** 0.5:.3f}"


def kills(found: dict[str, Any], engine: str) -> str:
    runs = found["runs"]
    deaths = [death for run in runs for death in run["kills"]]
    count = {who: sum(d["victim"] == who for d in deaths) for who in ("learner", "generator", "both")}
    table = []
    for case in dict.fromkeys(run["case"] for run in runs):
        own = [run for run in runs if run["case"] == case]
        hits = sum(len(run["kills"]) for run in own)
        gap = f"{max(run['gap'] for run in own):.1e}"
        table.append([case, len(own), hits, gap, sum(bool(run["wrong"]) for run in own)])
    wrong = [f"- {run['case']}, run {run['run']}: {'; '.join(run['wrong'])[:300]}" for run in runs if run["wrong"]]
    return KILLS.format(
        command=found["command"], date=found["date"], runs=len(runs), kills=len(deaths), **count,
        early=sum(death["rows"] < 1 for death in deaths),
        engine="our engine in another process" if engine == "process" else "vLLM's CPU build 0.32.0",
        right=sum(not run["wrong"] for run in runs), gap=max(run["gap"] for run in runs),
        draws=DRAWS if engine == "process" else "",
        table=rows(["case", "runs", "kills", "largest gap, nats", "runs not right"], table),
        wrong="\nNot right were:\n\n" + "\n".join(wrong) + "\n" if wrong else "",
    )  # fmt: skip


def tokens(found: list[dict[str, Any]]) -> str:
    lags = list(dict.fromkeys(row["lag"] for row in found))
    parts = []
    for rate in dict.fromkeys(row["rate"] for row in found):
        body = []
        for name in dict.fromkeys(row["correction"] for row in found):
            own = {row["lag"]: row for row in found if row["rate"] == rate and row["correction"] == name}
            start = own[0]["mean"]
            body.append([name, spread(start, 2), *(apart(own[lag]["mean"], start) for lag in lags if lag)])
        parts.append(f"Rate {rate:g}:\n\n" + rows(["correction", *(f"k = {lag}" for lag in lags)], body))
    return TOKENS.format(tables="\n\n".join(parts))


def learning(found: dict[str, Any]) -> str:
    where = [
        [r["method"], r["engine"], spread(r["reward"]), spread(r["apart"]), spread(r["held_out"]),
         "yes" if r["same_bits"] else "no", f"{r['gap']:.1e}"]
        for r in found["engines"]
    ]  # fmt: skip
    old = [
        [r["kind"], r["lag"], spread(r["reward"]), spread(r["held_out"]), spread(r["ess"], 2)] for r in found["lag"]
    ]
    head = ["method", "engine", "reward, all iterations", "apart from inside, by seed", "held out", "same bits",
            "largest receipt gap, nats"]  # fmt: skip
    lag_head = ["correction", "k", "reward, last 4 iterations", "held out", "effective sample size"]
    return LEARNING.format(
        engines=rows(head, where) if where else "By engine: not recorded yet.",
        lag=rows(lag_head, old) if old else "By k: not recorded yet.",
        receipts=receipts(found.get("receipts", [])),
    )


def receipts(found: list[dict[str, Any]]) -> str:
    if not found:
        return "Receipts of a real chat model: not recorded yet."
    body = [[one["method"], ", ".join(f"{gap:.1e}" for gap in one["gaps"])] for one in found]
    return RECEIPTS + "\n" + rows(["method", "gaps"], body)


def speed(found: dict[str, Any]) -> str:
    body = [
        [one["seed"], one["ahead"], f"{one['seconds']:.1f}", f"{one['faster']:.2f}", f"{one['reward']:.3f}"]
        for one in found["runs"]
    ]
    table = rows(["seed", "k", "seconds", "times as fast as k = 0", "held-out reward"], body)
    return SPEED.format(sampling=found["sampling"], reward=found["reward"], table=table)


def page(docs: Path) -> str:
    def read(name: str) -> Any:
        file = docs / f"asynchronous-{name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    parts, killed = [HEAD], read("kills") or {}
    parts += [kills(of, engine) for engine, of in killed.items()]
    made = {
        "tokens": ("Learning against k, exactly", "python tools/results/asynchronous_tokens.py", tokens),
        "learning": ("Learning by engine and by k", "python tools/results/asynchronous_learning.py", learning),
        "speed": ("Wall time with a slow reward", "python benchmarks/asynchronous.py", speed),
    }
    for name, (title, command, write) in made.items():
        found = read(name)
        parts.append(MISSING.format(title=title, command=command) if found is None else write(found))
    if (docs / "plan-scale.md").exists():
        parts.append(SIMULATED)
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    write_atomic(given.docs / "asynchronous.md", page(given.docs))


if __name__ == "__main__":
    main()
