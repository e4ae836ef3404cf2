"""Loading models from folders or by hub name, and refusing those that would not work, with the reason.

A path that exists is read from disk alone; no hub is asked.
"""

from __future__ import annotations

import difflib
import json
import logging
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from steersman.model.lora import LoraConfig, add_lora, require_plain_output
from steersman.model.policy import Policy
from steersman.model.quiet import silence
from steersman.model.scalar import ScalarModel, require_one_output
from steersman.types import SteersmanError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
NOISE = ("dropout", "pdrop", "layerdrop", "jitter_noise", "drop_path")
"""Parts of the names of config fields that make a forward pass in training mode random."""

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
    """A causal language model and its tokenizer, as a policy.

    `device` None is CUDA where there is one. `attention` names one of the ecosystem's implementations, such as
    "sdpa" or "eager". Every dropout probability is set to 0, so that the log-probabilities of training are those
    of sampling (the first ratio is 1). A folder of saved adapters loads them on the model they name. What was
    found or changed is in the policy's `notes`.

    Raises SteersmanError if there is nothing at the path, it is no causal language model, weights are missing,
    the tokenizer is missing, has no end token or has more ids than the model has embeddings.
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
    if config.is_encoder_decoder:
        raise SteersmanError(f"{base}: encoder-decoder models ({config.model_type}) are not supported yet")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SteersmanError(
            f"{base}: a model of type '{config.model_type}' is not a causal language model; give a decoder model "
            "such as a GPT-2, Llama, Qwen or Gemma"
        )
    tokenizer = _tokenizer(base, base_local)
    model, info = _weights(AutoModelForCausalLM, base, base_local, config, dtype, attention)
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
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise SteersmanError(f"{source}: there is no sequence classifier of type '{config.model_type}'")
    classifier = any("ForSequenceClassification" in name for name in config.architectures or [])
    fresh = init == "fresh" or not classifier
    if not fresh and config.num_labels != 1:
        raise SteersmanError(
            f"{source}: config.num_labels is {config.num_labels}, but a reward model or critic must give exactly "
            "one number. If it was saved by mistake with the default of 2, train it again with num_labels=1; to "
            "keep the trunk and start a new head, load it with init='fresh'"
        )
    config.num_labels = 1
    tokenizer = _tokenizer(source, local)
    model, info = _weights(AutoModelForSequenceClassification, source, local, config, dtype, attention)
    _complete(source, model, info, "score.weight" if fresh else "")
    require_one_output(model)
    if fresh:
        nn.init.zeros_(model.score.weight)
        notes.append(f"{source}: a new scalar head of zeros on its trunk; the output layer is not used")
        _log.info(notes[-1])
    _check_vocabulary(source, tokenizer, model)
    scalar = ScalarModel(model.to(_device(device)), tokenizer)
    scalar.notes = notes
    return scalar if trainable else scalar.requires_grad_(False)


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


def _complete(source: str, model: Any, info: dict[str, Any], allowed: str = "") -> None:
    """Raises SteersmanError unless every weight but the `allowed` one came from disk in its right shape."""
    mismatched: set[tuple[Any, ...]] = info["mismatched_keys"]  # (name, stored shape, shape of the model)
    shapes = {name: pair for name, *pair in mismatched if name != allowed}
    if "score.weight" in shapes:
        raise SteersmanError(
            f"{source}: config.num_labels is 1, but the shapes of the stored `score` head and of one with a single "
            f"output are {_shapes(shapes['score.weight'])}; train the head again with num_labels=1, or start a "
            "new one with init='fresh'"
        )
    missing = {*info["missing_keys"], *shapes} - {allowed}
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
