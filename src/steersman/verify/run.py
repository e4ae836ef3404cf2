"""`steersman verify`: every method against answers that are known exactly, in one table."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from steersman.algorithms import ALGORITHMS
from steersman.atomic import write_atomic
from steersman.config.sections import Section
from steersman.run.console import new_console
from steersman.tabular import preference_check
from steersman.types import SteersmanError
from steersman.verify import distillation, gradient, self_play, training, two_turns
from steersman.verify.identities import Identity, identities
from steersman.verify.judge import Method, failures
from steersman.verify.ranks import is_rank, on_ranks, on_this_rank
from steersman.verify.staleness import claims, stale_table
from steersman.verify.table import identity_table, method_table, offline_table, ranks_table, staleness_table

with warnings.catch_warnings():
    # `json` is also the name of a method that pydantic 2 keeps for version 1's sake; nobody calls it here
    warnings.simplefilter("ignore", UserWarning)

    class VerifyRecipe(Section):
        """What is verified, with which budget; the defaults take about two minutes on two cores."""

        seeds: int = Field(default=3, ge=1, description="independent training runs per method")
        iterations: int = Field(default=200, ge=1, description="iterations of 128 sampled answers per training run")
        only: str = Field(default="", description="names of methods, with commas between; empty is all of them")
        json: str | None = Field(default=None, description="file that the same numbers are written to")  # type: ignore
        workers: int = Field(
            default=0, ge=0, description="processes that share the work; 0 is one per core, at most 8"
        )
        devices: int = Field(
            default=1,
            ge=1,
            description="also compute the exact gradients on so many ranks, and compare them with one process's",
        )


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of work: `kind` is gradient, turns, shipped, core (training runs), offline, distilled or played."""

    kind: str
    name: str
    seed: int = 0
    iterations: int = 0

    def run(self) -> tuple[Any, float]:
        """The answer, and the seconds that it took."""
        start = time.monotonic()
        return self._answer(), time.monotonic() - start

    def _answer(self) -> Any:
        if self.kind == "offline":
            return preference_check.CHECKS[self.name](preference_check.example())
        if self.kind == "distilled":
            return distillation.CHECKS[self.name](distillation.example())
        if self.kind == "played":
            return self_play.CHECKS[self.name](self_play.example())
        algorithm = ALGORITHMS[self.name]()
        if self.kind == "turns":
            return two_turns.check_turns(algorithm)
        if self.kind == "gradient":
            return gradient.check_gradient(algorithm, *gradient.example())
        if self.kind == "core":
            algorithm = gradient.unbiased(algorithm)
        budget = training.Budget(iterations=self.iterations)
        return training.way_to_optimum(algorithm, training.example(), self.seed, budget)


def run(recipe: VerifyRecipe) -> dict[str, Any]:
    """Prints the tables and returns (and with `json` writes) their numbers.

    Raises SteersmanError, after printing and writing, when an estimator that should be exact is not, a method that
    is meant to reach the optimum does not, or a loss does not rest where it says; and for a name that is unknown.
    """
    start = time.monotonic()
    names = _names(recipe.only)
    methods_named = [name for name in names if name in ALGORITHMS]
    if recipe.devices > 1 and is_rank(recipe.devices):
        return on_this_rank(methods_named)
    shared = on_ranks(recipe, methods_named) if recipe.devices > 1 else []
    console = new_console()
    if not console.is_terminal:
        console = new_console(width=118)
    answers = _work(_jobs(names, recipe), recipe.workers, console)
    methods = [_method(name, answers, recipe.seeds) for name in methods_named]
    offline = [answers[Job("offline", name)][0] for name in names if name in preference_check.CHECKS]
    distilled = [answers[Job("distilled", name)][0] for name in names if name in distillation.CHECKS]
    played = [answers[Job("played", name)][0] for name in names if name in self_play.CHECKS]
    exact, stale = ([], []) if recipe.only else (identities(), stale_table())
    if methods:
        console.print(method_table(methods, recipe.seeds, recipe.iterations))
    if offline:
        console.print(offline_table(offline))
    if distilled:
        console.print(offline_table(distilled, "Distillation", "KL to teacher"))
    if played:
        console.print(offline_table(played, "Self-play", "KL to start"))
    if exact:
        console.print(identity_table(exact))
    if shared:
        console.print(ranks_table(shared, recipe.devices))
    wrong = [f"{row.name}: {recipe.devices} ranks find another gradient than one" for row in shared if not row.holds]
    wrong += failures(methods, [*offline, *distilled, *played], exact)
    if stale:
        console.print(staleness_table(stale))
        wrong += [f"stale samples: {statement}: it does not" for statement, holds in claims(stale) if not holds]
    summary = _summary(recipe, methods, offline, exact, wrong, time.monotonic() - start)
    summary["ranks"] = [asdict(row) for row in shared]
    summary["stale"] = [asdict(row) for row in stale]
    summary["distillation"] = [asdict(row) | {"holds": row.holds} for row in distilled]
    summary["self_play"] = [asdict(row) | {"holds": row.holds} for row in played]
    if recipe.json:
        write_atomic(Path(recipe.json), json.dumps(summary, indent=1) + "\n")
    if wrong:
        raise SteersmanError("verify: " + "\n  ".join(["what should hold does not:", *wrong]))
    console.print(Text.assemble(("everything holds", "green"), f" ({summary['seconds']:.0f} s)"))
    return summary


