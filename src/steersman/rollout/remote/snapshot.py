"""One version of the policy's weights on its way to servers, and the receipt that proves that they arrived.

A snapshot is a safetensors file in shared memory with the digest of each tensor, of all weights or of the adapters
alone, and canaries: prompts with the policy's own log-probabilities of every next token. A receipt is given where the
server confirms the version, holds the same digests, and answers the canaries with the same log-probabilities.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from steersman.atomic import saving
from steersman.distributed.pieces import whole_shape
from steersman.model import Policy, whole_state
from steersman.model.lora import adapter_state
from steersman.model.merge import merged_state
from steersman.model.modes import evaluation_mode
from steersman.ops.logprob import Support
from steersman.types import SteersmanError

CANARY_LENGTHS = (160, 40)
"""Tokens of the canaries' prompts, where the context has room: the first is longer than a block of any server's
prefix cache, so that a cache that outlived its weights is seen."""
ADAPTER = "adapter_model.safetensors"
"""The name that peft gives the file of a folder of adapters."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.03}
"""Largest difference of log-probabilities, in nats, that a receipt allows by the precision of the weights."""


SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
"""Settings by which another model is noticed."""


class ReceiptError(SteersmanError):
    """Weights were sent, and the server does not have them."""


@dataclass(slots=True, frozen=True)
class Canary:
    """A prompt, and the policy's log pi(next token | prompt) [V] of the whole vocabulary at temperature 1."""

    ids: list[int]
    logp: Tensor

    def logp_of(self, token: int, temperature: float, support: Sequence[Tensor] | None) -> float:
        """log pi(token | prompt) at the temperature, among the ids that one token's `support` allows (None: all)."""
        x = self.logp / temperature
        if support is not None:
            x = x.masked_fill(~Support.pack(support).allowed(0, 1, 0, len(x))[0], -torch.inf)
        return float(torch.log_softmax(x, -1)[token])


@dataclass(slots=True)
class Snapshot:
    """Weights of one version: the file in which they lie, the digest of each by name, and the canaries' answers.

    With `adapter` they are adapters for a base that servers have, and the file lies in a folder of its own with
    peft's settings.
    """

    version: int
    path: Path
    digests: dict[str, str]
    canaries: list[Canary]
    adapter: bool = False

    def drop(self) -> None:
        """Removes the file, and the folder that is its own."""
        self.path.unlink(missing_ok=True)
        if self.adapter:
            shutil.rmtree(self.path.parent, ignore_errors=True)


@dataclass(slots=True, frozen=True)
class Receipt:
    """Proof that a server has a version: `gap` is the largest difference of a canary's log-probability in nats,
    `compared` how many of the `tensors` were found bit for bit in the server's own memory (the others only in what
    it read)."""

    version: int
    gap: float
    compared: int
    tensors: int


def known_ids(policy: Policy) -> int:
    """Ids that can be sampled: the tokenizer's, without the rows that pad the model's vocabulary."""
    return min(table_rows(policy), max(policy.tokenizer.get_vocab().values()) + 1)


def table_rows(policy: Policy) -> int:
    """Rows of the output layer, those that pad the vocabulary too, though it may lie in pieces."""
    return whole_shape(policy.model.get_output_embeddings().weight)[0]


def weights_of(policy: Policy, *, with_adapters: bool = True) -> dict[str, Tensor]:
    """The policy's weights under the names that `from_pretrained` knows: adapters added in or left out, embedding and
    output layer both there though they may be one, and without the rows that pad the vocabulary."""
    model = policy.model
    state = whole_state(model) if policy.adapters is None else merged_state(model, with_adapters=with_adapters)
    known = known_ids(policy)
    tables = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    padded = {f"{name}.{leaf}" for name, m in model.named_modules() if id(m) in tables for leaf in ("weight", "bias")}
    out = {name: tensor[:known] if name in padded else tensor for name, tensor in state.items()}
    return {name: tensor.detach().contiguous() for name, tensor in out.items()}


def server_settings(policy: Policy, *, adapter: bool) -> dict[str, Any]:
    """Settings that the model of a server must have to take the policy's weights as they are sent: its sizes, and
    unless only an `adapter` is sent a vocabulary without padding, and embedding and output layer apart."""
    config: Any = policy.model.config.get_text_config()
    wanted = {name: getattr(config, name, None) for name in SIZES}
    if not adapter:
        wanted |= {"tie_word_embeddings": False, "vocab_size": known_ids(policy)}
    return {name: value for name, value in wanted.items() if isinstance(value, int)}


