"""Recipe sections that several verbs share, a module each: `model`, `rollout`, and what trains (`training`)."""

from steersman.recipe.sections.model import (
    ADAPTER_RATE,
    TRAINED_ONLY,
    LoraSection,
    ModelConfig,
    adapter_defaults,
    adapter_rates,
)
from steersman.recipe.sections.rollout import LEARNED_ONLY, PLACE_ONLY, CorrectionConfig, RolloutConfig, not_zero
from steersman.recipe.sections.training import TrainingRecipe

__all__ = [
    "ADAPTER_RATE",
    "LEARNED_ONLY",
    "PLACE_ONLY",
    "TRAINED_ONLY",
    "CorrectionConfig",
    "LoraSection",
    "ModelConfig",
    "RolloutConfig",
    "TrainingRecipe",
    "adapter_defaults",
    "adapter_rates",
    "not_zero",
]
