"""Loading models from folders or by hub name into their roles, and refusing those that would not work."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers as hf  # its names are imported when they are asked for, which takes seconds

from steersman.model.adapter_files import AdapterNotes, adapter_notes
from steersman.model.adapters import adapted_folder, is_adapters, put_adapters
from steersman.model.attributes import AttributeModel, GatedModel
from steersman.model.bottleneck import BOTTLENECK, BottleneckModel
from steersman.model.ensemble import ENSEMBLE, EnsembleModel
from steersman.model.general import GENERAL, GeneralPreferenceModel
from steersman.model.lora import LoraConfig, load_lora
from steersman.model.meaning import Meaning
from steersman.model.policy import Policy
from steersman.model.quantise import Quantise
from steersman.model.routers import require_routers
from steersman.model.scalar import ScalarModel, fresh_head, require_outputs
from steersman.model.source import (
    Loading,
    find,
    own_code,
    read_config,
    read_tokenizer,
    read_weights,
    require_complete,
    require_vocabulary,
    router_notes,
    stored_dtype,
)
from steersman.run.device import resolve_device
from steersman.types import SteersmanError

HEADS = tuple(
    f"{head}.{weight}"
    for head in ("score", "score.out_proj", "classification_head.dense", "classification_head.out_proj")
    for weight in ("weight", "bias")
)
"""Weights of the heads of sequence classifiers."""

BFLOAT16_FAMILIES = ("t5", "mt5", "umt5", "longt5")
"""Families whose activations outgrow float16: they were trained in bfloat16."""

_log = logging.getLogger("steersman.model")


def load_policy(
    path: str | Path,
    *,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    attention: str | None = None,
    lora: LoraConfig | None = None,
    trainable: bool = True,
    pack: int | None = None,
    trust_remote_code: bool = False,
    quantise: Quantise = "none",
    routers: bool = False,
) -> Policy:
    """A language model, causal or encoder-decoder, and its tokenizer, as a policy.

    `device` None is CUDA where there is one. `attention` names one of the ecosystem's implementations, such as
    "sdpa" or "eager". Every dropout probability is set to 0, so that the log-probabilities of training are those
    of sampling (the first ratio is 1). `quantise` keeps the linear layers
    of a frozen base in 4 or 8 bits. A folder of saved adapters loads them on the model they name, with the tokenizer
    beside them where there is one; of `lora` dropout alone then acts. What was found or changed is in the policy's
    `notes`. Python code in the folder is run with `trust_remote_code` alone. With `routers` it must be a mixture of
    experts whose routers can be watched (`Policy.watch_routers`).

    Raises SteersmanError if there is nothing at the path, it is no language model that writes (a reward model or
    critic is none), weights are missing, the tokenizer is missing, has no end token or has more ids than the model
    has embeddings, or saved adapters are not plain LoRA or DoRA, or not of the model that they name.
    """
    what = Loading(*find(path), dtype, _device(device), attention, trust_remote_code, quantise)
    told = adapter_notes(what.source) if _holds_adapters(what) else None
    if told is not None and told.of_scalar:
        raise _no_text(what.source)
    base = what if told is None else _base(what, told)
    notes: list[str] = []
    config = read_config(base.source, base.local, notes, trust=base.trust)
    stored = stored_dtype(config)
    _require_writer(base, config)
    if routers:
        require_routers(base.source, config)
    if dtype == "float16" and config.model_type in BFLOAT16_FAMILIES:
        notes.append(
            f"{base.source}: {config.model_type} models are known to overflow in float16; use bfloat16 or float32"
        )
        _log.warning(notes[-1])
    speaks = what if _has_tokenizer(what.source) else base
    tokenizer = read_tokenizer(speaks.source, speaks.local, trust=speaks.trust)
    auto = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    model, info = read_weights(auto, config, base)
    require_complete(base.source, model, info)
    require_vocabulary(speaks.source, tokenizer, model)
    policy = Policy(model, tokenizer, pack=pack)
    policy.notes, policy.stored_dtype = notes + ([] if routers else router_notes(base.source, config)), stored
    if told is not None:
        policy.register_adapters(load_lora(model, what.source, trainable=trainable))
        policy.starts_adapted = True
        policy.notes.append(_from_folder(what.source, told, model))
    if lora is not None:
        policy.adapt(lora)
    return policy if trainable else policy.requires_grad_(False)


def _require_writer(what: Loading, config: Any) -> None:
    """Raises SteersmanError for a config that is of no language model, causal or encoder-decoder."""
    if is_classifier(config):
        raise _no_text(what.source)
    known = hf.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else hf.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in known:
        return
    if type(config) in hf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise SteersmanError(
            f"{what.source}: a model of type '{config.model_type}' reads images beside text, and no verb passes a "
            "processor's pixels beside the token ids; give a language model, such as the one that it was built on"
        )
    if not (what.trust and "AutoModelForCausalLM" in own_code(config)):
        raise SteersmanError(
            f"{what.source}: a model of type '{config.model_type}' is not a causal language model, nor an encoder "
            "with a decoder; give a decoder model such as a GPT-2, Llama, Qwen or Gemma, or a T5 or BART"
        )


def load_scalar(
    path: str | Path,
    *,
    init: Literal["auto", "fresh"] = "auto",
    dtype: str = "float32",
    device: str | torch.device | None = None,
    attention: str | None = None,
    trainable: bool = True,
    trust_remote_code: bool = False,
    quantise: Quantise = "none",
) -> ScalarModel:
    """A reward model or critic: a sequence classifier with one output, or a language model's trunk with a new head.

    A folder that holds a sequence classifier loads as it is; with `init="fresh"`, or from a causal language
    model, the head is new and all zeros: every first score is 0 and the first pairwise loss is log 2 exactly,
    whatever the trunk's scale, and the head's own gradient does not vanish there. `notes` say so.

    Raises SteersmanError as `load_policy` does, and if the head of a classifier does not give exactly one number.
    """
    what = Loading(*find(path), dtype, _device(device), attention, trust_remote_code, quantise)
    model = _scalar(what, init)
    return model if trainable else model.requires_grad_(False)


def _scalar(what: Loading, init: str) -> ScalarModel:
    """What `load_scalar` gives, trainable."""
    if _holds_adapters(what):
        return _adapted(what, init)  # type: ignore[return-value]
    notes: list[str] = []
    config = read_config(what.source, what.local, notes, trust=what.trust)
    meaning = Meaning.of(config)
    # the trunk of a model of several attributes is what a critic can begin from
    fresh = init == "fresh" or not is_classifier(config) or len(meaning.attributes) > 1
    if not fresh and config.num_labels != 1:
        raise SteersmanError(
            f"{what.source}: config.num_labels is {config.num_labels}, but a reward model or critic must give "
            "exactly one number. If it was saved by mistake with the default of 2, train it again with "
            "num_labels=1; to keep the trunk and start a new head, load it with init='fresh'"
        )
    stored = stored_dtype(config)
    scalar = ScalarModel(*_classifier(what, config, 1, fresh=fresh, notes=notes))
    scalar.notes, scalar.stored_dtype = notes, stored
    return scalar


def load_reward(
    path: str | Path,
    *,
    attributes: Sequence[str] = (),
    dtype: str = "float32",
    device: str | torch.device | None = None,
    attention: str | None = None,
    trainable: bool = True,
    trust_remote_code: bool = False,
    quantise: Quantise = "none",
) -> ScalarModel | AttributeModel | GatedModel:
    """A reward model as it was saved: of one number, of several attributes, or with gating over them.

    With `attributes`, one output for each: a saved model of just these, or new heads of zeros on the trunk.

    Raises SteersmanError as `load_scalar` does, and where a saved model has other attributes than those asked for.
    """
    what = Loading(*find(path), dtype, _device(device), attention, trust_remote_code, quantise)
    model = _reward(what, attributes)
    return model if trainable else model.requires_grad_(False)


def _reward(what: Loading, attributes: Sequence[str]) -> ScalarModel | AttributeModel | GatedModel:
    """What `load_reward` gives, trainable."""
    if _holds_adapters(what):
        return _adapted(what, "auto")
    notes: list[str] = []
    config = read_config(what.source, what.local, notes, trust=what.trust)
    meaning = Meaning.of(config)
    wanted = tuple(attributes) or meaning.attributes
    if len(wanted) < 2:
        return _scalar(what, "auto")
    fresh = len(meaning.attributes) < 2
    if not fresh and wanted != meaning.attributes:
        raise SteersmanError(
            f"{what.source}: a reward model of {', '.join(meaning.attributes)}, but the data rates "
            f"{', '.join(wanted)}; name the same attributes in the same order in data.scores, or start from its "
            "language model"
        )
    stored = stored_dtype(config)
    kinds = {ENSEMBLE: EnsembleModel, BOTTLENECK: BottleneckModel, GENERAL: GeneralPreferenceModel}
    kind = GatedModel if meaning.gating else kinds.get(meaning.kind, AttributeModel)
    loaded = kind(*_classifier(what, config, len(wanted), fresh=fresh, notes=notes), wanted)
    loaded.read_beside(Path(what.source))
    loaded.notes, loaded.stored_dtype = notes, stored
    return loaded


def _adapted(what: Loading, init: str) -> ScalarModel | AttributeModel | GatedModel:
    """The reward model or critic whose adapters and head lie in a folder, on the model that it names."""
    source = what.source
    told, found = adapter_notes(source), adapted_folder(source)
    if init == "fresh":
        raise SteersmanError(f"{source}: adapters with a head of their own; for a new head name {found.base}")
    base, attributes = _base(what, told), found.meaning.attributes
    model = _reward(base, attributes) if len(attributes) > 1 else _scalar(base, "fresh")
    if _has_tokenizer(source):
        model.tokenizer = read_tokenizer(source, local=True, trust=what.trust)
        require_vocabulary(source, model.tokenizer, model.model)
    model.means(found.meaning)
    put_adapters(model, source)
    model.notes.append(_from_folder(source, told, model.model))
    return model


def _holds_adapters(what: Loading) -> bool:
    return what.local and is_adapters(what.source)


def _base(what: Loading, told: AdapterNotes) -> Loading:
    """The model that a folder of adapters names, loaded as they are. Raises SteersmanError where it is not there."""
    source, local = _find_base(what.source, told)
    return replace(what, source=source, local=local)


def _find_base(source: str, told: AdapterNotes) -> tuple[str, bool]:
    """Where the model lies that a folder of adapters names. Raises SteersmanError where it is not there."""
    try:
        return find(told.base)
    except SteersmanError as error:
        raise SteersmanError(
            f"{source}: its adapters are on {told.base}, which is not there ({error}); write where it is as "
            "base_model_name_or_path in adapter_config.json"
        ) from error


def _from_folder(source: str, told: AdapterNotes, model: Any) -> str:
    """The note on adapters that were put on a model."""
    numbers = [re.search(r"\.(\d+)\.", name) for name, _ in model.named_parameters() if ".lora_" in name]
    last = max((int(found[1]) for found in numbers if found), default=None)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    few = "" if last is None or last + 1 >= layers else f", on its first {last + 1} of {layers} layers alone"
    off = f"; their dropout of {told.dropout:g} is off unless model.lora.dropout asks for it" if told.dropout else ""
    return f"adapters from {source} on {told.base}{few}{off}"


def _has_tokenizer(source: str) -> bool:
    """Whether a folder holds a tokenizer, as one of adapters may or may not."""
    return any((Path(source) / name).exists() for name in ("tokenizer_config.json", "tokenizer.json"))


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, without the model. Raises SteersmanError where there is none."""
    source, local = find(path)
    if local and is_adapters(source) and not _has_tokenizer(source):
        source, local = _find_base(source, adapter_notes(source))
    return read_tokenizer(source, local, trust=trust_remote_code)


