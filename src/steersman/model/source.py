"""The parts of a model in a folder or under a hub name: config, tokenizer and weights, refused with the reason.

A path that exists is read from disk alone; no hub is asked.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from steersman.model.quantise import Quantise, as_stored_quantised, finish_quantisation, quantisation
from steersman.model.quiet import silence
from steersman.run import device
from steersman.types import SteersmanError

DTYPES = device.DTYPES | {"auto": "auto"}
DROPOUT_NAMES = ("dropout", "pdrop", "layerdrop", "drop_path")
"""Parts of the names of config fields that make a forward pass in training mode random. A router's jitter is
none: routers stay in evaluation mode, and PhiMoE weighs its experts by it there too."""

STATE_LAYERS = ("linear_attention", "conv")
"""Kinds of layers that carry a state from token to token, and no keys."""
STATELESS_LAYERS = ("mlp", "moe")
"""Kinds of layers that keep nothing of the text before."""
LAYER_KINDS = {"full_attention", "sliding_attention", "hybrid", *STATE_LAYERS, *STATELESS_LAYERS}
"""Kinds of layers that can be trained and sampled from."""
ALIBI_FAMILIES = ("bloom", "mpt")
UNCACHED_FAMILIES = ("openai-gpt", "hrm_text", "minimax")
"""Families without a cache of one key and value, or of one state, a layer, by which responses are sampled."""

_log = logging.getLogger("steersman.model")


@dataclass(frozen=True, slots=True)
class Loading:
    """A model that is to be loaded, and how.

    `source` is a folder (`local`) or a hub name. `dtype` names the precision, `attention` one of transformers'
    implementations (None: its choice), `quantise` how the linear layers are stored. With `trust` Python code that
    comes with the model is run.
    """

    source: str
    local: bool
    dtype: str
    device: torch.device
    attention: str | None
    trust: bool
    quantise: Quantise


def find(path: str | Path, marks: Sequence[str] = ("config.json", "adapter_config.json")) -> tuple[str, bool]:
    """The path as a string, and whether it is a local folder. What looks like a path must exist, and a folder hold
    one of the files `marks`."""
    text = str(path)
    local = Path(text).expanduser()
    if local.is_dir():
        if not any((local / name).exists() for name in marks):
            inside = {p.parent.name for mark in marks for p in local.glob(f"*/{mark}")}
            hint = f"; did you mean its folder {_some(inside)}?" if inside else ""
            raise SteersmanError(f"{text}: no model there (no {marks[0]}){hint}")
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


def read_config(source: str, local: bool, notes: list[str], *, trust: bool = False) -> Any:
    """The config, dropout off, which is noted; `trust` lets code in the folder run.

    Raises SteersmanError where there is none, it can not be read, it needs code that is not trusted, or it is of a
    family that can not be trained here.
    """
    try:
        config = hf.AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=trust)
    except Exception as error:  # families check their configs in ways of their own
        _require_no_code(source, error)
        if local:
            raise SteersmanError(f"{source}/config.json can not be read as a model's config: {error}") from error
        raise SteersmanError(
            f"{source}: no such folder{_nearest(Path(source))}, and no hub model of that name could be fetched: "
            f"{str(error).splitlines()[0]}"
        ) from error
    require_family(source, config)
    changed = dropout_off(config)
    if changed:
        was = ", ".join(f"{key} {value}" for key, value in changed.items())
        notes.append(f"{source}: dropout is off while training (was {was}), so that sampling and training agree")
        _log.info(notes[-1])
    limit = _rotations_change_at(config)
    if limit is not None:
        notes.append(
            f"{source}: a row longer than {limit} tokens changes the rotations of all rows that are read with it, so "
            "that log-probabilities depend on a row's company; keep prompt and response within that "
            "(data.max_length, rollout.max_new_tokens)"
        )
        _log.warning(notes[-1])
    return config


def _rotations_change_at(config: Any) -> int | None:
    """The length in tokens (`original_max_position_embeddings`) past which a read takes other angles for every row,
    by its longest one; None where angles do not depend on that. Source: LongRoPE 2402.13753; dynamic NTK scaling."""
    text = config.get_text_config(decoder=True)
    told: dict[str, Any] = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for part in (told, *(kind for kind in told.values() if isinstance(kind, dict))):
        if part.get("rope_type", part.get("type")) in ("longrope", "dynamic"):
            own = getattr(text, "original_max_position_embeddings", None)
            return part.get("original_max_position_embeddings") or own or text.max_position_embeddings
    return None


def require_family(source: str, config: Any) -> None:
    """Raises SteersmanError for a family whose layers do not take rows laid side by side, nor the rollout's cache:
    those without attention, and those whose positions are a slope of the attention mask."""
    text = config.get_text_config(decoder=True)
    odd = sorted(set(getattr(text, "layer_types", None) or []) - LAYER_KINDS)
    if config.model_type in ALIBI_FAMILIES or getattr(text, "alibi", False):
        why = "its positions are slopes of the attention mask (ALiBi)"
    elif odd:
        why = f"it has layers of kind {', '.join(odd)}"
    elif config.model_type in UNCACHED_FAMILIES:
        why = "it has no cache of one key and value, or of one state, a layer, by which responses are sampled"
    elif not (hasattr(text, "num_attention_heads") or getattr(text, "layer_types", None)):
        why = "it has no attention"
    else:
        return
    raise SteersmanError(
        f"{source}: models of type '{config.model_type}' are not supported: {why}; give a model with full, "
        "sliding-window or linear attention, such as a Llama, Qwen, Gemma or GPT-2"
    )


def router_notes(source: str, config: Any) -> list[str]:
    """What to say of a mixture of experts whose router was trained to spread its tokens, where no objective does."""
    text = config.get_text_config(decoder=True)
    counts = (getattr(text, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    experts = max((n for n in counts if isinstance(n, int)), default=0)
    weight = getattr(text, "router_aux_loss_coef", 0.0)
    if experts < 2 or not weight:
        return []
    return [
        f"{source}: its router balances {experts} experts by a loss of weight {weight:g} (router_aux_loss_coef), "
        "which is not part of the objective here; in sft, dpo, kto and bco train.router_loss adds it"
    ]


def own_code(config: Any) -> dict[str, str]:
    """Which of the library's Auto classes a config has code of its own for."""
    return getattr(config, "auto_map", None) or {}


