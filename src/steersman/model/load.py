"""Loading models from folders or by hub name, and refusing those that would not work, with the reason.

A path that exists is read from disk alone; no hub is asked.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from safetensors.torch import load_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from steersman.model.attributes import GATING_FILE, AttributeModel, GatedModel
from steersman.model.lora import LoraConfig, add_lora, require_plain_output
from steersman.model.meaning import Meaning
from steersman.model.policy import Policy
from steersman.model.quiet import silence
from steersman.model.scalar import ScalarModel, fresh_head, require_outputs
from steersman.types import SteersmanError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
NOISE = ("dropout", "pdrop", "layerdrop", "jitter_noise", "drop_path")
"""Parts of the names of config fields that make a forward pass in training mode random."""

HEADS = ("score.weight", *(f"classification_head.{x}.{y}" for x in ("dense", "out_proj") for y in ("weight", "bias")))
"""Weights of the heads of sequence classifiers."""

WIDE = ("t5", "mt5", "umt5", "longt5")
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
) -> Policy:
    """A language model, causal or encoder-decoder, and its tokenizer, as a policy.

    `device` None is CUDA where there is one. `attention` names one of the ecosystem's implementations, such as
    "sdpa" or "eager". Every dropout probability is set to 0, so that the log-probabilities of training are those
    of sampling (the first ratio is 1). A folder of saved adapters loads them on the model they name. What was
    found or changed is in the policy's `notes`.

    Raises SteersmanError if there is nothing at the path, it is no language model that writes, weights are
    missing, the tokenizer is missing, has no end token or has more ids than the model has embeddings.
    """
    source, local = _find(path)
    saved_adapters = local and (Path(source) / "adapter_config.json").exists()
    if saved_adapters:
        named = json.loads((Path(source) / "adapter_config.json").read_text())["base_model_name_or_path"]
        base, base_local = _find(named)
    else:
        base, base_local = source, local
    notes: list[str] = []
    config = _config(base, base_local, notes)
    pair = config.is_encoder_decoder
    if type(config) not in (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if pair else MODEL_FOR_CAUSAL_LM_MAPPING):
        raise SteersmanError(
            f"{base}: a model of type '{config.model_type}' is not a causal language model, nor an encoder with a "
            "decoder; give a decoder model such as a GPT-2, Llama, Qwen or Gemma, or a T5 or BART"
        )
    if dtype == "float16" and config.model_type in WIDE:
        notes.append(f"{base}: {config.model_type} models are known to overflow in float16; use bfloat16 or float32")
        _log.warning(notes[-1])
    tokenizer = _tokenizer(base, base_local)
    model, info = _weights(
        AutoModelForSeq2SeqLM if pair else AutoModelForCausalLM, base, base_local, config, dtype, attention
    )
    _complete(base, model, info)
    _check_vocabulary(base, tokenizer, model)
    model = model.to(_device(device))
    policy = Policy(model, tokenizer, pack=pack)
    policy.notes = notes
    if saved_adapters:
        _adapters(policy, peft.PeftModel.from_pretrained(model, source, is_trainable=trainable))
        require_plain_output(model)
        notes.append(f"adapters from {source} on {base}")
    elif lora is not None:
        _adapters(policy, add_lora(model, lora))
    if not trainable:
        policy.requires_grad_(False)
    return policy


def load_scalar(
    path: str | Path,
    *,
    init: Literal["auto", "fresh"] = "auto",
    dtype: str = "float32",
    device: str | torch.device | None = None,
    attention: str | None = None,
    trainable: bool = True,
) -> ScalarModel:
    """A reward model or critic: a sequence classifier with one output, or a language model's trunk with a new head.

    A folder that holds a sequence classifier loads as it is; with `init="fresh"`, or from a causal language
    model, the head is new and all zeros: every first score is 0 and the first pairwise loss is log 2 exactly,
    whatever the trunk's scale, and the head's own gradient does not vanish there. `notes` say so.

    Raises SteersmanError as `load_policy` does, and if the head of a classifier does not give exactly one number.
    """
    source, local = _find(path)
    notes: list[str] = []
    config = _config(source, local, notes)
    meaning = Meaning.of(config)
    # the trunk of a model of several attributes is what a critic can begin from
    fresh = init == "fresh" or not is_classifier(config) or len(meaning.attributes) > 1
    if not fresh and config.num_labels != 1:
        raise SteersmanError(
            f"{source}: config.num_labels is {config.num_labels}, but a reward model or critic must give exactly "
            "one number. If it was saved by mistake with the default of 2, train it again with num_labels=1; to "
            "keep the trunk and start a new head, load it with init='fresh'"
        )
    model, tokenizer = _classifier(source, local, config, 1, fresh, dtype, attention, notes)
    scalar = ScalarModel(model.to(_device(device)), tokenizer)
    scalar.notes = notes
    return scalar if trainable else scalar.requires_grad_(False)


def load_reward(
    path: str | Path,
    *,
    attributes: Sequence[str] = (),
    dtype: str = "float32",
    device: str | torch.device | None = None,
    attention: str | None = None,
    trainable: bool = True,
) -> ScalarModel | AttributeModel | GatedModel:
    """A reward model as it was saved: of one number, of several attributes, or with gating over them.

    With `attributes`, one output for each: a saved model of just these, or new heads of zeros on the trunk.

    Raises SteersmanError as `load_scalar` does, and where a saved model has other attributes than those asked for.
    """
    source, local = _find(path)
    notes: list[str] = []
    config = _config(source, local, notes)
    meaning = Meaning.of(config)
    wanted = tuple(attributes) or meaning.attributes
    if len(wanted) < 2:
        return load_scalar(path, dtype=dtype, device=device, attention=attention, trainable=trainable)
    fresh = len(meaning.attributes) < 2
    if not fresh and wanted != meaning.attributes:
        raise SteersmanError(
            f"{source}: a reward model of {', '.join(meaning.attributes)}, but the data rates {', '.join(wanted)}; "
            "name the same attributes in the same order in data.scores, or start from its language model"
        )
    model, tokenizer = _classifier(source, local, config, len(wanted), fresh, dtype, attention, notes)
    model = model.to(_device(device))
    kind = GatedModel if meaning.gating else AttributeModel
    loaded = kind(model, tokenizer, wanted)
    if isinstance(loaded, GatedModel):
        loaded.gating.load_state_dict(load_file(Path(source) / GATING_FILE, device=str(loaded.device)))
    loaded.notes = notes
    return loaded if trainable else loaded.requires_grad_(False)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model, without the model. Raises SteersmanError where there is none."""
    source, local = _find(path)
    return _tokenizer(source, local)


