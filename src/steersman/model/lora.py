"""LoRA adapters on a model, and the weights that they add up to.

peft is imported where adapters are: it takes seconds, and most runs have none.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
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
from steersman.model.lora_targets import ALL_LINEAR, adapted_names, find_targets, named_targets
from steersman.model.merge import adapters_left_out
from steersman.model.quantise import unquantised
from steersman.types import SteersmanError

if TYPE_CHECKING:
    from peft import PeftModel

_log = logging.getLogger("steersman.model")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """W + (alpha / r) B A, with A of r rows; B starts at zero, so training starts from the model as it is.

    `targets` are names of linear layers or of the stacked matrices of experts (`gate_up_proj`), a regular expression
    over whole names, or "all-linear" for all of them but the output layer and what routes tokens to experts. Each
    expert has an A and a B of its own. `train_whole` names modules that are trained as they are, in a copy; where
    embeddings and output layer are one matrix, so is their copy, whichever of them is named. `dropout` acts on what
    the adapters read, where gradients are asked for and nowhere else: the log-probabilities of training are random
    then. `dora` learns each row's length beside its direction; `rslora` scales by alpha / sqrt(r). Neither `dropout`
    nor `dora` goes with experts.

    Source: arXiv 2106.09685, section 4.1; DoRA 2402.09353, eq. 5; rsLoRA 2312.03732, section 3.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | list[str] = ALL_LINEAR
    dora: bool = False
    rslora: bool = False
    train_whole: tuple[str, ...] = ()


def add_lora(model: Any, config: LoraConfig, *, tied: bool = True) -> PeftModel:
    """Puts adapters on the model in place; everything else is frozen. Without `tied` a matrix that two modules share
    becomes two where one of them is trained whole, as it did in adapters that others saved so.

    Raises SteersmanError where `targets` match no layer, or the output layer, and where dropout or DoRA is asked for
    on experts.
    """
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    with _naming_targets(model, config):
        settings = _settings(model, config, task)
        adapters = with_adapters(model, settings) if not tied else _with_tied_adapters(model, settings)
    settle(model)
    _require_mergeable(model)
    _require_plain_output(model)
    return adapters  # type: ignore[return-value]


@unquantised()
def with_adapters(model: Any, settings: Any) -> PeftModel:
    """The model with adapters of peft's `settings` in it, without peft's warnings of what is no user's business: that
    it asks transformers for a property by its former name, and that it has a setting for tied weights."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        return peft.get_peft_model(model, settings)  # type: ignore[return-value]


def _with_tied_adapters(model: Any, settings: Any) -> PeftModel:
    """`with_adapters`, where embeddings and output layer that share a matrix share the copy that is trained too. The
    settings name both then, and peft, which ties by `ensure_weight_tying`, loads what is saved so as it is."""
    tables = _tied_tables(model)
    tied = bool(_matched(tables, settings.modules_to_save))
    if tied:
        settings.modules_to_save = _with_both(tables, settings.modules_to_save)
    settings.ensure_weight_tying = False  # peft gives the output layer a new module, without its bias
    adapters: Any = with_adapters(model, settings)
    if tied:
        first, second = (model.get_submodule(name).modules_to_save["default"] for name in tables)
        second.weight = first.weight
        adapters.peft_config["default"].ensure_weight_tying = True
    return adapters


def _tied_tables(model: Any) -> list[str]:
    """Names of the embeddings and the output layer where they are one matrix. None of an encoder-decoder, where more
    modules share it, and none of them can be trained whole."""
    if model.config.is_encoder_decoder:
        return []
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or table.weight is not head.weight:
        return []
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(table)], names[id(head)]]


def _matched(names: Iterable[str], wanted: Iterable[str] | None) -> list[str]:
    """Those of the modules' names that `wanted` ask for, by their ends, as peft reads them."""
    return [name for name in names if any(name.endswith(end) for end in wanted or ())]


def _with_both(tables: list[str], wanted: Iterable[str]) -> list[str]:
    """`wanted`, with the names of the tables that it does not match yet."""
    wanted = list(wanted)
    return [*wanted, *(name for name in tables if name not in _matched(tables, wanted))]


@unquantised()
def add_lora_to_trunk(trunk: Any, config: LoraConfig) -> None:
    """Puts adapters on a trunk in place and freezes its weights; the head that reads it stays as it is.

    Raises SteersmanError where `targets` match no layer.
    """
    import peft

    with _naming_targets(trunk, config):
        peft.inject_adapter_in_model(_settings(trunk, config, "FEATURE_EXTRACTION"), trunk)
    settle(trunk)
    _require_mergeable(trunk)


@unquantised()
def _settings(model: Any, config: LoraConfig, task: str) -> Any:
    import peft
    from transformers.pytorch_utils import Conv1D

    found = find_targets(model, config.targets)
    _require_plain_on_weights(found.weights, config.dropout, dora=config.dora)
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # a float does, whatever its annotation says
        lora_dropout=config.dropout,
        target_modules=found.layers,
        target_parameters=found.weights or None,
        exclude_modules=found.left_out or None,
        use_dora=config.dora,
        use_rslora=config.rslora,
        modules_to_save=list(config.train_whole) or None,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),  # GPT-2 stores weights transposed
        task_type=task,
    )


