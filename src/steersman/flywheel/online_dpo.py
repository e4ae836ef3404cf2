"""`steersman online-dpo`: iterative DPO under the KL-constrained objective. Sample, score, pair, train; again.

    for each round:  y_1..y_n ~ pi_t(. | x);  (y_w, y_l) by the judge;  pi_{t+1} <- DPO on the pairs against pi_ref

With `reference: start` the target stays max E[r] - beta KL(pi || pi_0), and the rounds only collect better data for
it; with `last` the reference moves along, and the constraint is on each round's step alone.

Source: arXiv 2312.11456, algorithm 2, and 2405.07863, section 3 (best against worst of n, pi_0 as reference, all
pairs so far: `history: all`). Departures: no second, exploring policy beside the main one; more temperature
(`rollout.temperature`) is the exploration.

Self-play, where answers are compared and no reward need exist:

- `loss.name: sppo`, `reference: last`: SPPO, multiplicative weights on win rates (arXiv 2405.00675).
- `loss.name: ipo`, `reference: mixed`: each round's policy is pulled toward exp(P(y beats pi_t) / beta) from the
  geometric mixture of the last policy and the first one, so that the rounds rest at the Nash equilibrium of the game
  regularised by beta * anchor_share nats to the first model: Nash-MD's mixture (arXiv 2312.00886) with the regression
  of arXiv 2407.00617 in the place of its policy gradient, opponents drawn from the last policy.
- `pairs.by: given`, `reference: last`, `loss.name: dpo`: SPIN (arXiv 2401.01335): the data's answers are chosen.

Exploration: `pairs.against: start` with `explore` is XPO (arXiv 2405.21046, algorithm 1): pairs of one answer of the
policy and one of the first model, and alpha times the log-probability of the latter added to the loss. Departures:
pairs that the judge finds equal are left out, with their bonus; alpha is of the mean over the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import Any, Literal

from pydantic import Field, model_validator

from steersman.config.sections import Section, key_names
from steersman.flywheel.flywheel import Flywheel, left_out_text
from steersman.flywheel.players import met_in, usable
from steersman.flywheel.rounds import RoundsRecipe, first_model, folder, run_rounds, tables
from steersman.flywheel.stages import NOT_IN_PAIRS, PLACE, stage_data, stage_model
from steersman.objectives.preference_config import PairLossConfig
from steersman.run.files.ledger import Rows
from steersman.train.offline import PackedOfflineConfig
from steersman.types import Stats, SteersmanError
from steersman.update.optimizer import OptimizerConfig
from steersman.verbs import preference
from steersman.verbs.preference import ANCHOR_SHARE, PreferenceRecipe


class PairsConfig(Section):
    """How a prompt's answers become pairs."""

    by: Literal["grade", "compare", "given"] = Field(
        default="grade",
        description="how the better answer of a pair is found. grade: the judge grades each answer; compare: it "
        "compares them two by two, in both orders; given: the data's own answer (`column`) is preferred to each of "
        "the policy's (SPIN)",
    )
    against: Literal["own", "start"] = Field(
        default="own",
        description="what an answer of the policy is paired with. own: its other answers to the prompt; start: an "
        "answer of the first model (XPO)",
    )
    column: str = Field(default="completion", description="with given: the column of the data's answer")
    length_penalty: float = Field(
        default=0.0, ge=0, description="taken off an answer's grade for each of its tokens, before answers are paired"
    )
    form: Literal["best_worst", "all"] = Field(
        default="best_worst",
        description="best_worst: one pair per prompt, the best answer against the worst; all: every pair in which "
        "one answer is better",
    )
    min_lead: float = Field(
        default=0.0, ge=0, description="with grade: answers make a pair if their grades differ by more than this"
    )