def _require_no_code(source: str, error: Exception) -> None:
    """Raises SteersmanError where an error of the library's says that code would have to be run."""
    if "trust_remote_code" in str(error):
        raise SteersmanError(
            f"{source}: it comes with Python code of its own (auto_map in its config files), which is not run. "
            "If you have read that code and trust it, model.trust_remote_code: true runs it, for the model that a "
            "recipe trains"
        ) from error


def stored_dtype(config: Any) -> torch.dtype | None:
    """The precision that a config says its weights were saved in; None where it does not say."""
    stored = config.dtype if config.dtype is not None else config.get_text_config().dtype
    return getattr(torch, stored.removeprefix("torch.")) if isinstance(stored, str) else stored


def dropout_off(config: Any) -> dict[str, float]:
    """Sets every probability of a random forward pass in a config to 0; returns what was not 0 before."""
    changed = {}
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            # GPT-2's summary head, which has a dropout of its own, is not a part of any role
            noisy = any(word in key for word in DROPOUT_NAMES) and not key.startswith("summary")
            if noisy and isinstance(value, float) and value > 0:
                setattr(part, key, 0.0)
                changed[key] = value
    return changed


def read_tokenizer(source: str, local: bool, *, trust: bool = False) -> Any:
    """The tokenizer; `trust` lets code in the folder run.

    Raises SteersmanError where there is none, it needs code that is not trusted, or it has no vocabulary or no end
    token.
    """
    tokenizer: Any = None
    try:
        tokenizer = hf.AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=trust)
        # for some families a folder without tokenizer files gives one that knows its special tokens alone
        found = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
        reason = "" if found else "no vocabulary there"
    except (OSError, ValueError, KeyError, TypeError) as error:
        _require_no_code(source, error)
        reason = str(error).splitlines()[0]
    if reason:
        mend = (
            "save the model's tokenizer into the same folder with tokenizer.save_pretrained"
            if local
            else f"there is no folder of that name{_nearest(Path(source))}"
        )
        raise SteersmanError(f"{source}: no tokenizer could be loaded from there ({reason}); {mend}")
    if tokenizer.eos_token_id is None:
        raise SteersmanError(
            f"{source}: its tokenizer has no end-of-sequence token, so no response could ever end; set "
            '"eos_token" in tokenizer_config.json to a token of its vocabulary'
        )
    return tokenizer