def _require_plain_on_weights(weights: list[str], dropout: float, *, dora: bool) -> None:
    """Raises SteersmanError where dropout or DoRA is asked for on weights that are no layer's: peft adds B A into
    them, so that there is no input to drop and no row whose length could be learned."""
    asked = [name for name, on in (("dropout", dropout > 0), ("dora", dora)) if on]
    if weights and asked:
        raise SteersmanError(
            f"lora.{asked[0]} can not act on the weights of a mixture of experts ({', '.join(weights[:3])}); leave "
            f"it out, or name in lora.targets the layers that are to be adapted, such as those of attention "
            "([q_proj, k_proj, v_proj, o_proj])"
        )


def _require_mergeable(model: nn.Module) -> None:
    """Raises SteersmanError where adapters were put on something that saving could not add them to."""
    if odd := adapters_left_out(model):
        raise SteersmanError(
            f"lora.targets name {', '.join(odd[:3])}, on which adapters could be trained and not be merged; name "
            "other layers"
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
    from peft.utils.save_and_load import get_peft_model_state_dict

    settings, saved = adapter_settings(folder, trainable=trainable), adapter_tensors(folder)
    with fitting(folder, model):
        tied = settings.ensure_weight_tying
        adapters: Any = (_with_tied_adapters if tied else with_adapters)(model, settings)
    settle(model)
    if odd := adapters_left_out(model):
        raise not_plain_layers(folder, odd)
    here = get_peft_model_state_dict(adapters, save_embedding_layers=False)
    state = adapters.state_dict()
    own = {name: x for name, x in saved.items() if name in here or not same_as_base(name, x, state)}
    require_fit(folder, model.name_or_path, here, own)
    _put(here, own)
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

    _require_plain_on_weights(sorted(settings.target_parameters or ()), asked.dropout, dora=False)
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
    }
    if _trained_whole(model) != _asked_whole(model, asked, tied=settings.ensure_weight_tying):
        pairs["train_whole"] = (sorted(settings.modules_to_save or []), sorted(asked.train_whole))
    if asked.targets != ALL_LINEAR and adapted_names(model) != named_targets(model, asked.targets):
        pairs["targets"] = tuple(x if isinstance(x, str) else sorted(x) for x in (_targets(settings), asked.targets))
    told = [f"{name} {have} (asked for: {want})" for name, (have, want) in pairs.items() if have != want]
    if not told:
        return []
    said = f"model.lora: the saved adapters go on as they are, with {', '.join(told)}; of these settings dropout acts"
    _log.warning(said)
    return [said]


def _trained_whole(model: nn.Module) -> set[str]:
    """Names of the modules that are trained whole."""
    from peft.utils.other import ModulesToSaveWrapper

    return {name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def _asked_whole(model: Any, asked: LoraConfig, *, tied: bool) -> set[str]:
    """Names of the modules that `asked` would train whole, on a model that has adapters already."""
    names = [name for name, _ in model.named_modules()]
    found = set(_matched(names, asked.train_whole))
    tables = _tied_tables(model) if tied else []
    return found | set(tables) if found & set(tables) else found


def tie_notes(model: Any) -> list[str]:
    """What to say where adapters meet embeddings and output layer that are one matrix."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    tables = _tied_tables(model)
    if not tables:
        return []
    first, second = tables
    table = model.get_submodule(first)
    if isinstance(table, ModulesToSaveWrapper):
        return [f"lora.train_whole: {first} and {second} are one matrix, which is trained and saved as one"]
    if isinstance(table, LoraLayer):
        return [
            f"lora.targets: {first} and {second} are one matrix, and adapters on {first} change only the input, so "
            f"the merged model has two; to train it as one, name {first.rpartition('.')[2]} in lora.train_whole"
        ]
    return []


def _targets(settings: Any) -> Any:
    """What peft's settings name, as `targets` do."""
    weights = list(settings.target_parameters or ())
    return [*settings.target_modules, *weights] if weights else settings.target_modules


def adapter_state(adapters: PeftModel) -> dict[str, Tensor]:
    """The adapters' tensors under the names that they have in peft's files."""
    from peft.utils.save_and_load import get_peft_model_state_dict

    return get_peft_model_state_dict(adapters)


def take_adapter_state(adapters: PeftModel, state: dict[str, Tensor]) -> None:
    """Puts tensors of such names in the place of the adapters' own; one that is missing stays as it was."""
    here = adapter_state(adapters)
    _put(here, {name: x for name, x in state.items() if name in here})


@torch.no_grad()
def _put(here: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Copies tensors into those of the same names. peft's own way renames some by the family's rules for whole
    models first, and leaves them out without a word where they have no place then (Laguna's shared experts)."""
    for name, x in state.items():
        here[name].copy_(x)


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
