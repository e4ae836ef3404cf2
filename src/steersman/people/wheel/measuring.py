"""All that is measured of a turn's candidate, as tables in the ledger."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from steersman.data import DataConfig, Query
from steersman.flywheel.players import Player
from steersman.judge import open_judge
from steersman.people.agreement import Agreement, agreement
from steersman.people.judgements import Judgement
from steersman.people.wheel import evaluation
from steersman.people.wheel.recipe import WheelRecipe
from steersman.run.files.ledger import Ledger, Rows
from steersman.run.seed import SamplingStream
from steersman.statistics.estimates import Estimate, share


class Measuring:
    """A candidate beside the model that serves, in the folder `name` of the ledger."""

    def __init__(self, ledger: Ledger, recipe: WheelRecipe, name: str, data: DataConfig) -> None:
        self.ledger, self.recipe, self.name, self.data = ledger, recipe, name, data

    def metrics(self, candidate: str, current: str, held_out: list[Judgement]) -> dict[str, Estimate]:
        """Table: every metric with its interval, from people's held-out judgements, answers, and the judge."""
        told = self.ledger.rows(f"{self.name}/evaluation")
        return {row["metric"]: _estimate(row) for row in told or self._measured(candidate, current, held_out)}

    def _measured(self, candidate: str, current: str, held_out: list[Judgement]) -> Rows:
        players = (self._player(candidate), self._player(current))
        models = [self.ledger.model(path) for path in (candidate, current)]
        readings = self.ledger.table(
            f"{self.name}/readings", lambda: evaluation.read(players, self.data, held_out),
            models=models, made_from=self.ledger.sources(f"{self.name}/kept"),
        )  # fmt: skip
        asked = evaluation.queries(held_out, self.recipe.rollout.held_out)
        mine, theirs = (
            self.ledger.table(
                f"{self.name}/answers-{side}", partial(self._answers, player, players[1], asked), model=model,
                streams=[SamplingStream.WHEEL_LOOK],
            )
            for side, player, model in zip(("candidate", "current"), players, models, strict=True)
        )  # fmt: skip
        players[1].release()  # it has read both models' answers
        found = evaluation.human_metrics(held_out, readings) | evaluation.guard_metrics(mine, theirs)
        found |= self._judged(held_out, mine, theirs)
        rows = [{"metric": name, **one.plain()} for name, one in found.items()]
        return self.ledger.table(f"{self.name}/evaluation", lambda: rows, models=models)

    def _player(self, path: str) -> Player:
        config = self.recipe.model.model_copy(update={"path": path, "lora": None})
        return Player(config, self.recipe.run, self.ledger.device)

    def _answers(self, player: Player, reader: Player, asked: list[Query]) -> Rows:
        rollout, seed = self.recipe.rollout, (self.recipe.run.seed, SamplingStream.WHEEL_LOOK)
        rows = player.answer(asked, range(len(asked)), self.data, rollout, n=1, seed=seed)[0]
        player.release()
        return evaluation.with_logp(reader, self.data, rows)

    def _judged(self, held_out: list[Judgement], candidate: Rows, current: Rows) -> dict[str, Estimate]:
        """What the recipe's judge says of both models' answers, and how far it agrees with people."""
        if self.recipe.judge is None:
            return {}
        stopping = lambda: bool(self.ledger.signal)  # noqa: E731
        judge = open_judge(self.recipe.judge, self.ledger.path, stopping=stopping, device=self.ledger.device)
        theirs = {row["index"]: row for row in current}
        met = [(row, theirs[row["index"]]) for row in candidate if row["index"] in theirs]
        outcomes = judge.compare([(a["prompt"], a["completion"], b["completion"]) for a, b in met])
        won = np.array([o.share for o in outcomes if o is not None])
        agrees = agreement(judge, held_out)
        self.ledger.table(f"{self.name}/agreement", lambda: [{**_plain(agrees), "said": str(agrees)}])
        found = {"judge/win_rate": share(won, np.arange(len(won)))} if len(won) else {}
        if agrees.accuracy is not None and agrees.kappa is not None:
            found |= {"judge/agreement": agrees.accuracy, "judge/kappa": agrees.kappa}
        return found


def _estimate(row: dict[str, Any]) -> Estimate:
    unknown = {"value": math.nan, "low": -math.inf, "high": math.inf}
    value, low, high = (unknown[k] if row[k] is None else row[k] for k in unknown)
    return Estimate(value, low, high, row["n"])


def _plain(found: Agreement) -> dict[str, Any]:
    both = {"accuracy": found.accuracy, "kappa": found.kappa}
    return found.plain() | {k: None if v is None else v.plain() for k, v in both.items()}
