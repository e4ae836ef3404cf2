"""Models on disk in the Hugging Face layout, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from steersman.model.lora import merged_state
from steersman.model.policy import Policy
from steersman.model.scalar import ScalarModel
from steersman.types import SteersmanError


def save(model: Policy | ScalarModel, tokenizer: Any | None, folder: str | Path, *, merged: bool = True) -> Path:
    """Writes model and tokenizer so that the ecosystem's `from_pretrained` loads them; returns the folder.

    A policy becomes what `AutoModelForCausalLM` loads, a scalar model what `AutoModelForSequenceClassification`
    loads. With LoRA, `merged` adds the adapters into the weights; otherwise only the adapters are written.
    `tokenizer` None means the model's own; `dtype` is the precision on disk, None the one in memory. A folder that is there already is replaced once the new one is
    complete.

    Raises SteersmanError when writing fails; what stood there before is then untouched.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        _write(model, partial, merged, dtype)
        (tokenizer or model.tokenizer).save_pretrained(partial)
        _to_disk(partial)
        _replace(partial, folder)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        # a full disk reaches us as OSError, or as the weight format's own error
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise SteersmanError(
                f"could not write the model to {folder}: {error}. Nothing there was changed; make room (or pass "
                "another folder) and save again"
            ) from error
        raise
    return folder


def _write(model: Policy | ScalarModel, folder: Path, merged: bool, dtype: torch.dtype | None) -> None:
    adapters = model.adapters if isinstance(model, Policy) else None
    if adapters is not None and not merged:
        adapters.save_pretrained(str(folder))
        return
    state = model.model.state_dict() if adapters is None else merged_state(model.model)
    if dtype is not None:
        state = {name: x.to(dtype) if x.is_floating_point() else x for name, x in state.items()}
    model.model.save_pretrained(folder, state_dict=state)


def _to_disk(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(new: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
