"""`steersman leaderboard FILE`: models rated by people's choices, as they are and with style held equal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from rich.table import Table

from steersman.atomic import check_places, write_atomic
from steersman.config.sections import Section
from steersman.data import BadRows
from steersman.guards.terminal import printable
from steersman.people.judgements import Judgement
from steersman.people.sources import open_judgements
from steersman.run.console import new_console
from steersman.statistics.ratings import Battle, Rating, ratings
from steersman.statistics.style import FEATURES, ControlledRatings, controlled_ratings, style
from steersman.types import SteersmanError


class LeaderboardRecipe(Section):
    """Judgements of pairs of models, and how they are read."""

    file: str = Field(description="judgements with answers, models and choice: a file or a folder")
    anchor: str | None = Field(default=None, description="the model at 1000 points; null: the one judged most often")
    features: list[Literal["length", "headers", "lists", "bold"]] = Field(
        default=list(FEATURES),
        description="features of style held equal between two answers: length, headers, lists, bold",
    )
    cluster: Literal["user", "prompt"] = Field(
        default="user",
        description="unit of the bootstrap behind the intervals, as its judgements are not independent: user or "
        "prompt",
    )
    draws: int = Field(default=200, ge=20, description="bootstrap draws behind the intervals, each a fit")
    seed: int = Field(default=0, ge=0, description="seed of the bootstrap")
    on_bad_row: Literal["stop", "skip"] = Field(
        default="stop", description="stop: end with an error at a bad row; skip: leave it out and count it"
    )
    out: str | None = Field(default=None, description="JSON file to write")


def run(recipe: LeaderboardRecipe) -> dict[str, Any]:
    """Prints the table, and returns both ratings and what style is worth."""
    check_places(recipe.out)
    bad = BadRows(recipe.on_bad_row, "on_bad_row")
    battles = list(style_battles(open_judgements(recipe.file, bad), recipe.cluster))
    if not battles:
        raise SteersmanError(
            f"{recipe.file}: no judgement between two models ({bad.sentence}); a row needs answers, models and choice"
        )
    fought = [name for b in battles for name in (b.first, b.second)]
    anchor = recipe.anchor or max(sorted(set(fought)), key=fought.count)
    if anchor not in fought:
        raise SteersmanError(f"anchor: {anchor!r} was never judged; there are {', '.join(sorted(set(fought)))}")
    features = [name for name in FEATURES if name in recipe.features]
    settings: dict[str, Any] = {"anchor": anchor, "draws": recipe.draws, "seed": recipe.seed}
    plain = ratings(battles, **settings)
    fair = controlled_ratings(battles, features=features, **settings)
    summary = {
        "verb": "leaderboard", "finished": True, "battles": len(battles), "ratings": [r.plain() for r in plain],
        "style_controlled": [r.plain() for r in fair.ratings],
        "effects": {name: found.plain() for name, found in fair.effects.items()}, "left_out": dict(bad.counts),
    }  # fmt: skip
    if recipe.out is not None:
        write_atomic(Path(recipe.out), json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    _show(plain, fair, anchor, recipe.cluster, bad)
    return summary


def style_battles(rows: Iterable[Judgement], cluster: str = "user") -> Iterable[Battle]:
    """Every choice between two models with the difference of style; gold items are no battle."""
    groups: dict[str, int] = {}
    for one in rows:
        if one.choice is None or one.expected is not None or len(set(one.models)) != 2:
            continue
        name = one.user if cluster == "user" else str(one.prompt)
        group = groups.setdefault(name, len(groups))
        yield Battle(*one.models, one.share, group, style(*one.answers))  # type: ignore


def _show(plain: list[Rating], fair: ControlledRatings, anchor: str, cluster: str, bad: BadRows) -> None:
    console, controlled = new_console(), {r.player: r for r in fair.ratings}
    table = Table("model", "rating", "95% interval", "style held equal", "95% interval", "battles")
    for one in plain:
        other = controlled[one.player]
        table.add_row(printable(one.player), *_cells(one), *_cells(other), f"{one.battles:,}")
    console.print(table)
    console.print(f"{printable(anchor)} is the yardstick, at 1000; intervals resample {cluster}s")
    if not all(math.isfinite(one.low) for one in plain):
        other = "prompt" if cluster == "user" else "user"
        console.print(
            f"all choices are of one {cluster}, so there is no interval; --cluster {other} resamples {other}s",
            style="yellow",
        )
    for name, found in fair.effects.items():
        bounds = f"{found.low:+.0f} to {found.high:+.0f}" if math.isfinite(found.low) else "no interval"
        console.print(f"{name}: {found.value:+.0f} points ({bounds}) for one standard deviation more of it")
    if bad.counts:
        console.print(printable(bad.sentence), style="yellow")


def _cells(one: Rating) -> tuple[str, str]:
    return f"{one.rating:.0f}", one.interval