class OnlineDPORecipe(RoundsRecipe):
    """Iterative preference optimisation on the model's own answers."""

    pairs: PairsConfig = PairsConfig()
    reference: Literal["start", "last", "mixed"] = Field(
        default="start",
        description="what KL is measured to. start: the first model; last: the model of the last round; mixed: a "
        "geometric mixture of both (anchor_share)",
    )
    anchor_share: float = Field(default=ANCHOR_SHARE, ge=0, le=1, description="with mixed: the first model's share")
    explore: float | list[float] = Field(
        default=0.0,
        description="with pairs.against start: weight of the log-probability of the first model's answers, added "
        "to the loss (XPO's alpha); a list has one for each round, the last for all further ones",
    )
    loss: PairLossConfig = PairLossConfig()
    train: PackedOfflineConfig = PackedOfflineConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5, warmup=0.1, schedule="linear")

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return super().unread_keys() | key_names(loss=NOT_IN_PAIRS)

    @model_validator(mode="after")
    def _two_at_least(self) -> OnlineDPORecipe:
        if self.rollout.samples < 2 and self.pairs.by != "given" and self.pairs.against == "own":
            raise ValueError(f"rollout.samples is {self.rollout.samples}, but a pair needs 2 answers to a prompt")
        return self

    @model_validator(mode="after")
    def _explores(self) -> OnlineDPORecipe:
        values = self._explore_by_round
        if not values or not all(0 <= value < math.inf for value in values):
            raise ValueError(f"explore is {self.explore}; it must be a number of at least 0, or a list of such")
        if any(values) and self.pairs.against != "start":
            raise ValueError(
                "explore is about the first model's answers, and no pair has one; set pairs.against: start"
            )
        if self.loss.explore:
            raise ValueError("loss.explore: a loop has `explore`, which may differ from round to round; give that")
        if self.pairs.against == "start" and self.pairs.by == "given":
            raise ValueError(
                "pairs.against start: with `by: given` each answer is paired with the data's own; remove it"
            )
        if self.pairs.against == "start" and self.pairs.form == "all":
            raise ValueError("pairs.form all: with `against: start` each answer is in one pair; remove it")
        return self

    def explored(self, number: int) -> float:
        """`explore` in round `number`, from 1."""
        return self._explore_by_round[min(number, len(self._explore_by_round)) - 1]

    @property
    def _explore_by_round(self) -> list[float]:
        return self.explore if isinstance(self.explore, list) else [self.explore]

    @model_validator(mode="after")
    def _stage_fits(self) -> OnlineDPORecipe:
        if self.reference != "mixed" and self.anchor_share != ANCHOR_SHARE:
            raise ValueError("anchor_share is the first model's share of `reference: mixed`; give that, or remove it")
        if self.reference == "last" and not self.loss.needs_reference:
            raise ValueError(f"reference last: {self.loss.name} has no reference; remove it")
        start = self.model.path
        self.require_stage(
            "dpo", PreferenceRecipe, self.stage(start, start, [PLACE], 1), {"anchor:": "reference mixed:"}
        )
        return self

    def stage(self, path: str, last: str, files: list[str], number: int) -> dict[str, Any]:
        """What round `number` hands to `dpo`: the model to train, the last round's model, and files of pairs."""
        loss = self.loss.model_copy(update={"explore": self.explored(number)})
        values: dict[str, Any] = {
            "model": stage_model(self, path), "data": stage_data(self, files), "loss": loss,
            "train": self.train, "optimizer": self.optimizer,
        }  # fmt: skip
        if self.loss.needs_reference:
            values["reference"] = self.model.path if self.reference == "start" else last
        if self.reference == "mixed":
            values |= {"anchor": self.model.path, "anchor_share": self.anchor_share}
        return values


def run(recipe: OnlineDPORecipe, *, resume: bool = False) -> dict[str, Any]:
    """Runs all rounds; leaves each round's data and model, and returns the summary that the run folder holds."""
    return run_rounds("online-dpo", recipe, resume=resume, learn=_learn)


def _learn(flywheel: Flywheel, recipe: OnlineDPORecipe, number: int, path: str, sampled: Rows) -> tuple[str, Stats]:
    """One round's model: the answers, paired by the judge, are preferences."""
    name = folder(number)
    answers = f"{name}/samples"
    if recipe.pairs.against == "start":
        answers, sampled = _against_start(flywheel, recipe, number, sampled)
    pairs = _pairs(flywheel, recipe, name, answers, sampled)
    values = recipe.stage(first_model(recipe, path), path, tables(flywheel, recipe, number, "pairs"), number)
    path = flywheel.ledger.stage(f"{name}/dpo", preference.run, PreferenceRecipe.model_validate, values)["model"]
    leads = [p["lead"] for p in pairs]
    return path, {"data/sampled": len(sampled), "data/pairs": len(pairs), "lead": sum(leads) / len(leads)}


def _against_start(flywheel: Flywheel, recipe: OnlineDPORecipe, number: int, sampled: Rows) -> tuple[str, Rows]:
    """Table, with its name: the policy's answers and as many of the first model's to the same prompts; the k-th of
    both to a prompt are one `duel`."""
    ledger, name, n = flywheel.ledger, folder(number), recipe.rollout.samples
    theirs = flywheel.answers(f"{name}/start-samples", flywheel.start, number - 1, n, seat=1)
    flywheel.start.release()

    def make() -> Rows:
        both = [(row, False) for row in sampled] + [(row, True) for row in theirs]
        return [{**row, "duel": row["sample"], "from_start": start} for row, start in both]

    made_from = ledger.sources(f"{name}/samples", f"{name}/start-samples")
    return f"{name}/duels", ledger.table(f"{name}/duels", make, made_from=made_from)


