"""Loops whose rounds are alike: sample answers, make data of them, train, look; best-of-n and online DPO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from pydantic import Field

from steersman.config.sections import key_names
from steersman.flywheel.flywheel import Flywheel
from steersman.flywheel.sections import LoopRecipe
from steersman.recipe.sections import LEARNED_ONLY
from steersman.run.files.ledger import Ledger, Rows
from steersman.types import Stats


class RoundsRecipe(LoopRecipe):
    """A loop that samples, makes data of the answers, and trains on it."""

    begin: Literal["last", "start"] = Field(
        default="last",
        description="model that a round's training begins with. last: that of the round before; start: the first "
        "model",
    )
    history: Literal["round", "all"] = Field(
        default="round", description="data that a round trains on. round: its own; all: that of all rounds so far"
    )

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return super().unread_keys() | key_names(rollout=LEARNED_ONLY)

    @classmethod
    def trained_by(cls, given: dict[str, Any]) -> list[str]:
        return ["optimizer"]


R = TypeVar("R", bound=RoundsRecipe)


def run_rounds(
    verb: str, recipe: R, *, resume: bool, learn: Callable[[Flywheel, R, int, str, Rows], tuple[str, Stats]]
) -> dict[str, Any]:
    """Runs the rounds: the model answers, `learn` (flywheel, recipe, round, model, answers) gives the next model and
    what is to be logged of it, and held-out prompts are looked at. Returns the summary of the run folder."""
    path = recipe.model.path
    headline = ("reward/judge", "kl", "win_rate/start")
    with Ledger(verb, recipe, resume=resume, rounds=recipe.rounds, headline=headline) as ledger:
        flywheel = Flywheel(ledger, recipe)
        stats, samples = flywheel.look(0, path)
        ledger.finish_round(0, stats, samples)
        flywheel.ends(path, stats)
        for number in range(1, recipe.rounds + 1):
            with flywheel.player(path) as player:
                sampled = flywheel.answers(f"{folder(number)}/samples", player, number - 1, recipe.rollout.samples)
            path, told = learn(flywheel, recipe, number, path, sampled)
            stats, samples = flywheel.look(number, path)
            ledger.finish_round(number, stats | told, samples)
            if flywheel.ends(path, stats):
                break
        return flywheel.finish()
    return ledger.summary({})


def folder(number: int) -> str:
    """A round's folder in the run folder."""
    return f"round-{number:02d}"


def tables(flywheel: Flywheel, recipe: RoundsRecipe, number: int, name: str) -> list[str]:
    """The files of a table that the round trains on: its own, or those of all rounds so far."""
    first = number if recipe.history == "round" else 1
    return [str(flywheel.ledger.path / folder(r) / f"{name}.jsonl") for r in range(first, number + 1)]


def first_model(recipe: RoundsRecipe, path: str) -> str:
    """The model that the round's training begins with."""
    return path if recipe.begin == "last" else recipe.model.path