def is_classifier(config: Any) -> bool:
    """Whether a config is of a sequence classifier, with a head of its own."""
    return any("ForSequenceClassification" in name for name in config.architectures or [])


def _classifier(
    source: str,
    local: bool,
    config: Any,
    outputs: int,
    fresh: bool,
    dtype: str,
    attention: str | None,
    notes: list[str],
) -> tuple[Any, Any]:
    """A sequence classifier with so many outputs, its head all zeros where it is `fresh`, and the tokenizer."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise SteersmanError(f"{source}: there is no sequence classifier of type '{config.model_type}'")
    config.num_labels = outputs
    if fresh:
        Meaning.forget(config)
    tokenizer = _tokenizer(source, local)
    model, info = _weights(AutoModelForSequenceClassification, source, local, config, dtype, attention)
    _complete(source, model, info, HEADS if fresh else ())
    require_outputs(model, outputs)
    if fresh:
        fresh_head(model)
        notes.append(f"{source}: a new scalar head of zeros on its trunk; the output layer is not used")
        _log.info(notes[-1])
    _check_vocabulary(source, tokenizer, model)
    return model, tokenizer


def _find(path: str | Path) -> tuple[str, bool]:
    """The path as a string, and whether it is a local folder. What looks like a path must exist."""
    text = str(path)
    local = Path(text).expanduser()
    if local.is_dir():
        if not any((local / name).exists() for name in ("config.json", "adapter_config.json")):
            inside = sorted(p.parent.name for p in local.glob("*/config.json"))
            hint = f"; did you mean its folder {_some(inside)}?" if inside else ""
            raise SteersmanError(f"{text}: no model there (no config.json){hint}")
        return str(local), True
    if local.exists():
        raise SteersmanError(f"{text}: is a file; give the model's folder")
    parts = text.split("/")
    # run folders are under runs/ unless told otherwise, and no hub should be asked for one that is missing
    like_path = isinstance(path, Path) or text.startswith((".", "~", "/", "runs/")) or len(parts) > 2
    if like_path or Path(parts[0]).is_dir():
        raise SteersmanError(f"{text}: no such model folder{_nearest(local)}")
    return text, False


def _nearest(path: Path) -> str:
    """What lies where the path stops to exist, the most similar names first."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    names = [p.name for p in missing.parent.iterdir() if p.is_dir() and not p.name.startswith(".")]
    near = difflib.get_close_matches(missing.name, names, n=3) or sorted(names)[:8]
    where = f"in {missing.parent.resolve()}"
    return f"; {where} there is {', '.join(near)}" if near else f"; {where} there is no folder at all"


