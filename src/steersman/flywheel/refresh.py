"""A judge that keeps up with the model: its reward model is trained again on what the model says now.

    after each round:  y, y' ~ pi_t(. | x) for the prompts of a batch;  a watched reward says which is better;
                       the judge's reward model learns from the pairs of all rounds so far, and from the first ones

A reward model is right where its pairs were. The further the model goes from there the less its verdicts mean, and
that is where new pairs are asked for. Source: arXiv 2204.05862, section 4.5 (reward models from the newest policies'
answers); 1909.08593, section 2 (labels gathered while the policy learns).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steersman.flywheel.players import usable
from steersman.flywheel.stages import refresh_values
from steersman.judge.config import JudgeConfig
from steersman.run.files.ledger import Rows
from steersman.run.seed import SamplingStream
from steersman.verbs import reward_model
from steersman.verbs.reward_model import RewardModelRecipe

if TYPE_CHECKING:
    from steersman.flywheel.flywheel import Flywheel


def refresh_judge(flywheel: Flywheel, number: int, path: str) -> JudgeConfig:
    """The judge for the round after `number`, whose model is at `path`."""
    recipe, ledger, refresh = flywheel.recipe, flywheel.ledger, flywheel.recipe.refresh
    assert refresh is not None
    name = f"round-{number:02d}/refresh"
    with flywheel.player(path) as player:
        answers = flywheel.answers(f"{name}/answers", player, number, 2, SamplingStream.REFRESHED_PAIRS)
    usable_rows = usable(answers, recipe.unfinished)[0]

    def make() -> Rows:
        return watched_pairs(flywheel, usable_rows, refresh.by)

    pairs = ledger.table(f"{name}/pairs", make, judge=refresh.by, made_from=ledger.sources(f"{name}/answers"))
    if not pairs:
        ledger.log.note(f"{name}: {refresh.by} told no two answers apart; the judge stays", style="yellow")
        return flywheel.judge.config
    every = [ledger.path / f"round-{r:02d}/refresh/pairs.jsonl" for r in range(1, number + 1)]
    files = [*refresh.first, *(str(file) for file in every if file.stat().st_size)]
    part, model = flywheel.judge.config.reward_model()
    values = refresh_values(recipe, model, files)
    trained = ledger.stage(f"{name}/train", reward_model.run, RewardModelRecipe.model_validate, values)["model"]
    reward = recipe.judge.reward | {part: recipe.judge.reward[part].model_copy(update={"model": trained})}
    return recipe.judge.model_copy(update={"reward": reward})


def watched_pairs(flywheel: Flywheel, answers: Rows, by: str) -> Rows:
    """A pair of each prompt's two answers, where the watched reward tells them apart by more than white space."""
    assert flywheel.gold is not None
    score = flywheel.gold(
        [r["prompt"] for r in answers], [r["completion"] for r in answers], flywheel.columns(answers)
    )[by]
    first: dict[int, int] = {}
    pairs: Rows = []
    for i, row in enumerate(answers):
        j = first.setdefault(row["index"], i)
        if score[i] != score[j] and row["completion"].strip() != answers[j]["completion"].strip():
            better, worse = (i, j) if score[i] > score[j] else (j, i)
            pairs.append(
                {
                    "prompt": row["prompt"], "chosen": answers[better]["completion"],
                    "rejected": answers[worse]["completion"], "index": row["index"],
                }
            )  # fmt: skip
    return pairs
