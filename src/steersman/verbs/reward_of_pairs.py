"""Reward models of pairs that are more than one score: several heads, a bottleneck, planes of preference."""

from __future__ import annotations

from typing import Any

import torch

from steersman.model import (
    AttributeModel,
    BottleneckModel,
    EnsembleModel,
    GeneralPreferenceModel,
    head_names,
    latent_names,
    place,
    plane_names,
)
from steersman.model.bottleneck import BOTTLENECK
from steersman.model.ensemble import ENSEMBLE
from steersman.model.general import GENERAL
from steersman.objectives.reward_config import RewardModelConfig
from steersman.recipe.sections import ModelConfig
from steersman.run.run_config import RunConfig
from steersman.run.seed import stream
from steersman.setup.models import reward_from
from steersman.types import SteersmanError


def of_pairs(
    config: ModelConfig, train: RewardModelConfig, run: RunConfig, device: torch.device, kind: str
) -> AttributeModel | None:
    """What the section `train` asks for on pairs: outputs that begin apart, or those of a saved model of the same
    kind and size; None where it asks for one score. Raises SteersmanError where the data are no pairs."""
    asked: dict[str, tuple[int, Any, str, tuple[str, ...]]] = {
        "heads": (train.heads if train.heads > 1 else 0, EnsembleModel, ENSEMBLE, head_names(train.heads)),
        "bottleneck": (train.bottleneck, BottleneckModel, BOTTLENECK, latent_names(train.bottleneck)),
        "planes": (train.planes, GeneralPreferenceModel, GENERAL, plane_names(train.planes)),
    }
    key = next((name for name, (size, *_) in asked.items() if size), None)
    if key is None:
        return None
    size, made_of, meaning, names = asked[key]
    if kind != "preference":
        raise SteersmanError(
            f"train.{key} is {size}, but the data is of kind {kind}: give pairs, from which it learns"
        )
    model: Any = reward_from(config, run, device, names, whole=True)
    if model.meaning.kind != meaning:
        model = _begun(made_of(model.model, model.tokenizer, names), model, run.seed)
    place(model)
    return model


def _begun(made: Any, loaded: Any, seed: int) -> Any:
    """The model made of one that was loaded, its outputs as they begin."""
    made.notes, made.stored_dtype, made.has_adapters = loaded.notes, loaded.stored_dtype, loaded.has_adapters
    made.max_tokens = loaded.max_tokens
    made.begin(stream(seed, "heads"))
    return made
