"""The optimizer of a model of transformers: which of its weights are matrices is known from the model alone."""

from __future__ import annotations

from torch import nn

from steersman.model import stacked_vectors, tables_and_adapters
from steersman.update.optimizer import Optimizer, OptimizerConfig


def model_optimizer(module: nn.Module, config: OptimizerConfig, total: int) -> Optimizer:
    """The optimizer of all that is trained in the module, whose schedule spans `total` updates."""
    tables, vectors = tables_and_adapters(module), stacked_vectors(module)
    return Optimizer(module.parameters(), config, total, tables, vectors=vectors)
