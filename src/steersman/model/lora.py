"""LoRA adapters on a model, and the weights that they add up to.

peft is imported where adapters are: it takes seconds, and most runs have none.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steersman.model.adapter_files import (
    adapter_settings,
    adapter_tensors,
    not_plain_layers,
    require_fit,
    same_as_base,
)
from steersman.model.in_place import add_in_place
from steersman.model.merge import adapters_left_out
from steersman.model.quantise import unquantised
from steersman.types import SteersmanError

if TYPE_CHECKING:
    from peft import PeftModel

_log = logging.getLogger("steersman.model")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """W + (alpha / r) B A, with A of r rows; B starts at zero, so training starts from the model as it is.

    `targets` are names of linear layers, a regular expression over whole names, or "all-linear" for all but the
    output layer. `train_whole` names modules that are trained as they are, in a copy. `dropout` acts on what the
    adapters read, where gradients are asked for and nowhere else: the log-probabilities of training are random then.
    `dora` learns each row's length beside its direction; `rslora` scales by alpha / sqrt(r).

    Source: arXiv 2106.09685, section 4.1; DoRA 2402.09353, eq. 5; rsLoRA 2312.03732, section 3.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    dora: bool = False
    rslora: bool = False
    train_whole: tuple[str, ...] = ()


def add_lora(model: Any, config: LoraConfig) -> PeftModel:
    """Puts adapters on the model in place; everything else is frozen.

    Raises SteersmanError where `targets` match no layer, or the output layer.
    """
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    with _naming_targets(model, config):
        adapters = with_adapters(model, _settings(model, config, task))
    settle(model)
    _require_plain_output(model)
    return adapters  # type: ignore[return-value]


@unquantised()
def with_adapters(model: Any, settings: Any) -> PeftModel:
    """The model with adapters of peft's `settings` in it, without peft's warning that it asks transformers for a
    property by its former name, which is no user's business."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.get_peft_model(model, settings)  # type: ignore[return-value]


@unquantised()
def add_lora_to_trunk(trunk: Any, config: LoraConfig) -> None:
    """Puts adapters on a trunk in place and freezes its weights; the head that reads it stays as it is.

    Raises SteersmanError where `targets` match no layer.
    """
    import peft

    with _naming_targets(trunk, config):
        peft.inject_adapter_in_model(_settings(trunk, config, "FEATURE_EXTRACTION"), trunk)
    settle(trunk)


@unquantised()
def _settings(model: Any, config: LoraConfig, task: str) -> Any:
    import peft
    from transformers.pytorch_utils import Conv1D

    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # a float does, whatever its annotation says
        lora_dropout=config.dropout,
        target_modules=config.targets,
        exclude_modules=_routers(model) + _read_by_weight(model) or None,
        use_dora=config.dora,
        use_rslora=config.rslora,
        modules_to_save=list(config.train_whole) or None,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),  # GPT-2 stores weights transposed
        task_type=task,
    )


def _routers(model: nn.Module) -> list[str]:
    """Linear layers to which a family gave a forward pass that is no plain product, such as a router that gives
    indices too: an adapter can not be added to that."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is not nn.Linear.forward
        and type(module).__module__.startswith("transformers.models.")
        and not _is_product(module)
    ]


def _read_by_weight(model: nn.Module) -> list[str]:
    """Layers of Mamba's mixers of which kernels read the weight alone: an adapter beside it would do nothing."""
    return [
        f"{name}.{part}"
        for name, mixer in model.named_modules()
        if isinstance(getattr(mixer, "conv1d", None), nn.Conv1d)
        and isinstance(getattr(mixer, "D", None), nn.Parameter)
        for part in ("out_proj", "dt_proj")
        if isinstance(getattr(mixer, part, None), nn.Linear)
    ]


@torch.no_grad()
def _is_product(module: nn.Linear) -> bool:
    """Whether the layer gives the product of its input and its weight, plus its bias. One without weights is asked
    with some."""
    if module.weight.is_meta:
        module = copy.deepcopy(module).to_empty(device="cpu")
        for p in module.parameters():
            p.copy_(torch.linspace(-1.0, 1.0, p.numel(), device="cpu").view_as(p))
    x = torch.linspace(-1.0, 1.0, module.in_features, device="cpu").to(module.weight)[None]
    try:
        found = module(x)
    except (TypeError, ValueError, RuntimeError):  # it takes more than one input, or another shape
        return False
    wanted = nn.functional.linear(x, module.weight, module.bias)
    return (
        torch.is_tensor(found) and found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-2, atol=1e-3)
    )


