"""Models as a recipe's `model` section asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steersman.model import (
    AttributeModel,
    LoraConfig,
    Policy,
    ScalarModel,
    SharedBase,
    fresh_policy,
    load_policy,
    load_reward,
    load_scalar,
    place,
    save,
)
from steersman.model.modes import checkpoint_activations
from steersman.model.probe import device_of
from steersman.model.quantise import is_quantised
from steersman.recipe.sections import ModelConfig
from steersman.run.device import resolve_dtype
from steersman.run.run_config import RunConfig
from steersman.types import SteersmanError


def policy_from(
    config: ModelConfig,
    run: RunConfig,
    device: torch.device,
    *,
    trainable: bool = True,
    pack: int | None = None,
    adapt: bool = True,
    whole: bool = False,
    routers: bool = False,
) -> Policy:
    """The section's causal model; frozen and without adapters where it is not `trainable`, and still without them
    where the caller is to `adapt` it. A `whole` one is not laid in pieces, whatever `parallel.mode` says. With
    `routers` those of a mixture of experts are watched (`Policy.watch_routers`).

    Raises SteersmanError where a quantised model would have to be trained itself, and with `routers` where there are
    none; before weights are read.
    """
    dtype = _dtype(config, device)
    if config.scratch is not None and trainable:
        policy = fresh_policy(
            config.path,
            config.scratch,
            seed=run.seed,
            dtype=dtype,
            device=device,
            pack=pack,
            trust_remote_code=config.trust_remote_code,
        )
    else:
        lora = lora_of(config) if trainable else None
        if trainable:
            _require_trainable(config)
        policy = load_policy(
            config.path, dtype=dtype, device=device, attention=config.attention,
            lora=lora if adapt else None, trainable=trainable, pack=pack,
            trust_remote_code=config.trust_remote_code, quantise=config.quantise, routers=routers,
        )  # fmt: skip
        if trainable:
            _require_adapters(policy, config)
    _prepare(policy, config, run, trainable, whole, routers=routers)
    return policy


def scalar_from(config: ModelConfig, run: RunConfig, device: torch.device, path: str | None = None) -> ScalarModel:
    """A reward model or critic from the section's path, or from another one in the section's precision. With `lora`
    it gets adapters of its own beside its head."""
    dtype = _dtype(config, device)
    model = load_scalar(
        path or config.path,
        dtype=dtype,
        device=device,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code and path is None,
        quantise=config.quantise,
    )
    _adapt(model, config)
    _prepare(model, config, run, True)
    return model


def shared_from(config: ModelConfig, run: RunConfig, base: SharedBase, folder: str | None = None) -> ScalarModel:
    """A critic on the shared base: from adapters in the folder, or with new ones and a head of zeros."""
    if folder is not None:
        model = base.scalar_model(folder, trainable=True)
    else:
        model = base.fresh()
        _adapt(model, config)
    _prepare(model, config, run, True)
    return model


def reward_from(
    config: ModelConfig,
    run: RunConfig,
    device: torch.device,
    attributes: Sequence[str] = (),
    *,
    trainable: bool = True,
    whole: bool = False,
) -> ScalarModel | AttributeModel:
    """A reward model as it was saved, or with one output for each of the attributes that are asked for; with `lora`
    on adapters, or frozen where it is not `trainable`. A `whole` one is not laid in pieces, whatever `parallel.mode`
    says."""
    dtype = _dtype(config, device)
    model = load_reward(
        config.path,
        attributes=attributes,
        dtype=dtype,
        device=device,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
        quantise=config.quantise,
    )
    if trainable:
        _adapt(model, config)
    else:
        model.requires_grad_(False)
    _prepare(model, config, run, trainable, whole)
    return model


def save_model(model: Policy | ScalarModel | AttributeModel, config: ModelConfig, folder: Path) -> None:
    """The trained model in the Hugging Face layout, in the precision and form that the section asks for."""
    dtype = model.stored_dtype if config.save_dtype == "same" else getattr(torch, config.save_dtype)
    save(model, model.tokenizer, folder, merged=config.merge, dtype=dtype, max_shard_size=config.max_shard_size)


SLOW_ADAPTER_RATE = 1e-4
"""Below this rate adapters hardly moved on a chat model of 135M parameters, whatever was minimised."""


def rate_text(model: Policy | ScalarModel | AttributeModel, lr: float) -> str:
    """What to tell of the rate at which a loaded model is trained."""
    if not model.has_adapters:
        return f"{lr:g}, for all weights"
    if lr >= SLOW_ADAPTER_RATE:
        return f"{lr:g}, for adapters"
    return (
        f"{lr:g} is a rate for whole models, and adapters are trained: they hardly move below "
        f"{SLOW_ADAPTER_RATE:g}, and 2e-4 to 1e-3 is usual"
    )


def lora_of(config: ModelConfig) -> LoraConfig | None:
    """The section's adapters, as the model room takes them."""
    lora = config.lora
    return None if lora is None else LoraConfig(
        lora.r, lora.alpha, lora.dropout, lora.targets, dora=lora.dora, rslora=lora.rslora,
        train_whole=tuple(lora.train_whole),
    )  # fmt: skip


def _adapt(model: ScalarModel | AttributeModel, config: ModelConfig) -> None:
    lora = lora_of(config)
    _require_trainable(config)
    if lora is not None:
        model.adapt(lora)
    _require_adapters(model, config)


def _require_trainable(config: ModelConfig) -> None:
    if config.quantise != "none" and config.lora is None:
        raise SteersmanError(
            f"model.quantise {config.quantise}: quantised weights can not be trained; give model.lora, such as '{{}}'"
        )


def _require_adapters(model: Policy | ScalarModel | AttributeModel, config: ModelConfig) -> None:
    """Refuses to train a model whose folder holds it quantised, where nothing can learn but adapters."""
    if config.lora is None and not model.has_adapters and any(map(is_quantised, model.modules())):
        raise SteersmanError(
            f"model.path: the weights in {config.path} are quantised already, and such weights can not be trained; "
            "give model.lora, such as '{}', or the model as it was before"
        )


def _dtype(config: ModelConfig, device: torch.device) -> str:
    return str(resolve_dtype(config.dtype, device)).removeprefix("torch.")


def _prepare(
    model: nn.Module,
    config: ModelConfig,
    run: RunConfig,
    trainable: bool,
    whole: bool = False,
    *,
    routers: bool = False,
) -> None:
    module: Any = model
    module.max_tokens = run.micro_tokens
    if config.gradient_checkpointing and trainable:
        if not module.model.supports_gradient_checkpointing:
            raise SteersmanError(
                f"model.gradient_checkpointing: models of type '{module.model.config.model_type}' keep their "
                "activations; set it to false, and lower run.micro_tokens to save memory"
            )
        there = device_of(module.model) if config.offload_activations else None
        checkpoint_activations(module.model, away_from=there)
    if routers:
        module.watch_routers()  # with layers checkpointed as in training, and while its weights are whole
    if not whole:
        place(module)
