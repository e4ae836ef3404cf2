"""A model's weights as files of the Hugging Face layout, written as they come, so that few lie in memory at once."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from steersman.distributed.pieces import full_tensor
from steersman.distributed.ranks import ranks
from steersman.ops.rounding import CUT, stochastic
from steersman.types import SteersmanError

Entry = tuple[str, Tensor, Callable[[], Tensor]]
"""A weight's name in the file, the model's own tensor that it comes from, and what makes it."""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def bytes_of(size: str) -> int:
    """The number of bytes in a size such as 5GB. Raises SteersmanError if the text is not a size, or is 0."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(KB|MB|GB)", size.strip().upper())
    if found is None or float(found[1]) == 0:
        raise SteersmanError(f"max_shard_size is {size!r}; give a size such as 5GB or 500MB")
    return int(float(found[1]) * UNITS[found[2]])


def write_weights(
    model: Any, entries: Iterable[Entry], folder: Path, max_shard_size: int, dtype: torch.dtype | None = None
) -> None:
    """Writes `model.safetensors`, or files of at most `max_shard_size` bytes and their index, into the folder.

    Numbers are of `dtype`, None: of the tensor that each comes from, and rounded as `narrowed` says.
    All ranks call it and rank 0 writes. One layer at a time is put together, so rank 0 holds a layer and a file's
    worth of weights at most, and the others one tensor.
    """
    here, files = ranks(), WeightFiles(folder, max_shard_size)
    for group in _by_layer(_untied(model, list(entries))):
        layer: dict[str, Tensor] = {}
        for name, source, make in group:
            weight = full_tensor(make())
            if here.main:
                layer[name] = narrowed(weight.detach().cpu(), dtype or source.dtype, name)
        here.from_main(lambda layer=layer: files.add(revert_weight_conversion(model, layer)), "a layer's weights")
    here.from_main(files.close, "the weights")


class WeightFiles:
    """Safetensors files of at most `limit` bytes each, or of one tensor that is larger."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.waiting: dict[str, Tensor] = {}
        self.bytes, self.total = 0, 0
        self.written: list[list[str]] = []

    def add(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            if self.bytes and self.bytes + size > self.limit:
                self._write()
            self.waiting[name] = tensor.contiguous()
            self.bytes, self.total = self.bytes + size, self.total + size

    def close(self) -> None:
        """Writes what waits, gives the files their names, and writes the index where there are several."""
        self._write()
        count = len(self.written)
        if count == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        index: dict[str, str] = {}
        for number, names in enumerate(self.written):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / file)
            index |= dict.fromkeys(names, file)
        told = {"metadata": {"total_size": self.total}, "weight_map": index}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")

    def _write(self) -> None:
        save_file(self.waiting, self._part(len(self.written)), metadata={"format": "pt"})
        self.written.append(list(self.waiting))
        self.waiting, self.bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"


def plain_entries(model: Any) -> Iterator[Entry]:
    """The state dict as it is."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        yield name, tensor, tensor.detach


def narrowed(weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The weight in `dtype`. Where that has fewer bits, each number goes up or down at random, and its mean stays.

    A model that was stored in bfloat16 begins on bfloat16's numbers. What an update of 1e-5 moves is less than half
    the way to the next one almost everywhere, and the nearest would be where it began: training would be lost on the
    way to the disk. What is drawn depends on the weight's name alone, so the same weights make the same file.
    """
    if weight.dtype == dtype or not (weight.is_floating_point() and dtype.is_floating_point):
        return weight
    if dtype not in CUT or weight.dtype not in (torch.float32, torch.float64):
        return weight.to(dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return stochastic(weight.float(), dtype, generator).to(dtype)


def _untied(model: Any, entries: list[Entry]) -> list[Entry]:
    """One entry for each tensor: of tied ones that which loading expects."""
    names: dict[int, list[str]] = {}
    for name, source, _ in entries:
        names.setdefault(id(source), []).append(name)
    kept = set()
    for same in names.values():
        kept.add(next((name for name in same if name not in model.all_tied_weights_keys), same[0]))
    ignored = set(model._keys_to_ignore_on_save or ())
    return [entry for entry in entries if entry[0] in kept - ignored]


def _by_layer(entries: list[Entry]) -> Iterator[list[Entry]]:
    """The entries in groups: what is numbered alike stands in one layer, and else what is in one module."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        numbered = re.match(r".*?\.\d+(?=\.)", entry[0])
        groups.setdefault(numbered[0] if numbered else entry[0].rpartition(".")[0], []).append(entry)
    yield from groups.values()
