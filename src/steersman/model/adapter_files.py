"""A folder of adapters as peft writes it: what it says of itself, its settings and its tensors. Refused with the
reason where they can not be read, are of a kind that is not added up here, or belong to another base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.model.quantise import unquantised
from steersman.types import SteersmanError

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ROOT = "base_model.model."
"""What peft puts before every name."""

FREE = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters",
    "task_type", "use_dora", "use_rslora",
}  # fmt: skip
"""Settings of peft that leave an adapter what is added up here: s B A on a layer's weight or on one that is no
layer's, with DoRA's lengths, and modules in a copy."""
STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin an adapter that leave the base as it is (PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do not)."""


@dataclass(frozen=True, slots=True)
class AdapterNotes:
    """What a folder of adapters says of itself: the model that they are on, peft's name of their task, and the
    dropout that they were trained with."""

    base: str
    task: str | None
    dropout: float

    @property
    def of_scalar(self) -> bool:
        """Whether they are a reward model's or critic's, with a head that gives numbers."""
        return self.task == "SEQ_CLS"


def adapter_notes(source: str) -> AdapterNotes:
    """What the folder says of its adapters. Raises SteersmanError where it can not be read, or names no base."""
    file = Path(source) / CONFIG
    try:
        told = json.loads(file.read_text())
        base, task = told.get("base_model_name_or_path"), told.get("task_type")
        dropout = float(told.get("lora_dropout") or 0.0)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SteersmanError(f"{file}: can not be read as the settings of adapters: {error}") from error
    if not isinstance(base, str) or not base:
        raise SteersmanError(
            f"{file}: base_model_name_or_path is {json.dumps(base)}; write there the folder or hub name of the model "
            "that the adapters were trained on"
        )
    return AdapterNotes(base, task if isinstance(task, str) else None, dropout)


HEADS = ("score", "classification_head")
"""Names of the heads of sequence classifiers, which peft counts among the modules that are trained whole."""


def saved_lora(path: str) -> dict[str, Any] | None:
    """How the adapters in a folder were made, by the names of a recipe's `model.lora`, without dropout; None where
    the path is no folder of LoRA adapters. What can not be loaded of them is refused by who loads it."""
    try:
        told = json.loads((Path(path).expanduser() / CONFIG).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(told, dict) or told.get("peft_type") != "LORA":
        return None
    r, alpha, targets = told.get("r"), told.get("lora_alpha"), told.get("target_modules")
    if weights := told.get("target_parameters"):
        targets = [*(targets or ()), *weights]
    whole = [name for name in told.get("modules_to_save") or () if name not in HEADS]
    if type(r) is not int or r < 1 or not isinstance(alpha, int | float) or alpha <= 0:
        return None
    return {
        "r": r, "alpha": alpha, "targets": targets or "all-linear", "dora": told.get("use_dora") is True,
        "rslora": told.get("use_rslora") is True, "train_whole": whole,
    }  # fmt: skip


def keeps_ties(path: str) -> bool:
    """Whether the adapters in a folder keep embeddings and output layer one matrix where they are trained whole; true
    of a path that is no folder of adapters, since those that a run puts on do."""
    try:
        told = json.loads((Path(path).expanduser() / CONFIG).read_text())
    except (OSError, ValueError):
        return True
    return isinstance(told, dict) and told.get("ensure_weight_tying") is True


@unquantised()
def adapter_settings(source: str, *, trainable: bool) -> Any:
    """The folder's settings as peft has them, without dropout.

    Raises SteersmanError for what is not plain LoRA or DoRA: merging would leave it out.
    """
    import peft

    file = Path(source) / CONFIG
    try:
        kind = json.loads(file.read_text()).get("peft_type")
        found: Any = peft.LoraConfig.from_pretrained(source) if kind == "LORA" else None
    except Exception as error:  # peft checks its settings in ways of its own
        raise SteersmanError(f"{file}: can not be read as the settings of adapters: {error}") from error
    plain = peft.LoraConfig()
    odd = [] if found is None else [
        f.name
        for f in fields(found)
        if f.name not in FREE and (getattr(found, f.name) or None) != (getattr(plain, f.name, None) or None)
    ]  # fmt: skip
    if found is not None and found.ensure_weight_tying and not found.modules_to_save:
        odd.append("ensure_weight_tying of target_modules")  # an adapter on the output layer
    if found is not None and found.init_lora_weights not in STARTS:
        odd.append(f"init_lora_weights: {found.init_lora_weights}")
    if found is None or odd:
        raise SteersmanError(f"{file}: {_not_plain(f'peft_type {kind}' if found is None else ', '.join(odd))}")
    found.lora_dropout, found.inference_mode, found.init_lora_weights = 0.0, not trainable, True
    return found


@unquantised()
def adapter_tensors(source: str) -> dict[str, Tensor]:
    """The folder's tensors by peft's names. Raises SteersmanError where there are none, or a file is broken."""
    from peft.utils.save_and_load import load_peft_weights

    folder = Path(source)
    if not any((folder / name).exists() for name in (WEIGHTS, PICKLED)):  # peft would ask the hub
        raise SteersmanError(f"{folder}: no weights of adapters there (no {WEIGHTS})")
    try:
        return load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # each format has errors of its own
        raise SteersmanError(f"{folder}: the weights of its adapters can not be read: {error}") from error


def require_fit(source: str, base: str, here: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raises SteersmanError unless what is on the model and what was saved have the same names and shapes."""
    names = [f"{n} is not there" for n in sorted(set(here) - set(saved))]
    names += [f"{n} has no place" for n in sorted(set(saved) - set(here))]
    wrong = names or [
        f"{n} is {list(saved[n].shape)}, not {list(x.shape)}" for n, x in here.items() if x.shape != saved[n].shape
    ]
    if not wrong:
        return
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise SteersmanError(
        f"{source}: its adapters do not fit {base}: {', '.join(wrong[:3])}{more}. They were trained on another "
        "model, or on one whose vocabulary had grown; name that one as base_model_name_or_path in "
        "adapter_config.json, or merge them into it with peft first"
    )


def not_plain_layers(source: str, names: list[str]) -> SteersmanError:
    """The error for adapters on modules that merging would leave out."""
    return SteersmanError(f"{source}: {_not_plain('adapters on ' + ', '.join(names[:3]))}")


def _not_plain(what: str) -> str:
    return (
        f"{what}: only plain LoRA and DoRA on linear layers, Conv1D, embeddings and experts can go on here or be "
        "merged; merge these adapters into their model with peft first (merge_and_unload, save_pretrained), and give "
        "the folder that this writes"
    )


def same_as_base(name: str, saved: Tensor, base: Mapping[str, Tensor]) -> bool:
    """Whether a saved tensor is a weight of the base that peft wrote beside adapters on it."""
    there = base.get(name)
    return there is not None and there.shape == saved.shape and torch.equal(there.to(saved).cpu(), saved)
