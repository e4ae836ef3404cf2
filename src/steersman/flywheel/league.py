"""Ratings of the model of every round and of its opponents, from battles over the held-out prompts."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from steersman.flywheel.flywheel import Flywheel
from steersman.run.files.ledger import Rows
from steersman.run.seed import SamplingStream
from steersman.statistics.ratings import Battle, ratings
from steersman.types import Stats


class League:
    """All players' answers to the held-out prompts, who beat whom, and what that makes of them.

    The model before round 1 is the yardstick, at 1000 points. `rating` goes by the judge; `gold_rating`, where
    the recipe watches a reward, by the first one watched.
    """

    def __init__(self, flywheel: Flywheel, opponents: dict[str, str], draws: int) -> None:
        self.flywheel, self.opponents, self.draws = flywheel, opponents, draws

    def rate(self, number: int) -> Stats:
        """`rating/...` of this round's model with its interval (where there is more than one prompt), and of the
        opponents."""
        fought = [row for r in range(number + 1) for row in self._battles(r)]
        stats: Stats = {}
        for kind, column in (("rating", "share"), ("gold_rating", "gold_share")):
            known = [row for row in fought if row.get(column) is not None]
            if known:
                told = {r["player"]: r for r in self._rated(known, column)}
                mine = told[_name(number)]
                stats[f"{kind}/model"] = mine["rating"]
                stats |= {f"{kind}/{end}": mine[end] for end in ("low", "high") if mine[end] is not None}
                stats |= {f"{kind}/{name}": told[name]["rating"] for name in self.opponents}
        return stats

    def table(self, number: int) -> list[dict[str, Any]]:
        """Every player's rating after a round, best first."""
        return self._rated([row for r in range(number + 1) for row in self._battles(r)], "share")

    def _rated(self, rows: Rows, column: str) -> list[dict[str, Any]]:
        battles = [Battle(r["first"], r["second"], r[column], r["index"]) for r in rows]
        seed = self.flywheel.recipe.run.seed
        return [r.plain() for r in ratings(battles, anchor=_name(0), draws=self.draws, seed=seed)]

    def _battles(self, number: int) -> Rows:
        """Table: the round's model against all opponents and its earlier selves; in round 0 opponents among
        themselves too."""
        ledger, own = self.flywheel.ledger, f"round-{number:02d}/held-out"
        meets = [(_name(number), other) for other in [*self.opponents, *(_name(r) for r in range(number))]]
        if number == 0:
            meets += list(combinations(self.opponents, 2))
        rounds = [f"round-{r:02d}/held-out" for r in range(number + 1)]

        def make() -> Rows:
            players = dict.fromkeys(player for pair in meets for player in pair)  # in one order on every rank
            answers = {name: self._answers(name) for name in players}
            return [row for a, b in meets for row in self._meet(a, answers[a], b, answers[b])]

        made_from = ledger.sources(own, *rounds)
        return ledger.table(
            f"round-{number:02d}/league", make, judge=self.flywheel.about_judge(), made_from=made_from
        )

    def _meet(self, a: str, first: Rows, b: str, second: Rows) -> Rows:
        theirs = {r["index"]: r for r in second}
        met = [(r, theirs[r["index"]]) for r in first if r["index"] in theirs]
        asked = [(x["prompt"], x["completion"], y["completion"]) for x, y in met]
        outcomes = self.flywheel.judge.compare(asked, [self.flywheel.held[x["index"]].columns for x, _ in met])
        return [
            {"first": a, "second": b, "index": x["index"], "share": o.share, "gold_share": _gold(x, y)}
            for (x, y), o in zip(met, outcomes, strict=True)
            if o is not None
        ]

    def _answers(self, name: str) -> Rows:
        if name not in self.opponents:
            return self.flywheel.ledger.rows(f"{name}/held-out")
        flywheel, path = self.flywheel, self.opponents[name]

        def make() -> Rows:
            seed = (flywheel.recipe.run.seed, SamplingStream.FLYWHEEL_LOOK)
            with flywheel.player(path) as player:
                rows, _ = player.answer(
                    flywheel.held, range(len(flywheel.held)), flywheel.data, flywheel.recipe.rollout, n=1, seed=seed
                )
            texts, columns = [r["completion"] for r in rows], [flywheel.held[r["index"]].columns for r in rows]
            gold = flywheel.gold([r["prompt"] for r in rows], texts, columns) if flywheel.gold is not None else {}
            gold.pop("total", None)
            return [{**r, "gold": {part: x[i] for part, x in gold.items()}} for i, r in enumerate(rows)]

        model, streams = flywheel.ledger.model(path), [SamplingStream.FLYWHEEL_LOOK]
        return flywheel.ledger.table(f"opponents/{name}", make, model=model, streams=streams)


def _name(number: int) -> str:
    return f"round-{number:02d}"


def _gold(first: dict[str, Any], second: dict[str, Any]) -> float | None:
    """1, 0 or 0.5 by the first reward that is watched; None where none is."""
    if not first["gold"]:
        return None
    part = next(iter(first["gold"]))
    a, b = first["gold"][part], second["gold"][part]
    return 0.5 if a == b else float(a > b)
