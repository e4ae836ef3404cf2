"""What a model does around its output layer, found out by asking it, so that it is never silently wrong.

The fused log-probability reads the trunk's states and applies the output layer itself. That is right only if
the model's own forward does nothing else: some families scale the logits or cap them, others change the states
first, and some trunks are not causal. A model that does what is not understood here is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from steersman.distributed.ranks import ranks
from steersman.model.modes import evaluation_mode
from steersman.types import SteersmanError

ROWS, LENGTH = 2, 6


@dataclass(frozen=True, slots=True)
class Form:
    """The trunk's module (of an encoder-decoder the decoder), and the function between its states and the logits
    (see `ops.logprob.Head`): cap(logit_scale * (W (input_scale * h) + b))."""

    trunk: nn.Module
    logit_scale: float
    softcap: float | None
    input_scale: float = 1.0


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: where its weights are, or, where they wait in the CPU's memory for their turn, this
    rank's accelerator."""
    there = next(model.parameters()).device
    waits = there.type == "cpu" and ranks().sharded and ranks().parallel.offload
    return (torch.accelerator.current_accelerator(check_available=True) if waits else None) or there


@contextmanager
def naming_family(model: Any) -> Iterator[None]:
    """Turns whatever a family's own code raises on a few tokens into a refusal of that family."""
    try:
        yield
    except SteersmanError:
        raise
    except Exception as error:  # each family's code has errors of its own
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise SteersmanError(
            f"{model_name(model)}: it could not be run on a few tokens ({said}); this family is not supported yet"
        ) from error


def probe_causal(model: Any) -> Form:
    """Compares the model's logits with trunk, output layer, scale and cap taken apart, on a few tokens.

    The output layer's result is replaced by a known wide range of numbers, so that a cap shows even where the
    weights give small logits. Raises SteersmanError naming what differs.
    """
    name, ids = model_name(model), probe_ids(model)
    with quiet(model):
        seen, wide, logits = watch_output_layer(model, lambda: model(input_ids=ids, use_cache=False).logits)
        trunk = _trunk(model, ids, seen)
        trunk.get_input_embeddings()  # what reads batches asks for it
        require_causal(lambda some: trunk(input_ids=some, use_cache=False).last_hidden_state, ids, name)
    scale, softcap = after(model.config.get_text_config(), wide, logits, name)
    return Form(trunk, scale, softcap)


def watch_output_layer(model: Any, forward: Callable[[], Tensor]) -> tuple[Tensor | None, Tensor, Tensor]:
    """What the output layer read in a forward pass, the wide numbers put in place of its result, and the logits.

    Raises SteersmanError where what it read is not finite: such a model says nothing, whatever its family.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise SteersmanError(
            f"{model_name(model)}: its output layer is {type(layer).__name__}, not a linear layer; steersman can not "
            "compute its log-probabilities exactly"
        )
    generator = torch.Generator().manual_seed(0)
    wide = 80 * (2 * torch.rand(ROWS, LENGTH, layer.out_features, generator=generator) - 1)
    wide = wide.to(layer.weight.device, layer.weight.dtype)
    seen: list[Tensor] = []

    def replace(_module: nn.Module, args: tuple[Tensor, ...], _out: Tensor) -> Tensor:
        seen.append(args[0])
        return wide

    handle = layer.register_forward_hook(replace)
    try:
        logits = forward()
    finally:
        handle.remove()
    if seen and not bool(seen[0].isfinite().all()):
        raise SteersmanError(
            f"{model_name(model)}: its last hidden states are NaN or infinite on a few tokens, in {seen[0].dtype}; "
            "either its weights are damaged (a training that diverged?), or they do not fit this dtype"
        )
    return (seen[0] if seen else None), wide.float(), logits.float()


@cache
def cache_argument(kind: type) -> str:
    """What the class's forward calls the memory that it is given: `cache` since transformers 5.24, and `cache_params`
    where it is of states alone (Mamba)."""
    parameters = signature(kind.forward).parameters  # type: ignore[attr-defined]
    return next((name for name in ("cache", "cache_params") if name in parameters), "past_key_values")


def probe_ids(model: Any, length: int = LENGTH) -> Tensor:
    """Ids of the vocabulary to try the model on, [2, length]."""
    rows = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(ROWS * length).view(ROWS, length) * 7 + 3).remainder(rows).to(model.device)


def require_causal(states: Callable[[Tensor], Tensor], ids: Tensor, name: str) -> None:
    """Raises SteersmanError if a later token changes an earlier state."""
    whole, part = states(ids), states(ids[:, : LENGTH // 2])
    if not close(whole[:, : LENGTH // 2], part):
        raise SteersmanError(
            f"{name}: its states change with tokens that come later, so it is not a causal language model (an "
            "encoder such as BERT?); use a decoder model"
        )


def packs_exactly(trunk: nn.Module, ids: Tensor) -> bool:
    """Whether the trunk keeps segments apart whose positions start anew in one row."""
    positions = torch.arange(LENGTH, device=ids.device).repeat(ROWS)[None]
    with quiet(trunk):
        apart = trunk(input_ids=ids, use_cache=False).last_hidden_state
        packed = trunk(input_ids=ids.reshape(1, -1), position_ids=positions, use_cache=False).last_hidden_state
    return close(packed.reshape_as(apart), apart)


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of their dtype, relative to the largest number."""
    a, b, share = a.float(), b.float(), 1e-4 if a.dtype in (torch.float32, torch.float64) else 0.03
    return a.shape == b.shape and bool((a - b).abs().max() <= share * b.abs().max())


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """No gradients, and evaluation mode while it lasts."""
    with evaluation_mode(model), torch.no_grad():
        yield


def _trunk(model: Any, ids: Tensor, states: Tensor | None) -> Any:
    """The module whose last hidden state is what the output layer read."""
    for trunk in (model.base_model, model.get_decoder()):
        if states is None or trunk is model:
            continue
        if close(trunk(input_ids=ids, use_cache=False).last_hidden_state, states):
            return trunk
    raise SteersmanError(
        f"{model_name(model)}: its output layer does not read the trunk's last hidden state as it is, so the fused "
        "log-probability would be wrong; this model family is not supported yet"
    )


def after(config: Any, wide: Tensor, logits: Tensor, name: str) -> tuple[float, float | None]:
    """Scale and cap between the output layer's result and the logits, the best among those that the config
    speaks of."""
    scales = [1.0]
    for key in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        value = getattr(config, key, None)
        if isinstance(value, int | float) and value != 0:
            scales += [float(value), 1 / float(value)]
    caps = {None, getattr(config, "final_logit_softcapping", None)}
    forms = [(scale, cap) for scale in scales for cap in caps]
    if logits.shape == wide.shape:
        best = min(forms, key=lambda form: float((_form(wide, *form) - logits).abs().max()))
        if close(logits, _form(wide, *best)):
            return best
    raise SteersmanError(
        f"{name}: it changes the output layer's result in a way that steersman does not know (it knows scales and "
        "soft caps named in the config), so log-probabilities would be wrong; this model family is not supported "
        "yet"
    )


def _form(x: Tensor, scale: float, softcap: float | None) -> Tensor:
    return x * scale if softcap is None else softcap * torch.tanh(x * scale / softcap)


def model_name(model: Any) -> str:
    return f"{type(model).__name__} at '{getattr(model, 'name_or_path', '')}'"
