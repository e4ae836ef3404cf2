"""Loops whose rounds are alike: sample answers, make data of them, train, look; best-of-n and online DPO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from pydantic import Field

from steersman.flywheel.ledger import Ledger, Rows
from steersman.flywheel.sections import LoopRecipe
from steersman.flywheel.wheel import Wheel
from steersman.types import Stats


class RoundsRecipe(LoopRecipe):
    """A loop that samples, makes data of the answers, and trains on it."""

    begin: Literal["last", "start"] = Field(
        default="last", description="each round trains the last round's model, or the first one anew"
    )
    history: Literal["round", "all"] = Field(
        default="round", description="train on this round's data, or on all so far"
    )


R = TypeVar("R", bound=RoundsRecipe)


def turn(
    verb: str, recipe: R, *, resume: bool, learn: Callable[[Wheel, R, int, str, Rows], tuple[str, Stats]]
) -> dict[str, Any]:
    """Turns the wheel: in each round the model answers, `learn` (wheel, recipe, round, model, answers) gives the next
    model with what it has to tell, and held-out prompts are looked at. Returns the summary of the run folder."""
    path = recipe.model.path
    shown = ("reward/judge", "kl", "win_rate/start")
    with Ledger(verb, recipe, resume=resume, rounds=recipe.rounds, shown=shown) as ledger:
        wheel = Wheel(ledger, recipe)
        ledger.finish_round(0, *wheel.look(0, path))
        for number in range(1, recipe.rounds + 1):
            player = wheel.player(path)
            sampled = wheel.answers(f"{folder(number)}/samples", player, path, number - 1, recipe.rollout.samples)
            player.release()
            path, told = learn(wheel, recipe, number, path, sampled)
            stats, samples = wheel.look(number, path)
            ledger.finish_round(number, stats | told, samples)
        return wheel.finish(path)
    return ledger.summary({})


def folder(number: int) -> str:
    """A round's folder in the run folder."""
    return f"round-{number:02d}"


def tables(wheel: Wheel, recipe: RoundsRecipe, number: int, name: str) -> list[str]:
    """The files of a table that the round trains on: its own, or those of all rounds so far."""
    first = number if recipe.history == "round" else 1
    return [str(wheel.ledger.path / folder(r) / f"{name}.jsonl") for r in range(first, number + 1)]


def first_model(recipe: RoundsRecipe, path: str) -> str:
    """The model that the round's training begins with."""
    return path if recipe.begin == "last" else recipe.model.path
