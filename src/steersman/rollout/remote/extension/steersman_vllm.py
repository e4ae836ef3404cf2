"""What a vLLM server imports from steersman: weights from a file in shared memory, and digests of what arrived.

vLLM loads it by `--worker-extension-cls steersman_vllm.Worker`, with this file's folder on PYTHONPATH. It stands
alone, so that vLLM's environment needs nothing else of steersman. Tried with vLLM 0.32.0.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Layers that vLLM stores as one, rows of the first part first."""


@dataclass
class Nothing(WeightTransferInitInfo):
    """A file needs no meeting point."""


@dataclass
class FileInfo(WeightTransferUpdateInfo):
    """The safetensors file that holds the new weights."""

    path: str


class FileTransfer(WeightTransferEngine[Nothing, FileInfo]):
    """Reads weights from a file that the trainer wrote, usually in shared memory."""

    init_info_cls, update_info_cls = Nothing, FileInfo

    def init_transfer_engine(self, init_info: Nothing) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileInfo) -> None:
        with safe_open(update_info.path, framework="pt", device="cpu") as file, torch.no_grad():
            self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine("steersman", FileTransfer)


class Worker:
    """Methods that vLLM's worker gets beside its own."""

    def steersman_digests(self, path: str = "") -> dict[str, Any]:
        """SHA-256 of what the worker has: `file`, each tensor of the file at `path`, as it lies there; `live`, each
        weight of the model under the name and in the shape that the file has it, where it can be told apart."""
        file, shapes = {}, {}
        if path:
            with safe_open(path, framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensor = opened.get_tensor(name)
                    file[name], shapes[name] = digest(tensor), tensor.shape
        alone = self.parallel_config.world_size == 1  # type: ignore[attr-defined]
        return {"file": file, "live": live_digests(self.model_runner.get_model(), shapes) if alone else {}}  # type: ignore[attr-defined]


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, in row order."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def live_digests(model: Any, shapes: dict[str, torch.Size]) -> dict[str, str]:
    """Digests of the model's weights by the names of the file; rows that pad a vocabulary are left out."""
    held = dict(model.named_parameters())
    found = {}
    for name, shape in shapes.items():
        tensor = held[name] if name in held else _part(name, held, shapes)
        if tensor is not None and tensor.ndim == len(shape) and tensor.shape[1:] == shape[1:]:
            found[name] = digest(tensor[: shape[0]])
    return found


def _part(name: str, held: dict[str, Any], shapes: dict[str, torch.Size]) -> Any:
    """The rows of a fused layer that are the layer `name`; None where there is none."""
    for fused, parts in FUSED.items():
        own = next((part for part in parts if f".{part}." in name), None)
        whole = None if own is None else held.get(name.replace(own, fused))
        if own is None or whole is None:
            continue
        names = [name.replace(own, part) for part in parts]
        if not all(one in shapes for one in names):
            return None
        rows = [shapes[one][0] for one in names]
        start = sum(rows[: parts.index(own)])
        return whole[start : start + rows[parts.index(own)]]
    return None
