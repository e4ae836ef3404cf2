"""Adapters and heads of scalar models on disk, in the layout of peft: what a sequence classifier's adapters are."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from steersman.distributed.pieces import full_tensor
from steersman.distributed.ranks import ranks
from steersman.model.in_place import add_in_place
from steersman.model.meaning import Meaning
from steersman.types import SteersmanError

CONFIG, WEIGHTS, MEANING = "adapter_config.json", "adapter_model.safetensors", "meaning.json"
ROOT = "base_model.model."
"""What peft puts before every name."""


@dataclass(frozen=True, slots=True)
class AdaptedFolder:
    """A folder of adapters: on which model, and what the numbers of its head mean."""

    base: str
    meaning: Meaning


def is_adapters(source: str) -> bool:
    """Whether a folder holds adapters, not a model."""
    return (Path(source) / CONFIG).exists()


def adapted_folder(source: str) -> AdaptedFolder:
    """What a folder of a scalar model's adapters says of itself.

    Raises SteersmanError where it can not be read, or its adapters are a language model's.
    """
    folder = Path(source)
    try:
        config = json.loads((folder / CONFIG).read_text())
        base, task = config["base_model_name_or_path"], config.get("task_type")
        told = folder / MEANING
        meaning = Meaning.parsed(json.loads(told.read_text())) if told.exists() else Meaning()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SteersmanError(f"{folder}: its adapters can not be read: {error}") from error
    if task != "SEQ_CLS":
        raise SteersmanError(
            f"{folder}: adapters of a language model ({task}), not of a reward model or critic; train one with "
            "`steersman reward`, or merge these into their model first (`steersman export`)"
        )
    return AdaptedFolder(str(base), meaning)


def put_adapters(scalar: Any, source: str) -> None:
    """Puts the folder's adapters on the scalar model's trunk and its head in place; all of them trainable.

    Raises SteersmanError where their names or shapes are not those of this model.
    """
    import peft

    folder = Path(source)
    try:
        config: Any = peft.LoraConfig.from_pretrained(str(folder))
        config.task_type, config.modules_to_save, config.inference_mode = "FEATURE_EXTRACTION", None, False
        peft.inject_adapter_in_model(config, scalar.trunk)
        add_in_place(scalar.trunk)
        scalar.has_adapters = True
        saved = {name.removeprefix(ROOT): x for name, x in load_file(folder / WEIGHTS).items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SteersmanError(f"{folder}: its adapters can not be read: {error}") from error
    here = dict(_named(scalar))
    wrong = sorted(set(here) ^ set(saved)) or [n for n, p in here.items() if p.shape != saved[n].shape]
    if wrong:
        raise SteersmanError(f"{folder}: its adapters do not fit {scalar.model.name_or_path}: {', '.join(wrong[:4])}")
    with torch.no_grad():
        for name, p in here.items():
            p.copy_(saved[name])


def write_adapters(scalar: Any, folder: Path) -> None:
    """Writes adapters, head and meaning into the folder; peft loads them on a sequence classifier. All ranks call it,
    and rank 0 writes."""
    state = {ROOT + name: full_tensor(p.detach()).contiguous() for name, p in _named(scalar)}
    ranks().from_main(lambda: _write_files(scalar, folder, state), "the adapters")


def _write_files(scalar: Any, folder: Path, state: dict[str, torch.Tensor]) -> None:
    config: Any = copy.copy(next(iter(scalar.trunk.peft_config.values())))
    head = sorted({name.split(".")[0] for name, _ in _named(scalar) if ".lora_" not in name})
    config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", head, True
    config.base_model_name_or_path = scalar.model.name_or_path
    config.save_pretrained(str(folder))
    save_file(state, folder / WEIGHTS)
    (folder / MEANING).write_text(json.dumps(asdict(scalar.meaning)))


def same_place(a: str, b: str) -> bool:
    """Whether two names of models mean one: the same hub name, or the same folder."""
    return a == b or Path(a).expanduser().resolve() == Path(b).expanduser().resolve()


def _named(scalar: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Adapters and head by the names that peft's files have."""
    trunk = scalar.trunk_name + "."
    return [
        (name.replace("magnitude_vector.default.weight", "magnitude_vector").replace(".default.", "."), p)
        for name, p in scalar.model.named_parameters()
        if ".lora_" in name or not name.startswith(trunk)
    ]
