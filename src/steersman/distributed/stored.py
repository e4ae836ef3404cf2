"""Tensors in pieces over the ranks, on the disk: each rank writes its own, and any number of ranks reads them again.

The files are safetensors, so that opening a checkpoint runs no code of its maker.

Source: `torch.distributed.checkpoint` with the storage of its Hugging Face format, PyTorch 2.9 and newer.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.atomic import saving
from steersman.distributed.ranks import Ranks, ranks
from steersman.types import SteersmanError

FOLDER, _MARK = "pieces", "stored in pieces as"


def mark_shards(state: Any, pieces: dict[str, Tensor], name: str = "") -> Any:
    """The nested state with a mark in the place of every tensor that lies in pieces; `pieces` gets these by name."""
    if isinstance(state, dict):
        return {key: mark_shards(inner, pieces, f"{name}.{key}") for key, inner in state.items()}
    if isinstance(state, list | tuple):
        return [mark_shards(inner, pieces, f"{name}.{place}") for place, inner in enumerate(state)]
    if not ranks().sharded:
        return state
    from torch.distributed.tensor import DTensor

    if not isinstance(state, DTensor):
        return state
    name = name.removeprefix(".")
    pieces[name] = state
    return {_MARK: name}


def write_shards(pieces: dict[str, Tensor], folder: Path, here: Ranks) -> dict[str, dict[str, Any]]:
    """Writes this rank's share into `folder`/pieces; gives size and SHA-256 of every rank's files by name.

    All ranks of `here` call it, and all raise the first error of any of them, with its rank.
    """
    if not pieces:
        return {}
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    place = folder / FOLDER
    writer = checkpoint.HuggingFaceStorageWriter(str(place), save_distributed=True)
    try:
        with here.call("the pieces of a checkpoint"):
            checkpoint.save(pieces, storage_writer=writer, process_group=here.group)
    except CheckpointException as error:
        rank, (first, _) = next(iter(error.failures.items()))
        with saving(folder, f"rank {rank}: "):
            raise first from error
    mine = {f"{FOLDER}/{file.name}": size_and_digest(file) for file in place.glob(f"shard-{here.rank + 1:05d}-*")}
    return {
        name: file for of_rank in here.gather(mine, "the files of a checkpoint") for name, file in of_rank.items()
    }


class StoredTensor:
    """A tensor of a checkpoint whose pieces are on the disk."""

    def __init__(self, name: str, reader: Any) -> None:
        self.name, self.reader = name, reader

    def read(self, like: Tensor) -> Tensor:
        """The tensor laid out as `like` is: of one in pieces only this rank's piece is read.

        Raises SteersmanError where it is not there, or of another shape.
        """
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.api import CheckpointException

        found = torch.empty_like(like, requires_grad=False)
        try:
            with warnings.catch_warnings():  # it warns of a process without ranks, which may well read
                warnings.simplefilter("ignore", UserWarning)
                checkpoint.load({self.name: found}, storage_reader=self.reader, no_dist=True)
        except (CheckpointException, KeyError, ValueError, RuntimeError) as error:
            raise SteersmanError(f"{self.reader.path}: {self.name} can not be read: {error}") from error
        return found

    def full_tensor(self) -> Tensor:
        """All of the tensor, on the CPU, for who looks into a checkpoint."""
        found = self.reader.read_metadata().state_dict_metadata[self.name]
        return self.read(torch.empty(found.size, dtype=found.properties.dtype))


def replace_marks(state: Any, folder: Path) -> Any:
    """What `mark_shards` gave, with a StoredTensor in the place of every mark."""
    reader: list[Any] = []

    def walk(part: Any) -> Any:
        if isinstance(part, list):
            return [walk(inner) for inner in part]
        if not isinstance(part, dict):
            return part
        if part.keys() != {_MARK}:
            return {key: walk(inner) for key, inner in part.items()}
        if not reader:
            reader.append(_reader(folder / FOLDER))
        return StoredTensor(part[_MARK], reader[0])

    return walk(state)


def size_and_digest(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _reader(folder: Path) -> Any:
    from torch.distributed import checkpoint

    class Reader(checkpoint.HuggingFaceStorageReader):
        """Reads the files' headers once, and not again for each tensor."""

        known: Any = None

        def read_metadata(self) -> Any:
            if self.known is None:
                self.known = super().read_metadata()
            return self.known

    return Reader(str(folder))
