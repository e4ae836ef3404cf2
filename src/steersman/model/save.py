"""Models on disk in the Hugging Face layout, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from steersman.model.adapters import write_adapters
from steersman.model.attributes import GATING_FILE, AttributeModel, GatedModel
from steersman.model.lora import untied
from steersman.model.merge import merged_state
from steersman.model.policy import Policy
from steersman.model.quantise import is_quantised
from steersman.model.quiet import silence
from steersman.model.scalar import Headed, ScalarModel
from steersman.run.folder import save_dir
from steersman.run.pieces import whole
from steersman.run.ranks import ranks


def save(
    model: Policy | ScalarModel | AttributeModel,
    tokenizer: Any | None,
    folder: str | Path,
    *,
    merged: bool = True,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes model and tokenizer so that the ecosystem's `from_pretrained` loads them; returns the folder.

    A policy becomes what `AutoModelForCausalLM` loads, a scalar model what `AutoModelForSequenceClassification`
    loads. With LoRA, `merged` adds the adapters into the weights; otherwise only the adapters are written, and a
    scalar model's head beside them.
    `tokenizer` None means the model's own; `dtype` is the precision on disk, None the one in memory. A folder
    that is there already is replaced once the new one is complete.

    Of several ranks all call it and rank 0 writes. Raises SteersmanError when writing fails; what stood there
    before is then untouched.
    """
    folder = Path(folder)

    state = _state(model, merged, dtype)

    def write(partial: Path) -> None:
        _write(model, state, partial, merged, dtype)
        (tokenizer or model.tokenizer).save_pretrained(partial)

    with silence():
        ranks().from_main(lambda: save_dir(folder, write), "the model")
    return folder


def _state(
    model: Policy | ScalarModel | AttributeModel, merged: bool, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """The whole weights by name, adapters added in where they are to be, or the adapters alone."""
    adapters = model.adapters if isinstance(model, Policy) else None
    if adapters is not None and not merged:
        state = {
            name: x for name, x in adapters.state_dict().items() if ".lora_" in name or ".modules_to_save." in name
        }
    else:
        with_adapters = adapters is not None if isinstance(model, Policy) else model.adapted
        if with_adapters or any(is_quantised(module) for module in model.model.modules()):
            state = merged_state(model.model, dtype)
        else:
            state = model.model.state_dict()
    return {name: whole(x) for name, x in state.items()}


def _write(
    model: Policy | ScalarModel | AttributeModel,
    state: dict[str, torch.Tensor],
    folder: Path,
    merged: bool,
    dtype: torch.dtype | None,
) -> None:
    adapters = model.adapters if isinstance(model, Policy) else None
    if adapters is not None and not merged:
        adapters.save_pretrained(str(folder), state_dict=state)
        return
    if isinstance(model, Headed) and model.adapted and not merged:
        write_adapters(model, folder)
        return
    if dtype is not None:
        state = {name: x.to(dtype) if x.is_floating_point() else x for name, x in state.items()}
    model.model.save_pretrained(folder, state_dict=state)
    if isinstance(model, GatedModel):
        save_file(model.gating.state_dict(), folder / GATING_FILE)
    changed: dict[str, Any] = {}
    if dtype is not None:  # the file names the precision in memory, and loading goes by it
        changed["dtype"] = str(dtype).split(".")[1]
    if adapters is not None and untied(model.model, state):
        changed["tie_word_embeddings"] = False  # or loading would put the one's weights in the other's place
    if changed:
        path = folder / "config.json"
        told = json.loads(path.read_text())
        if "tie_word_embeddings" in told.get("text_config", {}):
            told["text_config"] |= {k: v for k, v in changed.items() if k == "tie_word_embeddings"}
        path.write_text(json.dumps(told | changed, indent=2))
