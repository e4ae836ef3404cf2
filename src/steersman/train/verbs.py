"""One recipe class per on-policy verb, so that each has its algorithm's own settings and help."""

from __future__ import annotations

from steersman.algorithms import ALGORITHMS
from steersman.train.recipe import OnPolicyRecipe

RECIPES: dict[str, type[OnPolicyRecipe]] = {name: OnPolicyRecipe[cls] for name, cls in ALGORITHMS.items()}