def _config(source: str, local: bool, notes: list[str]) -> Any:
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=local)
    except (OSError, ValueError, KeyError) as error:
        if local:
            raise SteersmanError(f"{source}/config.json can not be read as a model's config: {error}") from error
        raise SteersmanError(
            f"{source}: no such folder{_nearest(Path(source))}, and no hub model of that name could be fetched: "
            f"{str(error).splitlines()[0]}"
        ) from error
    changed = dropout_off(config)
    if changed:
        was = ", ".join(f"{key} {value}" for key, value in changed.items())
        notes.append(f"{source}: dropout is off while training (was {was}), so that sampling and training agree")
        _log.info(notes[-1])
    return config


def dropout_off(config: Any) -> dict[str, float]:
    """Sets every probability of a random forward pass in a config to 0; returns what was not 0 before."""
    changed = {}
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            # GPT-2's summary head, which has a dropout of its own, is not a part of any role
            noisy = any(word in key for word in NOISE) and not key.startswith("summary")
            if noisy and isinstance(value, float) and value > 0:
                setattr(part, key, 0.0)
                changed[key] = value
    return changed


def _tokenizer(source: str, local: bool) -> Any:
    tokenizer: Any = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        # for some families a folder without tokenizer files gives one that knows its special tokens alone
        found = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
        reason = "" if found else "no vocabulary there"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
    if reason:
        raise SteersmanError(
            f"{source}: no tokenizer could be loaded from there ({reason}); save the model's tokenizer into the "
            "same folder with tokenizer.save_pretrained"
        )
    if tokenizer.eos_token_id is None:
        raise SteersmanError(
            f"{source}: its tokenizer has no end-of-sequence token, so no response could ever end; set "
            '"eos_token" in tokenizer_config.json to a token of its vocabulary'
        )
    return tokenizer


def _weights(
    auto: Any, source: str, local: bool, config: Any, dtype: str, attention: str | None
) -> tuple[Any, dict[str, Any]]:
    if dtype not in DTYPES:
        raise SteersmanError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    more = {} if attention is None else {"attn_implementation": attention}
    try:
        with silence():
            return auto.from_pretrained(
                source,
                config=config,
                dtype=DTYPES[dtype],
                local_files_only=local,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the loading info, and refused below by name
                **more,
            )
    except Exception as error:  # each weight format has errors of its own
        raise SteersmanError(f"{source}: its weights can not be loaded: {error}") from error


def _complete(source: str, model: Any, info: dict[str, Any], allowed: Sequence[str] = ()) -> None:
    """Raises SteersmanError unless every weight but the `allowed` ones came from disk in its right shape."""
    mismatched: set[tuple[Any, ...]] = info["mismatched_keys"]  # (name, stored shape, shape of the model)
    shapes = {name: pair for name, *pair in mismatched if name not in allowed}
    if "score.weight" in shapes:
        raise SteersmanError(
            f"{source}: config.num_labels is 1, but the shapes of the stored `score` head and of one with a single "
            f"output are {_shapes(shapes['score.weight'])}; train the head again with num_labels=1, or start a "
            "new one with init='fresh'"
        )
    missing = {*info["missing_keys"], *shapes} - {*allowed}
    if missing:
        stored = _some(model.config.architectures or ["an unknown architecture"])
        raise SteersmanError(
            f"{source}: weights of {type(model).__name__} are missing or of another shape there "
            f"({_some(missing)}); the folder holds {stored}"
        )


def _shapes(pair: list[Any]) -> str:
    return " and ".join(str(list(shape)) for shape in pair)


def _check_vocabulary(source: str, tokenizer: Any, model: Any) -> None:
    """More embedding rows than ids are padding, and fine; fewer are not."""
    ids = max(tokenizer.get_vocab().values()) + 1
    rows = model.get_input_embeddings().weight.shape[0]
    if ids > rows:
        raise SteersmanError(
            f"{source}: its tokenizer has ids up to {ids - 1}, but the model's vocabulary has {rows} rows; the "
            "tokenizer belongs to another model, or tokens were added without model.resize_token_embeddings"
        )


def _adapters(policy: Policy, adapters: Any) -> None:
    # past nn.Module, which would count every weight twice
    object.__setattr__(policy, "_adapters", adapters)


def _device(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