class LearningDropout(nn.Dropout):
    """Dropout where gradients are asked for, whatever mode the model is in."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.dropout(input, self.p, torch.is_grad_enabled())


def settle(model: nn.Module) -> None:
    """Lets adapters that were just put on be part of a model like any other: in evaluation mode, as models are kept
    here, with dropout where gradients are asked for, and added to what their layer gives in place."""
    from peft.tuners.lora import LoraLayer

    for module in list(model.modules()):
        if isinstance(module, LoraLayer):
            chances = {name: part.p for name, part in module.lora_dropout.items() if isinstance(part, nn.Dropout)}
            module.eval()
            for name, p in chances.items():
                _drop(module, name, p)
    add_in_place(model)


def _drop(layer: Any, name: str, p: float) -> None:
    layer.lora_dropout[name] = LearningDropout(p) if p > 0 else nn.Identity()
    # DoRA asks the layer's mode whether what it reads may be dropped; nothing else in it does
    layer.training = p > 0 and name in layer.lora_variant


@contextmanager
def _naming_targets(model: Any, config: LoraConfig) -> Iterator[None]:
    """Turns peft's complaint about targets into one with the names of the layers that there are."""
    try:
        yield
    except ValueError as error:
        linear = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise SteersmanError(
            f"lora.targets {config.targets!r} do not fit {type(model).__name__}: {error}\n"
            f"Its linear layers are called {', '.join(linear)}; or use 'all-linear'"
        ) from error


@unquantised()
def load_lora(model: Any, folder: str, *, trainable: bool) -> PeftModel:
    """Puts the adapters saved in a folder on the model in place, without dropout.

    Raises SteersmanError where they can not be read, are not plain LoRA or DoRA, do not fit the model, or are on the
    output layer.
    """
    from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict

    settings, saved = adapter_settings(folder, trainable=trainable), adapter_tensors(folder)
    with fitting(folder, model):
        adapters: Any = with_adapters(model, settings)
    settle(model)
    if odd := adapters_left_out(model):
        raise not_plain_layers(folder, odd)
    here = get_peft_model_state_dict(adapters, save_embedding_layers=False)
    state = adapters.state_dict()
    own = {name: x for name, x in saved.items() if name in here or not same_as_base(name, x, state)}
    require_fit(folder, model.name_or_path, here, own)
    set_peft_model_state_dict(adapters, own)
    _require_plain_output(model)
    return adapters


@contextmanager
def fitting(folder: str, model: Any) -> Iterator[None]:
    """Turns peft's complaint about a model that saved adapters can not be put on into one that names both."""
    try:
        yield
    except Exception as error:  # peft has an error of its own for each kind of module
        raise SteersmanError(
            f"{folder}: its adapters can not be put on {model.name_or_path}: {error}; name the model that they were "
            "trained on as base_model_name_or_path in adapter_config.json"
        ) from error


def go_on(model: nn.Module, settings: Any, asked: LoraConfig) -> list[str]:
    """Trains adapters on that were loaded, with the dropout asked for. They stay what they are otherwise; returns
    what to say where that is not what was asked for. `settings` are peft's, which saving writes."""
    from peft.tuners.lora import LoraLayer

    settings.lora_dropout = asked.dropout
    for module in list(model.modules()):
        if isinstance(module, LoraLayer):
            for name in list(module.lora_dropout):
                _drop(module, name, asked.dropout)
    pairs = {
        "r": (settings.r, asked.r),
        "alpha": (settings.lora_alpha, asked.alpha),
        "dora": (settings.use_dora, asked.dora),
        "rslora": (settings.use_rslora, asked.rslora),
        "train_whole": (sorted(settings.modules_to_save or []), sorted(asked.train_whole)),
    }
    if asked.targets != "all-linear":
        have, want = (x if isinstance(x, str) else sorted(x) for x in (settings.target_modules, asked.targets))
        pairs["targets"] = (have, want)
    told = [f"{name} {have} (asked for: {want})" for name, (have, want) in pairs.items() if have != want]
    if not told:
        return []
    said = f"model.lora: the saved adapters go on as they are, with {', '.join(told)}; of these settings dropout acts"
    _log.warning(said)
    return [said]


def adapter_state(adapters: PeftModel) -> dict[str, Tensor]:
    """The adapters' tensors under the names that they have in peft's files."""
    from peft.utils.save_and_load import get_peft_model_state_dict

    return get_peft_model_state_dict(adapters)


def take_adapter_state(adapters: PeftModel, state: dict[str, Tensor]) -> None:
    """Puts tensors of such names in the place of the adapters' own; one that is missing stays as it was."""
    from peft.utils.save_and_load import set_peft_model_state_dict

    set_peft_model_state_dict(adapters, state)


def _require_plain_output(model: Any) -> None:
    """Raises SteersmanError if the output layer carries an adapter: it is applied without running the module. So do
    adapters on the embeddings of an encoder-decoder, which has several that share their weights."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    on_embeddings = any(isinstance(m, LoraLayer) and isinstance(m.get_base_layer(), nn.Embedding)
                        for m in model.modules())  # fmt: skip
    if on_embeddings and model.config.is_encoder_decoder:
        raise SteersmanError(
            "lora.targets include the embeddings, which the encoder, the decoder and the output layer of an "
            "encoder-decoder share; leave them out"
        )
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    if model.config.is_encoder_decoder and any(isinstance(table, ModulesToSaveWrapper) for table in tables):
        raise SteersmanError(
            "lora.train_whole includes the embeddings or the output layer of an encoder-decoder, which share their "
            "weights; leave them out"
        )
    if isinstance(model.get_output_embeddings(), LoraLayer):
        raise SteersmanError("lora.targets include the output layer, which can not carry an adapter; leave it out")