def gives_numbers(path: str | Path, *, trust_remote_code: bool = False) -> bool:
    """Whether a path holds a reward model or critic, whole or as adapters, and no language model. Raises
    SteersmanError where there is neither."""
    source, local = find(path)
    if local and is_adapters(source):
        return adapter_notes(source).of_scalar
    return is_classifier(read_config(source, local, [], trust=trust_remote_code))


def _no_text(source: str) -> SteersmanError:
    """The error for a reward model or critic in a language model's place."""
    return SteersmanError(
        f"{source}: a reward model or critic, which gives numbers and writes no text; give the language model that "
        "it was trained from, or name it where a reward model is asked for (reward.parts.NAME.model)"
    )


def is_classifier(config: Any) -> bool:
    """Whether a config is of a sequence classifier, with a head of its own."""
    return any("ForSequenceClassification" in name for name in config.architectures or [])


def _classifier(what: Loading, config: Any, outputs: int, *, fresh: bool, notes: list[str]) -> tuple[Any, Any]:
    """A sequence classifier with so many outputs, its head all zeros where it is `fresh`, and the tokenizer."""
    source = what.source
    own = what.trust and "AutoModelForSequenceClassification" in own_code(config)
    if type(config) not in hf.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not own:
        raise SteersmanError(
            f"{source}: there is no sequence classifier of type '{config.model_type}', so it can not be a reward "
            "model or a critic of its own; a critic on the policy's states can (critic.init: shared), or take a "
            "method without a critic (grpo, rloo)"
        )
    config.num_labels = outputs
    if fresh:
        Meaning.forget(config)
    tokenizer = read_tokenizer(source, what.local, trust=what.trust)
    model, info = read_weights(hf.AutoModelForSequenceClassification, config, what)
    require_complete(source, model, info, HEADS if fresh else ())
    require_outputs(model, outputs)
    if fresh:
        fresh_head(model)
        notes.append(f"{source}: a new scalar head of zeros on its trunk; the output layer is not used")
        _log.info(notes[-1])
    require_vocabulary(source, tokenizer, model)
    return model, tokenizer


def _device(device: str | torch.device | None) -> torch.device:
    return resolve_device("auto" if device is None else str(device))