def _names(only: str) -> list[str]:
    known = [*ALGORITHMS, *preference_check.CHECKS, *distillation.CHECKS, *self_play.CHECKS]
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if ":" in name:
            raise SteersmanError(
                f"only: {name} is a method of your own; hold it to the exact gradient with check_gradient of "
                'steersman.verify.gradient (docs/architecture.md, "how to add a part")'
            )
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise SteersmanError(
                f"only: there is no method {name}; " + (f"did you mean {near[0]}?" if near else ", ".join(known))
            )
    return names or known


def _jobs(names: list[str], recipe: VerifyRecipe) -> list[Job]:
    """Longest first, so that the workers end together."""
    jobs = []
    for name in names:
        if name in preference_check.CHECKS:
            jobs.append(Job("offline", name))
            continue
        if name in distillation.CHECKS:
            jobs.append(Job("distilled", name))
            continue
        if name in self_play.CHECKS:
            jobs.append(Job("played", name))
            continue
        kinds = ["shipped", "core"] if ALGORITHMS[name].fixed_point else ["shipped"]
        jobs += [Job("gradient", name), Job("turns", name)]
        jobs += [Job(kind, name, seed, recipe.iterations) for kind in kinds for seed in range(recipe.seeds)]
    return sorted(jobs, key=lambda job: -ALGORITHMS[job.name]().epochs if job.iterations else 0)


def _work(jobs: list[Job], workers: int, console: Console) -> dict[Job, tuple[Any, float]]:
    answers = {}
    workers = min(workers or min(os.cpu_count() or 1, 8), len(jobs))
    columns = (
        TextColumn("verify"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[at]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(jobs), at="")
        for job, answer in _answers(jobs, workers):
            answers[Job(job.kind, job.name, job.seed)] = answer
            progress.update(task, advance=1, at=f"{job.name}: {job.kind}")
    return answers


def _answers(jobs: list[Job], workers: int) -> Iterator[tuple[Job, tuple[Any, float]]]:
    if workers == 1:
        for job in jobs:
            yield job, job.run()
        return
    # spawned, because a forked process can hang in a thread pool of torch that it did not start
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        pending = {pool.submit(job.run): job for job in jobs}
        for done in as_completed(pending):
            yield pending[done], done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _method(name: str, answers: dict[Job, tuple[Any, float]], seeds: int) -> Method:
    algorithm = ALGORITHMS[name]
    own = {kind: [answers.get(Job(kind, name, s)) for s in range(seeds)] for kind in ("shipped", "core")}
    ways = {kind: [found[0] for found in runs if found is not None] for kind, runs in own.items()}
    return Method(
        name=name,
        title=algorithm.title,
        paper=algorithm.paper,
        bias=algorithm.bias,
        fixed_point=algorithm.fixed_point,
        gradient=answers[Job("gradient", name)][0],
        turns=answers[Job("turns", name)][0],
        way=[way.optimum for way in ways["shipped"]],
        way_allowed=[way.allowed for way in ways["shipped"]],
        way_core=[way.optimum for way in ways["core"]],
        seconds=sum(seconds for job, (_, seconds) in answers.items() if job.name == name),
    )


def _summary(
    recipe: VerifyRecipe,
    methods: list[Method],
    offline: list[preference_check.FixedPoint],
    exact: list[Identity],
    wrong: list[str],
    seconds: float,
) -> dict[str, Any]:
    return {
        "passed": not wrong,
        "failures": wrong,
        "seconds": seconds,
        "settings": recipe.model_dump(),
        "versions": {name: version(name) for name in ("steersman", "torch")},
        "methods": [asdict(method) for method in methods],
        "offline": [asdict(row) | {"holds": row.holds} for row in offline],
        "identities": [asdict(row) for row in exact],
    }
