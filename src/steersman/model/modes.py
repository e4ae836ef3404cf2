"""Models stay in evaluation mode, so that sampling and training agree; only layers that run again are told that they
train, because they ask that before they keep less."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode; those that were in training are so again afterwards."""
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def checkpoint_activations(model: Any, *, away_from: torch.device | None = None) -> None:
    """Layers keep what they are given, and make the rest again for their backward pass. What they keep waits in the
    CPU's memory where `away_from` names the device on which they compute; pinned for CUDA.

    They, and what leads to them, are in training mode; all that is in them stays in the mode that it is in, which is
    evaluation, since it may be random in training: PhiMoE's router draws its experts there (arXiv 2409.12136), in no
    field of its config.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its name changes, but not in the oldest release that is read
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inside = [name for name, module in model.named_modules() if _can(module)]
    ways = {name[:end] for name in inside for end in (0, *(i for i, c in enumerate(name) if c == "."), len(name))}
    for name in ways:
        model.get_submodule(name).training = True
    if away_from is not None and away_from.type != "cpu":
        layers: list[Any] = [module for module in model.modules() if _can(module)]
        for module in layers:
            module._gradient_checkpointing_func = _offloaded(module._gradient_checkpointing_func, away_from)


def checkpointed(trunk: nn.Module) -> list[nn.Module]:
    """The modules in training that keep only what they are given, and run again for the backward pass, and those that
    lead there."""
    if not trunk.training:  # as most are, and this is asked in every read
        return []
    return [module for module in trunk.modules() if module.training and _can(module)]


def _offloaded(checkpoint: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The checkpoint of a layer whose inputs wait in the CPU's memory."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=device.type == "cuda", device_type=device.type):
            return checkpoint(*args, **kwargs)

    return run


def _can(module: nn.Module) -> bool:
    return getattr(module, "gradient_checkpointing", False)