def write_model(policy: Policy, folder: Path, *, base: bool) -> None:
    """Config and tokenizer of the model as servers have it: the vocabulary without padding, and embedding and output
    layer apart (a server that ties them takes an update of the one for both, or for none). The weights below the
    adapters go with it where `base` asks for them; else there are none."""
    config = type(policy.model.config).from_dict(policy.model.config.to_dict())
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.tie_word_embeddings = False
        part.vocab_size = known_ids(policy)
    config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    if base:
        file = folder / "model.safetensors"
        with saving(file):
            save_file(_apart(weights_of(policy, with_adapters=False)), file, {"format": "pt"})


def require_plain_adapters(policy: Policy) -> None:
    """Raises SteersmanError unless the policy has adapters, and they are pairs A, B of linear layers: what vLLM's
    and our servers add to a base under a name. Those of experts vLLM reads in another order than peft writes them in
    (0.32, `_stack_moe_lora_weights`)."""
    if policy.adapters is None:
        raise SteersmanError(
            "rollout.sync adapter: the policy has no adapters; give model.lora, or use sync: weights"
        )
    names = [name for name in policy.adapters.state_dict() if ".lora_" in name]
    odd = [name for name in names if ".lora_A." not in name and ".lora_B." not in name]
    settings: Any = policy.adapters.peft_config["default"]
    odd += sorted(settings.target_parameters or ())
    if odd or settings.modules_to_save:
        raise SteersmanError(
            "rollout.sync adapter: servers take plain LoRA of linear layers, without dora, train_whole or adapters "
            f"on embeddings or experts{f' ({odd[0]})' if odd else ''}; use sync: weights"
        )


def largest_rank(policy: Policy) -> int:
    """The largest rank that peft's settings give any adapter of the policy; 0 where it has none."""
    if policy.adapters is None:
        return 0
    settings: Any = policy.adapters.peft_config["default"]
    return max([settings.r, *(settings.rank_pattern or {}).values()])


def write_adapter(policy: Policy, folder: Path) -> dict[str, str]:
    """The adapters as peft writes them, which is what servers read; returns each tensor's digest."""
    assert policy.adapters is not None
    folder.mkdir()
    policy.adapters.peft_config["default"].save_pretrained(str(folder))
    state = {k: v.detach().contiguous() for k, v in adapter_state(policy.adapters).items()}
    return write_weights(state, folder / ADAPTER)


def write_weights(weights: Mapping[str, Tensor], path: Path) -> dict[str, str]:
    """Writes the file and returns each tensor's digest. Raises SteersmanError where shared memory is full."""
    digests = {name: digest(tensor) for name, tensor in weights.items()}
    try:
        with saving(path):
            save_file(_apart(weights), path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return digests


def _apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, a copy of each that lies where another does: a file has no place for one tensor of two names."""
    seen: set[int] = set()
    out = {}
    for name, tensor in weights.items():
        out[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return out


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in row order."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


@torch.no_grad()
def canaries(policy: Policy, context: int | None) -> list[Canary]:
    """The same prompts every time, with the log-probabilities that the policy gives as it is now."""
    rng, known = np.random.default_rng(0), known_ids(policy)
    out = []
    with evaluation_mode(policy.model):
        for length in CANARY_LENGTHS:
            fits = length if context is None else min(length, context - 2)
            ids = rng.integers(0, known, size=max(fits, 1)).tolist()
            logits = policy.model(input_ids=torch.tensor([ids], device=policy.device)).logits[0, -1, :known]
            out.append(Canary(ids, torch.log_softmax(logits.float(), -1).cpu()))
    return out


def first_difference(sent: Mapping[str, str], held: Mapping[str, dict[str, str]]) -> str:
    """What the server has otherwise than it was sent, the first tensor by name; empty where nothing is."""
    for name, told in sent.items():
        if name not in held["file"]:
            return f"{name} did not arrive"
        if held["file"][name] != told:
            return f"{name} arrived with other values than the policy has"
        if held["live"].get(name, told) != told:
            return f"{name} arrived, and the server samples with other values"
    return ""


def tolerance_of(policy: Policy, asked: float | None) -> float:
    """The asked tolerance, or that of the weights' precision."""
    dtype: Any = next(policy.model.parameters()).dtype
    return TOLERANCE.get(dtype, 0.15) if asked is None else asked
