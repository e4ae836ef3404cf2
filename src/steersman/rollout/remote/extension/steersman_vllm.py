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
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Layers that vLLM stores as one, rows of the first part first."""


SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "tie_word_embeddings", "vocab_size",
)  # fmt: skip
"""Settings of a model by which another one is noticed before weights are sent."""


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
        """Raises ValueError naming the tensor that the model does not take; another update can be begun then."""
        taken = []

        def tensors(file: Any) -> Any:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                taken.append(f"{name} {list(tensor.shape)}")
                yield name, tensor

        try:
            with safe_open(update_info.path, framework="pt", device="cpu") as file, torch.no_grad():
                self.model.load_weights(tensors(file))
        except Exception as error:
            self._forget_update()
            what = f"the server's model does not take {taken[-1]}" if taken else f"{update_info.path} can not be read"
            raise ValueError(f"{what} ({type(error).__name__}: {error})") from error

    def _forget_update(self) -> None:
        """Ends an update that failed. vLLM keeps tensors of layers that are not whole yet and would add the next
        update's to them; these layers get back the weights that they had."""
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            info.loaded_weights, info.load_numel = [], 0
        self.finish_weight_update()

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine("steersman", FileTransfer)


class Worker:
    """Methods that vLLM's worker gets beside its own."""

    def steersman_settings(self) -> dict[str, Any]:
        """`max_num_seqs`, the most sequences decoded at a time, those SIZES of the `model` that it has, which
        log-probabilities are told (`logprobs_mode`), of at most `max_logprobs` tokens, and `max_lora_rank`, 0 where
        adapters are not taken."""
        config = self.model_config.hf_text_config  # type: ignore[attr-defined]
        lora = self.lora_config  # type: ignore[attr-defined]
        told = {name: getattr(config, name, None) for name in SIZES}
        return {
            "max_num_seqs": self.scheduler_config.max_num_seqs,  # type: ignore[attr-defined]
            "model": {name: value for name, value in told.items() if isinstance(value, int)},
            "logprobs_mode": str(self.model_config.logprobs_mode),  # type: ignore[attr-defined]
            "max_logprobs": self.model_config.max_logprobs,  # type: ignore[attr-defined]
            "max_lora_rank": 0 if lora is None else int(lora.max_lora_rank),
        }

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
