"""Adapters and heads of scalar models on disk, in the layout of peft: what a sequence classifier's adapters are."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from steersman.distributed.pieces import full_tensor
from steersman.distributed.ranks import ranks
from steersman.model.adapter_files import (
    CONFIG,
    ROOT,
    WEIGHTS,
    adapter_notes,
    adapter_settings,
    adapter_tensors,
    not_plain_layers,
    require_fit,
)
from steersman.model.lora import fitting, settle
from steersman.model.meaning import Meaning
from steersman.model.merge import adapters_left_out
from steersman.model.quantise import unquantised
from steersman.types import SteersmanError

MEANING = "meaning.json"


@dataclass(frozen=True, slots=True)
class AdaptedFolder:
    """A folder of adapters: on which model, and what the numbers of its head mean."""

    base: str
    meaning: Meaning


def is_adapters(source: str) -> bool:
    """Whether a folder holds adapters, not a model."""
    return (Path(source).expanduser() / CONFIG).exists()


def adapted_folder(source: str) -> AdaptedFolder:
    """What a folder of a scalar model's adapters says of itself.

    Raises SteersmanError where it can not be read, or its adapters are a language model's.
    """
    folder, notes = Path(source), adapter_notes(source)
    try:
        told = folder / MEANING
        meaning = Meaning.parsed(json.loads(told.read_text())) if told.exists() else Meaning()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SteersmanError(f"{folder}: its adapters can not be read: {error}") from error
    if not notes.of_scalar:
        raise SteersmanError(
            f"{folder}: adapters of a language model ({notes.task}), not of a reward model or critic; train one with "
            "`steersman reward`, or merge these into their model first (`steersman export`)"
        )
    return AdaptedFolder(notes.base, meaning)


@unquantised()
def put_adapters(scalar: Any, source: str) -> None:
    """Puts the folder's adapters on the scalar model's trunk, with what is trained whole there, and its head in
    place; all of them trainable, without dropout.

    Raises SteersmanError where they can not be read, are not plain LoRA or DoRA, or their names or shapes are not
    those of this model.
    """
    import peft

    config, saved = adapter_settings(source, trainable=True), adapter_tensors(source)
    inside = [f".{name}" for name, _ in scalar.trunk.named_modules()]
    whole = [name for name in config.modules_to_save or () if any(x.endswith(f".{name}") for x in inside)]
    config.task_type, config.modules_to_save = "FEATURE_EXTRACTION", whole or None
    config.ensure_weight_tying = False  # the trunk has no output layer
    with fitting(source, scalar.model):
        peft.inject_adapter_in_model(config, scalar.trunk)
    settle(scalar.trunk)
    if odd := adapters_left_out(scalar.trunk):
        raise not_plain_layers(source, odd)
    scalar.has_adapters = True
    here = dict(_named(scalar))
    saved = {name.removeprefix(ROOT): x for name, x in saved.items()}
    require_fit(source, scalar.model.name_or_path, here, saved)
    with torch.no_grad():
        for name, p in here.items():
            p.copy_(saved[name])


def write_adapters(scalar: Any, folder: Path) -> None:
    """Writes adapters, head and meaning into the folder; peft loads them on a sequence classifier. All ranks call it,
    and rank 0 writes."""
    state = {ROOT + name: full_tensor(p.detach()).contiguous() for name, p in _named(scalar)}
    ranks().from_main(lambda: _write_files(scalar, folder, state), "the adapters")


def _write_files(scalar: Any, folder: Path, state: dict[str, torch.Tensor]) -> None:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    config: Any = copy.copy(next(iter(scalar.trunk.peft_config.values())))
    head = sorted({name.split(".")[0] for name, _ in _named(scalar)} - {scalar.trunk_name})
    config.task_type, config.inference_mode = "SEQ_CLS", True
    config.modules_to_save = [*(config.modules_to_save or ()), *head]
    # by name: a pattern over the trunk's names would not match those of the whole classifier, which peft asks
    parts = [(name, part) for name, part in scalar.trunk.named_modules() if isinstance(part, LoraLayer)]
    config.target_modules = [name for name, part in parts if not isinstance(part, ParamWrapper)]
    config.base_model_name_or_path = scalar.model.name_or_path
    config.save_pretrained(str(folder))
    save_file(state, folder / WEIGHTS)
    (folder / MEANING).write_text(json.dumps(asdict(scalar.meaning)))


def same_place(a: str, b: str) -> bool:
    """Whether two names of models mean one: the same hub name, or the same folder."""
    return a == b or Path(a).expanduser().resolve() == Path(b).expanduser().resolve()


def _named(scalar: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Adapters, what is trained whole beside them, and the head, by the names that peft's files have."""
    trunk, whole = scalar.trunk_name + ".", ".modules_to_save.default."
    return [
        (_in_file(name.replace(whole, ".")), p)
        for name, p in scalar.model.named_parameters()
        if ".lora_" in name or whole in name or not name.startswith(trunk)
    ]


def _in_file(name: str) -> str:
    return name.replace("magnitude_vector.default.weight", "magnitude_vector").replace(".default.", ".")
