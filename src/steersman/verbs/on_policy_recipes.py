"""One recipe class per on-policy verb, so that each has its algorithm's own settings and help."""

from __future__ import annotations

from pydantic import Field, create_model

from steersman.algorithms import ALGORITHMS
from steersman.algorithms.base import Algorithm
from steersman.algorithms.load import load_algorithm
from steersman.recipe.on_policy import OnPolicyRecipe
from steersman.recipe.sections import RolloutConfig

GROUP = 8
"""Responses to a prompt where a method compares them and the recipe says no number."""


def recipe_of(algorithm: type[Algorithm]) -> type[OnPolicyRecipe]:
    """The recipe class of a method; one that compares the responses to a prompt samples several by default."""
    made = OnPolicyRecipe[algorithm]
    if not algorithm.group:
        return made
    rollout = Field(default=RolloutConfig(samples=GROUP))
    return create_model(made.__name__, __base__=made, __doc__=made.__doc__, rollout=(RolloutConfig, rollout))


def own_recipe(spec: str) -> type[OnPolicyRecipe]:
    """The recipe class of a method of one's own, "my_method.py:Class"."""
    return recipe_of(load_algorithm(spec))


RECIPES: dict[str, type[OnPolicyRecipe]] = {name: recipe_of(cls) for name, cls in ALGORITHMS.items()}