def read_weights(auto: Any, config: Any, what: Loading) -> tuple[Any, dict[str, Any]]:
    """The model of class `auto` on its device, and what its loading tells; its linear layers are in 4 or 8 bits
    where the folder holds them so or `quantise` asks for it.

    Raises SteersmanError where weights can not be read, or are quantised by another method than bitsandbytes.
    """
    source, dtype, quantise = what.source, what.dtype, what.quantise
    if dtype not in DTYPES:
        raise SteersmanError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    _require_own_files(source)
    more: dict[str, Any] = {} if what.attention is None else {"attn_implementation": what.attention}
    keep = ["score", "classification_head"] if "Sequence" in auto.__name__ else None
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        if quantise != "none":
            raise SteersmanError(f"{source}: its weights are quantised already; remove model.quantise")
        config.quantization_config = as_stored_quantised(source, stored, DTYPES[dtype], keep)
    elif quantise != "none":
        more["quantization_config"] = quantisation(quantise, getattr(torch, dtype), keep)
    quantised = stored is not None or quantise != "none"
    if quantised:
        more["device_map"] = {"": what.device}
    try:
        with silence():
            model, info = auto.from_pretrained(
                source,
                config=config,
                dtype=DTYPES[dtype],
                local_files_only=what.local,
                trust_remote_code=what.trust,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the loading info, and refused below by name
                **more,
            )
            if quantised:
                finish_quantisation(model)
            return model if quantised else model.to(what.device), info
    except Exception as error:  # each weight format has errors of its own
        raise SteersmanError(f"{source}: its weights can not be loaded: {error}") from error


def _require_own_files(source: str) -> None:
    """Raises SteersmanError where an index of a local folder names weights outside it, whose content no digest of the
    folder would tell."""
    for index in Path(source).glob("*.index.json"):
        try:
            told = json.loads(index.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # what reads the weights says what is wrong with it
        files = told.get("weight_map") if isinstance(told, dict) else None
        for file in files.values() if isinstance(files, dict) else ():
            if isinstance(file, str) and Path(file).name != file:
                raise SteersmanError(
                    f"{index}: it names weights outside its folder ({file!r}); put the files into the folder, and "
                    "their plain names into the index"
                )


def require_complete(source: str, model: Any, info: dict[str, Any], allowed: Sequence[str] = ()) -> None:
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


def require_vocabulary(source: str, tokenizer: Any, model: Any) -> None:
    """Raises SteersmanError for fewer embedding rows than ids; more are padding, and fine."""
    ids = max(tokenizer.get_vocab().values()) + 1
    rows = model.get_input_embeddings().weight.shape[0]
    if ids > rows:
        raise SteersmanError(
            f"{source}: its tokenizer has ids up to {ids - 1}, but the model's vocabulary has {rows} rows; the "
            "tokenizer belongs to another model, or tokens were added without model.resize_token_embeddings"
        )


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
