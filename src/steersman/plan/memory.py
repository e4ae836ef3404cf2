"""The memory that a run will need at its peak, foreseen from its models, its data and its recipe.

What a run holds all the time is counted: weights, the optimizers' moments and what the process has taken already.
What it holds for a while is foreseen phase by phase, and the largest phase is the peak. How much a forward pass keeps
for its backward pass, and how much it makes besides, is measured on the model itself with a few tokens, so that fused
layers, adapters, precision, attention and gradient checkpointing count as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steersman.data import Encoded, collate
from steersman.distributed.pieces import local_shard, whole_shape
from steersman.distributed.ranks import ranks
from steersman.model import Policy, stacked_vectors, tables_and_adapters, whole_weights
from steersman.model.fast.folded import folded_bytes
from steersman.model.modes import evaluation_mode
from steersman.model.quantise import is_quantised
from steersman.ops.heap import RELEASE_BYTES, give_back
from steersman.ops.logprob import TILE
from steersman.ops.products import MIN_RECOMPUTED
from steersman.plan.made import NewStorageBytes
from steersman.rollout.batch import Limits, live_cache_size, prefill_size
from steersman.rollout.cache import kv_cache_bytes
from steersman.rollout.decoder import bytes_of_states
from steersman.rollout.fast.packed import clears, lasts, packed_bytes
from steersman.run.device import resident_memory, room
from steersman.run.preflight import Phase, Preflight, Role, size
from steersman.update.kinds import state_bytes
from steersman.update.optimizer import OptimizerConfig

PROBE = 64
"""Tokens of each of the longer sequences on which activations are measured, where the load's have so many; the
shorter ones have half of them."""
CONTEXT = 1 << 30
"""What an accelerator's driver, its libraries and the gaps of torch's allocator take: a rule of thumb."""
WIDE = 4
"""Tensors of a layer's widest size that live at once in a forward pass without gradients, and in a layer's backward
pass beside what was kept for it: gate, up, their product and one that is being made."""
MAPPED = 32 << 20
"""Bytes of a block from which the C library asks the system for it and gives it back; smaller ones it keeps."""
DISTANCE = 6
"""Tensors of tokens x vocabulary that the exact KL of a micro-batch takes with its first and second derivative."""
SAMPLING = 3
"""Tensors of rows x vocabulary in a step of sampling: logits, the tempered ones, cumulative weights."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the run. `trained` is the policy or scalar model around the module, and `optimizer` what trains it,
    where it is trained. One that waits in the CPU's memory adds `coming` bytes to the device while it is read, one
    `apart` is read on another device."""

    name: str
    module: nn.Module
    source: str
    trained: Any = None
    optimizer: OptimizerConfig | None = None
    coming: int = 0
    apart: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """The largest micro-batch: `tokens` in all, in rows of `length`; `alone` where an update reads no second one, so
    that it goes forward without gradients beside it. `distributions` counts the tokens whose log-probabilities over
    the whole vocabulary an update keeps, whatever a micro-batch has: those of a step in a trust region."""

    tokens: int
    length: int
    alone: bool = False
    distributions: int = 0


@dataclass(frozen=True, slots=True)
class SamplingLoad:
    """What is sampled in one call of the engine: `sequences` of prompts up to `longest` and so many new tokens, at
    least `per_prompt` of each prompt."""

    policy: Policy
    sequences: int
    longest: int
    new_tokens: int
    limits: Limits
    per_prompt: int = 1


def announce(
    pre: Preflight, device: torch.device, models: Sequence[Model], load: Load, sampled: SamplingLoad | None = None
) -> None:
    """Tells the models with what they hold, and every phase with its memory; refuses what the device can not hold."""
    roles = _roles(models)
    for role in roles:
        pre.role(role)
    phases = foresee(device, models, load, sampled)
    for phase in phases:
        pre.phase(phase)
    peak, there = max(phase.total for phase in phases), room(device)
    if peak > there.total:
        pre.refuse(
            f"memory: the run needs about {size(peak)} at its peak and the device has {size(there.total)}; lower "
            "run.micro_tokens, rollout.max_batch or data.max_length, or give model.lora, "
            "model.gradient_checkpointing or model.dtype bfloat16"
        )
    elif peak > there.free:
        pre.fact("memory", f"about {size(peak)} at the peak, but only {size(there.free)} are free now")


def foresee(
    device: torch.device, models: Sequence[Model], load: Load, sampled: SamplingLoad | None = None
) -> list[Phase]:
    """The phases of a run, each with the bytes that it holds; what is held all the time is part of each.

    On a CPU the C library keeps freed blocks below 32 MiB for the next ones, so the activations' room stays with the
    process after an update, unless sampling begins by giving it back (`rollout.fast.packed.clears`); else sampling
    uses it again for what is small, and adds to it what is large. The library aligns blocks
    by asking for more than it hands out, so a freed place is too small for the next tensor of the same size: what a
    forward pass makes and frees between activations leaves "gaps" as large as itself, of which about half is given
    back in time (`ops.heap`; docs/results/preflight.md). Half-precision models leave few: what they free (float32
    intermediates) is larger than what comes next.
    """
    roles = _roles(models)
    elsewhere = device.type != "cpu"
    away = [role.weights for role, model in zip(roles, models, strict=True) if elsewhere and model.coming]
    apart = [role.weights for role, model in zip(roles, models, strict=True) if model.apart]
    held = {
        "process": _process(device, sum(role.weights for role in roles)),
        "weights": sum(role.weights for role in roles) - sum(away) - sum(apart),
        "optimizer": sum(role.optimizer for role in roles),
    }
    learners = [model for model in models if model.trained is not None]
    found, kept, gaps = [], 0, 0
    if learners:
        kept, gaps = max((forward(model, load) for model in learners), key=sum)  # one backward pass after the other
        share = min(_gaps(model.module) for model in learners) if device.type == "cpu" else 0.0
        gaps = max(round(share * gaps), min(RELEASE_BYTES, kept)) if share else 0
        beside = max(backward(model.module, load) for model in learners)
        gradients = sum(role.gradients for role in roles)
        if load.alone and len(learners) == 1 and not ranks().deepspeed:  # they come as activations go
            gradients = max(gradients - kept, 0)
        shares = {"gradients": gradients, "activations": kept, "gaps": gaps, "backward": beside}
        if load.distributions:
            shares["distributions"] = _distribution_bytes(learners[0].module, load)
        found.append(Phase("update", {**held, **shares}))
    else:
        passing = max(WIDE * _widest(model.module) * load.tokens for model in models)
        found.append(Phase("forward", {**held, "activations": passing}))
    waiting = [model for model in models if model.coming]
    if waiting:
        passing = max(WIDE * _widest(model.module) * load.tokens for model in waiting)
        coming = max(model.coming for model in waiting)
        found.append(Phase("score", {**held, "one model that waited": coming, "activations": passing}))
    if sampled is not None:
        stays = device.type == "cpu" and not clears(sampled.policy.model, sampled.new_tokens)
        with whole_weights(sampled.policy):  # as it samples
            shares = rollout(sampled, kept + gaps if stays else 0)
        found.append(Phase("rollout", {**held, **shares}))
    give_back()  # what was measured with
    return found


def rollout(sampled: SamplingLoad, kept: int = 0) -> dict[str, int]:
    """Bytes of weights laid out anew, and of keys, values and logits, or of the `kept` room that these fit in."""
    model, limits = sampled.policy.model, sampled.limits
    dtype, config = next(model.parameters()).dtype, model.config
    rows, columns = live_cache_size(limits.rows, sampled.longest, sampled.new_tokens, sampled.sequences)
    reads = prefill_size(limits.rows, sampled.longest, sampled.per_prompt, limits.prefill_tokens)
    cache = kv_cache_bytes(config, rows, columns, dtype) + kv_cache_bytes(config, 1, reads, dtype)
    cache += 2 * rows * bytes_of_states(model)  # of the live rows, and of a prefill
    added = folded_bytes(model) if lasts(sampled.new_tokens) else 0
    reused = cache + (added if _widest(model) * config.get_text_config().hidden_size < MAPPED else 0)
    logits = SAMPLING * rows * config.get_text_config().vocab_size * 4 + WIDE * _widest(model) * reads
    return {
        "packed weights": packed_bytes(model, sampled.new_tokens),
        "adapters added in": added,
        "cache": cache,
        "logits": max(logits, kept - reused),
    }


def forward(model: Model, load: Load) -> tuple[int, int]:
    """Bytes that a forward pass over the largest micro-batch keeps for its backward pass, and those it frees at once.

    Linear in the tokens, and for attention that keeps its scores in tokens x length: short sequences of two lengths
    tell both.
    A model in training mode that keeps less than it does in evaluation mode checkpoints: one layer's activations are
    then made again beside what was kept, and what is freed is freed while they are.
    """
    module: Any = model.module
    kept, freed = _measured(model, load)
    if not any(part.training for part in module.modules()):
        return kept, freed
    with evaluation_mode(module):
        whole, freed_once = _measured(model, load)
    if kept >= whole:
        return kept, freed
    return kept + whole // module.config.get_text_config().num_hidden_layers, freed_once


def largest_load(costs: Sequence[int] | np.ndarray, longest: int, micro_tokens: int, batch: int) -> Load:
    """The largest micro-batch that batches of `batch` examples can give, an example having `costs` tokens and the
    longest sequence of all `longest`.

    A row of c tokens stands first among at most micro_tokens / c rows that are no longer, or alone
    (`distributed/micro.py`).
    """
    ordered = np.sort(np.asarray(costs))
    largest = max(min(batch, max(1, micro_tokens // c)) * c for c in np.unique(ordered).tolist())
    tokens = min(int(ordered[-batch:].sum()), largest)
    return Load(tokens, longest, alone=min(batch, len(ordered)) * int(ordered[-1]) <= micro_tokens)


def _measured(model: Model, load: Load) -> tuple[int, int]:
    module: Any = model.module
    length = max(min(load.length, PROBE) // 4 * 4, 4)
    rows = _rows_of_a_probe(module, load, length)
    with whole_weights(model.trained):
        measured = [forward_bytes(model, *shape) for shape in ((2 * rows, length // 2), (rows, length))]
    kept, made = (
        _scaled(a / (rows * length), b / (rows * length), load, length) for a, b in zip(*measured, strict=True)
    )
    return kept, max(made - kept, 0)


def _rows_of_a_probe(module: Any, load: Load, length: int) -> int:
    """One sequence, or on a CPU so many that layers treat them as they do the load: of large inputs a product keeps
    less (`ops.products`)."""
    if next(module.parameters()).device.type != "cpu":
        return 1
    large = math.ceil(MIN_RECOMPUTED / module.config.get_text_config().hidden_size / length)
    return max(min(large, load.tokens // length), 1)


def _scaled(a: float, b: float, load: Load, long: int) -> int:
    """Bytes of the load, out of those of a token in sequences of half of `long` tokens, and of `long`."""
    slope = (b - a) / (long - long // 2)
    if slope * long < 0.01 * b:  # what every sequence has once, not scores
        slope = 0.0
    return round((b + slope * (load.length - long)) * load.tokens)


def forward_bytes(model: Model, rows: int, length: int) -> tuple[int, int]:
    """Bytes that a forward pass over so many sequences of so many tokens keeps for its backward pass, weights left
    out, and that it makes in all."""
    module: Any = model.module
    own = {x.untyped_storage().data_ptr() for x in (*module.parameters(), *module.buffers())}
    seen: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept = x.detach()  # the tensor itself, kept by the node that made it, would keep that node for ever
        if x.untyped_storage().data_ptr() not in own:
            seen[x.untyped_storage().data_ptr()] = kept
        return kept

    half, ids = length // 2, module.config.get_text_config().vocab_size - 1  # different prompts: none is read for two
    sequences = collate([Encoded([1 + row % ids] * half, [1] * half, [True] * half) for row in range(rows)])
    made = NewStorageBytes()
    luck = torch.random.fork_rng(_generators(module))
    with luck, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), made:
        model.trained.reader.hidden(sequences)
        return sum(x.untyped_storage().nbytes() for x in seen.values()), made.total


def _generators(module: nn.Module) -> list[torch.device]:
    """Devices beside the CPU whose random numbers a pass over the model may draw."""
    return [device for device in {p.device for p in module.parameters()} if device.type not in ("cpu", "meta")]


def backward(model: nn.Module, load: Load) -> int:
    """Bytes of a backward pass beside gradients and activations: a layer's intermediate gradients, the output layer's
    tiles, a quantised layer's weight as its product takes it, and a gradient of vocabulary x hidden that is made anew
    and then added to what is there already: the output layer's at the start, the embedding's after all others."""
    trained = [p for p in model.parameters() if p.requires_grad]
    tables = max((_table_bytes(p) for p in _tables(model) if p.requires_grad), default=0)
    tile = TILE["cpu" if trained[0].is_cpu else "accelerator"][1]
    widened = max(
        (m.out_features * m.in_features * _wide(model) for m in _layers(model) if is_quantised(m)), default=0
    )
    return WIDE * _widest(model) * load.tokens + 2 * tile + widened + tables


def _distribution_bytes(model: Any, load: Load) -> int:
    """Float32 numbers of tokens x vocabulary: those kept, and what the distance of a micro-batch takes twice
    differentiated."""
    tokens = load.distributions + DISTANCE * min(load.tokens, load.distributions)
    return tokens * model.config.get_text_config().vocab_size * 4


def _tables(model: Any) -> list[nn.Parameter]:
    """The matrices of vocabulary x hidden, by use: a tied one comes twice."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return [layer.weight for layer in layers if layer is not None]


