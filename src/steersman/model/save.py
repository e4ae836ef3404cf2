"""Models on disk in the Hugging Face layout, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from steersman.model.adapters import write_adapters
from steersman.model.attributes import GATING_FILE, AttributeModel, GatedModel
from steersman.model.bottleneck import DECODER_FILE, BottleneckModel
from steersman.model.lora import untied
from steersman.model.merge import merged_entries
from steersman.model.policy import Policy
from steersman.model.quantise import is_quantised
from steersman.model.quiet import silence
from steersman.model.scalar import Headed, ScalarModel
from steersman.model.weight_files import Entry, bytes_of, plain_entries, write_weights
from steersman.run.folder import begin_dir, replace_dir, saving
from steersman.run.pieces import whole
from steersman.run.ranks import ranks


@torch.no_grad()
def save(
    model: Policy | ScalarModel | AttributeModel,
    tokenizer: Any | None,
    folder: str | Path,
    *,
    merged: bool = True,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Writes model and tokenizer so that the ecosystem's `from_pretrained` loads them; returns the folder.

    A policy becomes what `AutoModelForCausalLM` loads, a scalar model what `AutoModelForSequenceClassification`
    loads. With LoRA, `merged` adds the adapters into the weights; otherwise only the adapters are written, and a
    scalar model's head beside them.
    `tokenizer` None means the model's own; `dtype` is the precision on disk, None the one in memory. Files of weights
    are at most `max_shard_size` large, such as 5GB or 500MB, and no rank holds more than one of them and one layer.
    A folder that is there already is replaced once the new one is complete.

    Of several ranks all call it and rank 0 writes. Raises SteersmanError when writing fails; what stood there
    before is then untouched.
    """
    folder, limit, here = Path(folder), bytes_of(max_shard_size), ranks()
    partial = here.from_main(lambda: begin_dir(folder), "the model's folder")
    try:
        with silence(), saving(folder):
            adapters = model.adapters if isinstance(model, Policy) else None
            if adapters is not None and not merged:
                state = {n: whole(x) for n, x in adapters.state_dict().items() if _trained(n)}
                here.from_main(lambda: adapters.save_pretrained(str(partial), state_dict=state), "the adapters")
            elif isinstance(model, Headed) and model.adapted and not merged:
                write_adapters(model, partial)
            else:
                _write(model, partial, dtype, limit)
            here.from_main(lambda: (tokenizer or model.tokenizer).save_pretrained(partial) and None, "the tokenizer")
            here.from_main(lambda: replace_dir(partial, folder), "the model")
    finally:
        if here.main:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _trained(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def _write(
    model: Policy | ScalarModel | AttributeModel, folder: Path, dtype: torch.dtype | None, max_shard_size: int
) -> None:
    """A plain model: transformers writes all but the weights, and these come file by file."""
    inner: Any = model.model
    ranks().from_main(lambda: inner.save_pretrained(folder, state_dict={}), "the model's config")
    adapted = model.adapters is not None if isinstance(model, Policy) else model.adapted
    if adapted or any(is_quantised(module) for module in inner.modules()):
        entries = list(merged_entries(inner, dtype))
    else:
        entries = list(plain_entries(inner, dtype))
    write_weights(inner, entries, folder, max_shard_size)
    changed: dict[str, Any] = {}
    if dtype is not None:  # the file names the precision in memory, and loading goes by it
        changed["dtype"] = str(dtype).split(".")[1]
    if isinstance(model, Policy) and adapted and _untied(inner, entries):
        changed["tie_word_embeddings"] = False  # or loading would put the one's weights in the other's place
    ranks().from_main(lambda: _finish(model, folder, changed), "the model's config")


def _untied(inner: Any, entries: Iterable[Entry]) -> bool:
    made = {name: make for name, _, make in entries}
    return untied(inner, lambda name: whole(made[name]()))


def _finish(model: Policy | ScalarModel | AttributeModel, folder: Path, changed: dict[str, Any]) -> None:
    if isinstance(model, GatedModel):
        save_file(model.gating.state_dict(), folder / GATING_FILE)
    if isinstance(model, BottleneckModel):
        save_file(model.decoder.state_dict(), folder / DECODER_FILE)
    if changed:
        path = folder / "config.json"
        told = json.loads(path.read_text())
        if "tie_word_embeddings" in told.get("text_config", {}):
            told["text_config"] |= {k: v for k, v in changed.items() if k == "tie_word_embeddings"}
        path.write_text(json.dumps(told | changed, indent=2))