def _pairs(flywheel: Flywheel, recipe: OnlineDPORecipe, name: str, source: str, sampled: Rows) -> Rows:
    """Table: prompt, chosen, rejected and by how much (`lead`: of grades, or of shares won), of the answers `sampled`
    in the table `source`."""
    ledger, config = flywheel.ledger, recipe.pairs
    if config.by == "given":
        answers, left_out = usable(sampled, recipe.unfinished)
        about = {"made_from": ledger.sources(source), "left_out": left_out}

        def make() -> Rows:
            return list(given_pairs(answers, flywheel.columns(answers), config.column))
    elif config.by == "grade":
        graded = flywheel.grade_rows(f"{name}/graded", source, sampled)
        about = {"made_from": ledger.sources(f"{name}/graded")}

        def make() -> Rows:
            return list(pairs_of(graded, config))
    else:
        answers, left_out = usable(sampled, recipe.unfinished)
        about = {
            "made_from": ledger.sources(source),
            "left_out": left_out,
            "judge": flywheel.about_judge(),
        }

        def make() -> Rows:
            return list(pairs_of(*grades_by_comparison(flywheel, answers, config)))

    pairs = ledger.table(f"{name}/pairs", make, **about, pairs=config.model_dump())
    if not pairs:
        _, left_out = usable(sampled, recipe.unfinished)
        raise SteersmanError(
            f"{name}: no pair from {len(sampled)} answers (left out: {left_out_text(left_out)}): the judge finds the "
            "rest equal, or no prompt has two; sample more or warmer, lower pairs.min_lead"
            + ("" if recipe.unfinished == "trim" else ", or set unfinished to trim")
        )
    return pairs


def given_pairs(answers: Rows, columns: list[dict[str, Any]], column: str) -> Iterator[dict[str, Any]]:
    """The data's answer over each of the model's own to the same prompt, unless they are the same text.

    Raises SteersmanError where a prompt has no such answer.
    """
    for row, known in zip(answers, columns, strict=True):
        given = known.get(column)
        if not isinstance(given, str) or not given.strip():
            has = ", ".join(known) or "none"
            raise SteersmanError(
                f"pairs.by given: prompt {row['index']} of the data has no text in column {column!r} (it has {has}); "
                "name the column of its answer in pairs.column"
            )
        if given.strip() != row["completion"].strip():
            yield {
                "prompt": row["prompt"], "chosen": given, "rejected": row["completion"], "lead": 1.0,
                "index": row["index"],
            }  # fmt: skip


def grades_by_comparison(flywheel: Flywheel, answers: Rows, config: PairsConfig) -> tuple[Rows, PairsConfig]:
    """Grades from comparisons, the share that an answer won of those with its siblings; or, for all pairs, each
    decided comparison as a pair of rows with grades 1 and 0."""
    duels = [(a, b) for a, b in combinations(answers, 2) if met_in(a) == met_in(b)]
    asked = [(a["prompt"], a["completion"], b["completion"]) for a, b in duels]
    outcomes = flywheel.judge.compare(asked, flywheel.columns([a for a, _ in duels]))
    told = [(a, b, o.share) for (a, b), o in zip(duels, outcomes, strict=True) if o is not None]
    if config.form == "all":
        # Each duel is a prompt of its own here, so that only what was compared is paired.
        rows = [
            {**row, "grade": grade, "duel": i}
            for i, (a, b, share) in enumerate(told)
            for row, grade in ((a, share), (b, 1 - share))
        ]
        return rows, config.model_copy(update={"min_lead": 0.0})
    won: dict[int, list[float]] = {}
    for a, b, share in told:
        won.setdefault(id(a), []).append(share)
        won.setdefault(id(b), []).append(1 - share)
    rows = [{**r, "grade": sum(won[id(r)]) / len(won[id(r)])} for r in answers if id(r) in won]
    return rows, config.model_copy(update={"min_lead": 0.0})


def pairs_of(rows: Rows, config: PairsConfig) -> Iterator[dict[str, Any]]:
    """Pairs of graded answers to the same prompt whose grades lie more than `min_lead` apart. Answers that differ in
    white space alone make none."""
    groups: dict[tuple[int, int], Rows] = {}
    for row in rows:
        groups.setdefault(met_in(row), []).append(row)
    for group in groups.values():
        if config.length_penalty:
            group = [{**r, "grade": r["grade"] - config.length_penalty * r["tokens"]} for r in group]
        ordered = sorted(group, key=lambda r: -r["grade"])
        every = combinations(ordered, 2)
        for better, worse in [(ordered[0], ordered[-1])] if config.form == "best_worst" else every:
            lead = better["grade"] - worse["grade"]
            if lead > config.min_lead and better["completion"].strip() != worse["completion"].strip():
                yield {
                    "prompt": better["prompt"], "chosen": better["completion"], "rejected": worse["completion"],
                    "lead": lead, "index": better["index"],
                    **({"chosen_from_reference": better["from_start"]} if "from_start" in better else {}),
                }  # fmt: skip
