"""`steersman ab FILE`: what the outcomes of an experiment say so far, and whether it may end."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from rich.table import Table

from steersman.atomic import check_places, write_atomic
from steersman.config.sections import Section
from steersman.data import BadRows
from steersman.guards.terminal import printable
from steersman.jsonl import append_jsonl
from steersman.people.experiments import Experiment, Report, Verdict, report
from steersman.people.outcomes import WIN, Outcome, outcomes_of, read_outcomes
from steersman.people.sources import open_judgements
from steersman.run.console import new_console
from steersman.statistics.sample_size import Plan, plan, plan_arms
from steersman.types import SteersmanError


class ABRecipe(Section):
    """An experiment and the file of its outcomes."""

    file: str = Field(description="outcomes or judgements: jsonl, json, csv, tsv, parquet, or a folder of these")
    experiment: Experiment = Experiment()
    effect: float = Field(
        default=0.05, gt=0, lt=0.5, description="gain in a win rate (or share) that the sample-size plan is to detect"
    )
    power: float = Field(default=0.8, gt=0, lt=1, description="probability of detecting it that the plan is made for")
    on_bad_row: Literal["stop", "skip"] = Field(
        default="stop", description="stop: end with an error at a bad row; skip: leave it out and count it"
    )
    out: str | None = Field(default=None, description="JSON file to write")
    log: str | None = Field(
        default=None, description="JSONL file that keeps every look: when, how many, what was said"
    )

    @model_validator(mode="after")
    def _out_is_no_input(self) -> ABRecipe:
        for name, path in (("out", self.out), ("log", self.log)):
            if path is not None and Path(path).resolve() == Path(self.file).resolve():
                raise ValueError(f"{name} is the file of outcomes; choose another")
        return self


def run(recipe: ABRecipe) -> dict[str, Any]:
    """Prints the report of the experiment as its outcomes stand, and returns it."""
    check_places(recipe.out, recipe.log)
    bad, experiment = BadRows(recipe.on_bad_row, "on_bad_row"), recipe.experiment
    names = (experiment.control, experiment.treatment)
    models = set[str]()
    if "://" in recipe.file:
        judged = list(open_judgements(recipe.file))
        models = {model for one in judged for model in one.models}
        rows = list(outcomes_of(judged, *names))
    else:
        rows = read_outcomes(recipe.file, *names, bad)
    if not any(row.metric == experiment.metric for row in rows):
        have = ", ".join(sorted({row.metric for row in rows})) or "none"
        have += f"; models found: {', '.join(sorted(models))}" if models else ""
        raise SteersmanError(
            f"{recipe.file}: no outcome of the metric {experiment.metric!r} for {experiment.control} and "
            f"{experiment.treatment} (metrics found: {have}; {bad.sentence}). Set experiment.control, "
            "experiment.treatment and experiment.metric to the names in the file"
        )
    told = report(experiment, rows)
    planned = plan_of(recipe, rows)
    summary = {
        "verb": "ab", "finished": True, "rows": len(rows), "users": len({r.user for r in rows}), **asdict(told),
        "plan": None if planned is None else asdict(planned), "left_out": dict(bad.counts),
    }  # fmt: skip
    if recipe.out is not None:
        write_atomic(Path(recipe.out), json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    if recipe.log is not None:
        _keep(Path(recipe.log), recipe, told)
    show(recipe, told, planned, bad)
    return summary


def _keep(path: Path, recipe: ABRecipe, told: Report) -> None:
    look = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "decision": told.decision, "reason": told.reason}
    look |= {
        "primary": asdict(told.primary),
        "experiment": recipe.experiment.model_dump(mode="json", exclude={"salt"}),
    }
    append_jsonl(path, look)


def plan_of(recipe: ABRecipe, rows: list[Outcome]) -> Plan | None:
    """The size of a test that finds the recipe's effect, with the ties or the control's rate seen so far; None for a
    metric that is no yes or no."""
    experiment = recipe.experiment
    wins = [row.value for row in rows if row.metric == experiment.metric]
    if experiment.metric != WIN:
        seen = [row.value for row in rows if row.metric == experiment.metric and not row.treated]
        rate, sign = sum(seen) / max(len(seen), 1), 1 if experiment.better == "higher" else -1
        if not set(wins) <= {0.0, 1.0} or not 0 <= rate + sign * recipe.effect <= 1:
            return None
        return plan_arms(
            rate, sign * recipe.effect, share=experiment.share, alpha=experiment.alpha, power=recipe.power
        )
    ties = min(sum(x == 0.5 for x in wins) / len(wins), 1 - 2 * recipe.effect)
    return plan(recipe.effect, ties=ties, alpha=recipe.experiment.alpha, power=recipe.power)


def show(recipe: ABRecipe, told: Report, planned: Plan | None, bad: BadRows) -> None:
    """The report in the terminal."""
    console, experiment = new_console(), recipe.experiment
    names = [printable(n) for n in (experiment.treatment, experiment.control)]
    console.print(f"{names[0]} against {names[1]}, {1 - experiment.alpha:.0%} bounds that hold at every look")
    unit = "users" if experiment.unit == "user" or experiment.metric != WIN else "judgements"
    table = Table("metric", unit, "estimate", "bounds", "e-value", "state", "decided at")
    for role, verdict in [("", told.primary), *(("guard ", v) for v in told.guards), *(("", v) for v in told.others)]:
        table.add_row(role + printable(verdict.metric), *_cells(verdict))
    console.print(table)
    for verdict in (told.primary, *told.guards):
        if verdict.unused:
            console.print(
                f"{printable(verdict.metric)}: {verdict.unused:,} outcomes are in no score (a user counts by "
                f"the first {experiment.per_user})"
            )
    for warning in told.warnings:
        console.print(printable(warning), style="yellow")
    if bad.counts:
        console.print(printable(bad.sentence), style="yellow")
    if planned is not None:
        console.print(f"plan: {planned}")
    end = {"treatment": f"take {names[0]}", "control": f"keep {names[1]}", "wait": "go on collecting"}[told.decision]
    console.print(f"{end}: {printable(told.reason)}", style="bold")


def _cells(verdict: Verdict) -> list[str]:
    look = verdict.look
    decided = f"{verdict.decided_at:,}" if verdict.decided_at else "–"
    e_value = f"{look.e_value:,.3g}"
    return [f"{look.n:,}", f"{look.mean:.4g}", f"{look.low:.4g} to {look.high:.4g}", e_value, verdict.state, decided]
