"""Models on disk in the Hugging Face layout, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from steersman.atomic import begin_dir, replace_dir, saving
from steersman.distributed.pieces import full_tensor
from steersman.distributed.ranks import ranks
from steersman.model.attributes import AttributeModel
from steersman.model.merge import merged_entries
from steersman.model.policy import Policy
from steersman.model.quantise import is_quantised
from steersman.model.quiet import silence
from steersman.model.scalar import ScalarModel
from steersman.model.shard import weights_for_saving
from steersman.model.weight_files import Entry, bytes_of, plain_entries, write_weights


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
    `tokenizer` None means the model's own; `dtype` is the precision on disk, None the one in memory; where it is the
    coarser one, weights are rounded so that their mean stays (`weight_files.narrowed`). Files of weights are at most
    `max_shard_size` large, such as 5GB or 500MB, and no rank holds more than one of them and one layer (DeepSpeed's
    pieces are put together on every rank).
    A folder that is there already is replaced once the new one is complete.

    Of several ranks all call it and rank 0 writes. Raises SteersmanError when writing fails; what stood there
    before is then untouched.
    """
    folder, limit, here = Path(folder), bytes_of(max_shard_size), ranks()
    partial = here.from_main(lambda: begin_dir(folder), "the model's folder")
    try:
        with silence(), saving(folder), weights_for_saving(model):
            if model.has_adapters and not merged:
                model.write_adapters(partial)
            else:
                _write(model, partial, dtype, limit)
            here.from_main(lambda: (tokenizer or model.tokenizer).save_pretrained(partial) and None, "the tokenizer")
            here.from_main(lambda: replace_dir(partial, folder), "the model")
    finally:
        if here.main:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write(
    model: Policy | ScalarModel | AttributeModel, folder: Path, dtype: torch.dtype | None, max_shard_size: int
) -> None:
    """A plain model: transformers writes all but the weights, and these come file by file."""
    inner: Any = model.model
    ranks().from_main(lambda: inner.save_pretrained(folder, state_dict={}), "the model's config")
    if model.has_adapters or any(is_quantised(module) for module in inner.modules()):
        entries = list(merged_entries(inner))
    else:
        entries = list(plain_entries(inner))
    write_weights(inner, entries, folder, max_shard_size, dtype)
    changed: dict[str, Any] = {}
    if dtype is not None:  # the file names the precision in memory, and loading goes by it
        changed["dtype"] = str(dtype).split(".")[1]
    if model.speaks and _untied(inner, entries):
        changed["tie_word_embeddings"] = False  # or loading would put the one's weights in the other's place
    beside = {
        name: {key: full_tensor(x) for key, x in weights.items()} for name, weights in model.files_beside().items()
    }
    ranks().from_main(lambda: _finish(folder, beside, changed), "the model's config")


def _untied(inner: Any, entries: Iterable[Entry]) -> bool:
    """Whether embedding and output layer are to be one matrix by the config, and are written as two that differ: an
    adapter on one of them, or one that was trained whole, changes just that one."""
    if not inner.config.get_text_config().tie_word_embeddings or inner.config.is_encoder_decoder:
        return False  # an encoder-decoder scales its states by whether they are tied
    names = {id(module): f"{name}.weight" for name, module in inner.named_modules()}
    tables = (inner.get_input_embeddings(), inner.get_output_embeddings())
    made = {name: (source, make) for name, source, make in entries}
    found = [made[names[id(table)]] for table in tables if names.get(id(table)) in made]
    if len(found) < 2 or found[0][0] is found[1][0]:
        return False
    return not torch.equal(*(full_tensor(make()) for _, make in found))


def _finish(folder: Path, beside: dict[str, dict[str, torch.Tensor]], changed: dict[str, Any]) -> None:
    for name, weights in beside.items():
        save_file(weights, folder / name)
    if changed:
        path = folder / "config.json"
        told = json.loads(path.read_text())
        if "tie_word_embeddings" in told.get("text_config", {}):
            told["text_config"] |= {k: v for k, v in changed.items() if k == "tie_word_embeddings"}
        path.write_text(json.dumps(told | changed, indent=2))
