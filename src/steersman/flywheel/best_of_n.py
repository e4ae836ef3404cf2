"""`steersman best-of-n`: rejection sampling and RAFT. Sample n answers, score, keep the good ones, fine-tune; again.

    for each round:  y_1..y_n ~ pi(. | x);  keep by score;  pi <- argmax_pi sum over kept of log pi(y | x)

Source: RAFT, arXiv 2304.06767, algorithm 1 (`keep.rule: best`, best of each prompt's answers). Departures: an SFT
run's own optimiser and epochs; `top` ranks over all prompts of a round, `threshold` is plain rejection sampling.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from steersman.config.sections import Section
from steersman.flywheel.flywheel import Flywheel
from steersman.flywheel.rounds import RoundsRecipe, first_model, folder, run_rounds, tables
from steersman.flywheel.stages import PLACE, stage_data, stage_model
from steersman.run.files.ledger import Rows
from steersman.types import Stats, SteersmanError
from steersman.update.optimizer import OptimizerConfig
from steersman.verbs import sft
from steersman.verbs.sft import SFTConfig, SFTRecipe


class KeepConfig(Section):
    """Which answers become demonstrations."""

    rule: Literal["best", "top", "threshold"] = Field(
        default="best",
        description="answers that are kept. best: the best one to each prompt; top: the best `share` of the "
        "round's; threshold: all whose grade is at least `threshold`",
    )
    share: float = Field(default=0.25, gt=0, le=1, description="with top: this share of the round's answers")
    threshold: float = Field(default=0.0, description="with threshold: grades from this on")


class BestOfNRecipe(RoundsRecipe):
    """Rejection sampling in rounds: what the judge liked becomes demonstrations."""

    keep: KeepConfig = KeepConfig()
    train: SFTConfig = SFTConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    @model_validator(mode="after")
    def _stage_fits(self) -> BestOfNRecipe:
        self.require_stage("sft", SFTRecipe, self.stage(self.model.path, [PLACE]))
        return self

    def stage(self, path: str, files: list[str]) -> dict[str, Any]:
        """What a round hands to `sft`: the model that it trains, and the files of kept answers."""
        return {
            "model": stage_model(self, path), "data": stage_data(self, files), "train": self.train,
            "optimizer": self.optimizer,
        }  # fmt: skip


def run(recipe: BestOfNRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Runs all rounds; leaves each round's data and model, and returns the summary that the run folder holds."""
    return run_rounds("best-of-n", recipe, resume=resume, learn=_learn)


def _learn(flywheel: Flywheel, recipe: BestOfNRecipe, number: int, path: str, sampled: Rows) -> tuple[str, Stats]:
    """One round's model: the kept answers are demonstrations."""
    ledger, name = flywheel.ledger, folder(number)
    graded = flywheel.grade_rows(f"{name}/graded", f"{name}/samples", sampled)
    kept = ledger.table(
        f"{name}/kept", lambda: keep(graded, recipe.keep),
        made_from=ledger.sources(f"{name}/graded"), keep=recipe.keep.model_dump(),
    )  # fmt: skip
    values = recipe.stage(first_model(recipe, path), tables(flywheel, recipe, number, "kept"))
    path = ledger.stage(f"{name}/sft", sft.run, SFTRecipe.model_validate, values)["model"]
    return path, {
        "data/sampled": len(sampled), "data/graded": len(graded), "data/kept": len(kept),
        "grade/sampled": _mean(graded), "grade/kept": _mean(kept),
    }  # fmt: skip


def keep(rows: Rows, config: KeepConfig) -> Rows:
    """The graded rows that the rule keeps, in their order; of equal grades the one sampled first.

    Raises SteersmanError where none is left.
    """
    if config.rule == "best":
        best: dict[int, dict[str, Any]] = {}
        for row in rows:
            if row["index"] not in best or row["grade"] > best[row["index"]]["grade"]:
                best[row["index"]] = row
        kept = list(best.values())
    elif config.rule == "top":
        count = max(1, round(config.share * len(rows)))
        chosen = sorted(range(len(rows)), key=lambda i: -rows[i]["grade"])[:count]
        kept = [rows[i] for i in sorted(chosen)]
    else:
        kept = [row for row in rows if row["grade"] >= config.threshold]
    if not kept:
        grades = sorted(row["grade"] for row in rows)
        raise SteersmanError(
            f"keep.threshold {config.threshold:g}: no answer reaches it; grades go from {grades[0]:.3g} over "
            f"{grades[len(grades) // 2]:.3g} (median) to {grades[-1]:.3g}"
        )
    return kept


def _mean(rows: Rows) -> float:
    return sum(row["grade"] for row in rows) / len(rows)
