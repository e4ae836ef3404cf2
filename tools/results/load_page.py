"""The page that `load.py` writes."""

from __future__ import annotations

from statistics import mean
from typing import Any

GOAL, SHOWN = 200, (50, 95, 99)
"""Milliseconds that 95 of 100 requests are to stay below; percentiles that are shown."""
PAGE = """# Many people at once, and a server that is killed under them

    {command}

{load}
## Kills

{kills}
"""
LOAD = """{clients} people for {seconds:g} seconds on {cores} cores, which they share with the server.
Before it the machine had a load of {busy:.1f}. Each waits 10 seconds on average between two actions:
eight of ten judge a pair, one says something to the story model, one gives a thumb.

| request | number | median, ms | 95th percentile, ms | 99th, ms |
| --- | ---: | ---: | ---: | ---: |
{rows}

The goal is a 95th percentile below {goal} ms of everything but answers: **{verdict}**.
Of {acknowledged:,} acknowledged judgements {lost} were lost, and {double} were there twice.
The server took {cpu:.0f} s of processor time. {refused}
"""
KILLS = """{clients} clients judge without a pause. The server gets SIGKILL at a random moment within two seconds
of its first judgement, and is started again. It was killed **{kills}** times, on average after {mean:.0f}
acknowledged judgements. Of {acknowledged:,} in all **{lost} were lost, and {double} were there twice**.
{unsaid} more were stored, whose acknowledgement died with the server.
"""


def page(found: dict[str, Any], command: str) -> str:
    """What was measured so far."""
    load = kills = "Not measured yet.\n"
    if "load" in found:
        got = found["load"]
        shown, everything = got["milliseconds"], got["milliseconds"]["everything but answers"]["p95"]
        order = sorted(shown, key=lambda kind: (kind == "everything but answers", kind))
        rows = "\n".join(
            f"| {kind} | {shown[kind]['requests']:,} | "
            + " | ".join(f"{shown[kind][f'p{q}']:,}" for q in SHOWN)
            + " |"
            for kind in order
        )
        refused = ", ".join(f"{kind}: {count}" for kind, count in got["refused"].items())
        load = LOAD.format(
            **{name: got[name] for name in ("clients", "seconds", "acknowledged", "lost", "double")},
            cores=got["cores"], busy=got["load_average_before"], rows=rows, goal=GOAL, cpu=got["server_cpu_seconds"],
            verdict=f"{everything:,} ms, {'reached' if everything < GOAL else 'not reached'}",
            refused=f"Refused or broken: {refused}." if refused else "No request was refused.",
        )  # fmt: skip
    if "kills" in found:
        got = found["kills"]
        kills = KILLS.format(
            **got, mean=mean(got["acknowledged_before_each"]), unsaid=got["stored"] - got["acknowledged"]
        )
    return PAGE.format(command=command, load=load, kills=kills).rstrip() + "\n"