def _table_bytes(p: nn.Parameter) -> int:
    """A gradient of vocabulary x hidden as it is made, in float32 at least; for a weight in half precision beside the
    product that is added to it (`ops.logprob`)."""
    return local_shard(p).numel() * (8 if p.element_size() < 4 else p.element_size())


def _roles(models: Sequence[Model]) -> list[Role]:
    """What every model holds; weights that several have count with the first."""
    seen: set[int] = set()
    return [_role(model, seen) for model in models]


def _role(model: Model, seen: set[int]) -> Role:
    """What this rank holds. Gradients have their parameters' precision; the optimizer says what it keeps."""
    parameters = list(model.module.parameters())
    trained = [p for p in parameters if p.requires_grad] if model.trained is not None else []
    own = [x for x in (*parameters, *model.module.buffers()) if id(x) not in seen]
    seen |= {id(x) for x in own}
    weights = sum(map(_bytes, own))
    here, apart = ranks(), [*tables_and_adapters(model.module), *stacked_vectors(model.module)]
    gradients = sum(map(_bytes, trained)) // here.pieces(2)
    kept = (
        0
        if model.optimizer is None
        else state_bytes(map(local_shard, trained), model.optimizer, map(local_shard, apart))
    )
    if here.deepspeed:  # which updates a copy of the weights
        kept = (kept + sum(map(_bytes, trained))) // here.pieces(1)
    count, learned = (sum(whole_shape(p).numel() for p in some) for some in (parameters, trained))
    return Role(model.name, model.source, count, learned, weights, gradients, kept)


def _bytes(x: Tensor) -> int:
    """What this rank holds of a tensor."""
    return local_shard(x).numel() * x.element_size()


def _gaps(model: nn.Module) -> float:
    """The share of what a forward pass frees at once that stays in gaps of the C library's heap."""
    kinds = {p.dtype for m in model.modules() if not is_quantised(m) for p in m.parameters(recurse=False)}
    return 0.5 if kinds == {torch.float32} else 0.0


def _widest(model: nn.Module) -> int:
    """Bytes per token of the widest linear layer's output, the output layer left out."""
    tables = {id(p) for p in _tables(model)}
    return max((m.out_features * _wide(model) for m in _layers(model) if id(m.weight) not in tables), default=0)


def _layers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def _wide(model: nn.Module) -> int:
    """Bytes of a number that the model computes with; a quantised weight's own are fewer."""
    return max((p.element_size() for p in model.parameters() if p.is_floating_point()), default=4)


def _process(device: torch.device, weights: int) -> int:
    """What the process holds beside its weights: libraries and data on a CPU, the context on an accelerator."""
    return max(resident_memory() - weights, 0) if device.type == "cpu" else CONTEXT
