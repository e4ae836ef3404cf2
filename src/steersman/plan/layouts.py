"""What is planned for: the models of a run, the work of an iteration, and how the models can lie on many devices.

What each layout takes and how long it lasts is in `costs.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from steersman.model import Shape
from steersman.plan.devices import Cluster


@dataclass(frozen=True, slots=True)
class Role:
    """A model of the run: `trained` parameters of it learn. `owns_base` is False where it has another's base.
    `adapter_parameters` are those of its adapters, in float32; where there are any, what else learns is trained in a
    copy. `matrices` are the bytes of each parameter of the layers where these are quantised, and not as `Work` says.
    One that is `offloaded` waits in the node's memory until it is read, where every device holds whole models.
    `averages` are numbers of its weights' moving averages, in float32."""

    name: str
    shape: Shape
    trained: int = 0
    owns_base: bool = True
    adapter_parameters: int = 0
    matrices: float | None = None
    offloaded: bool = False
    averages: int = 0

    def weights(self, number: int) -> float:
        """Bytes of its weights, those of another's base left out."""
        shape, added = self.shape, (self.adapter_parameters + self.averages) * 4.0
        if self.adapter_parameters:
            added += self.trained_whole * number
        if not self.owns_base:
            return added
        if self.matrices is None:
            return shape.parameters * number + added
        inside = shape.layers * shape.largest_layer
        return inside * self.matrices + (shape.parameters - inside) * number + added

    @property
    def trained_adapters(self) -> int:
        return min(self.adapter_parameters, self.trained)

    @property
    def trained_whole(self) -> int:
        """Parameters that learn and are no adapters'."""
        return self.trained - self.trained_adapters

    def gradients(self, work: Work) -> float:
        """Bytes of its gradients, which have their parameters' precision."""
        return self.trained_adapters * 4.0 + self.trained_whole * work.weight

    def optimizer(self, work: Work, copies: float = 0) -> float:
        """Bytes that the optimizer keeps of it, and of a copy of `copies` bytes of each parameter that learns."""
        adapters = self.trained_adapters * (work.adapter_optimizer_bytes + copies)
        return adapters + self.trained_whole * (work.optimizer_bytes + copies)


@dataclass(frozen=True, slots=True)
class Work:
    """An iteration: `samples` answers of `new` tokens to prompts of `prompt` tokens (offline: none is sampled), gone
    through `epochs` times, `minibatches` updates each, in micro-batches of `micro` tokens. Weights and gradients have
    `weight` bytes, activations and the cache `compute`; the optimizer keeps `optimizer_bytes` of each parameter, and
    `adapter_optimizer_bytes` of each of an adapter. `scores` is the length of a sequence where attention is written
    out and keeps its scores, else 0. A device decodes at most `max_batch` answers side by side (None: all of its);
    each prompt has `per_prompt` of them."""

    samples: int
    prompt: int
    new: int
    epochs: int
    micro: int
    weight: int = 4
    compute: int = 4
    optimizer_bytes: float = 8
    adapter_optimizer_bytes: float = 8
    minibatches: int = 1
    ahead: int = 0
    scores: int = 0
    checkpointing: bool = False
    offload_activations: bool = False
    sampled: bool = True
    max_batch: int | None = None
    per_prompt: int = 1

    @property
    def tokens(self) -> int:
        return self.samples * (self.prompt + self.new)

    def side_by_side(self, answers: int, layout: Layout) -> int:
        """How many of so many answers a device decodes at once; devices set apart for sampling run vLLM."""
        return answers if self.max_batch is None or layout.generators else min(answers, self.max_batch)


@dataclass(frozen=True, slots=True)
class Layout:
    """`shards` devices hold one copy between them; under DeepSpeed `zero` devices hold one copy of the moments
    (`stage` 1), of moments and gradients (2), or of these and the weights (3, where `shards` is as many).
    `generators` devices are set apart for sampling (0: all sample), and `scorers` for the models that do not learn
    (0: all score). With `offloaded` a model is on the devices only while its phase lasts, else in the nodes' memory.
    `keys` are the settings that ask for it, empty where nothing need be set; what steersman can not run yet is
    `planned` only."""

    name: str
    shards: int
    generators: int = 0
    keys: str = ""
    scorers: int = 0
    offloaded: bool = False
    planned: bool = False
    stage: int = 0
    zero: int = 1

    @property
    def moments(self) -> int:
        """Devices that hold one copy of the optimizer's moments between them."""
        return self.zero if self.stage else self.shards

    @property
    def gradients(self) -> int:
        """Devices that hold one copy of the gradients between them."""
        return self.zero if self.stage > 1 else self.shards

    @property
    def apart(self) -> int:
        """Devices that do not train."""
        return self.generators + self.scorers


def layouts(there: Cluster, work: Work) -> Iterator[Layout]:
    """Every layout that the devices allow; those that are planned only come last."""
    n = there.count
    yield Layout("replicas", 1, keys="" if n == 1 else f"run.devices: {n}")
    if n > 1:
        if work.weight == 4 and work.optimizer_bytes == 8:  # float32 weights and AdamW
            yield Layout("moments in pieces", 1, keys=f"run.devices: {n}, parallel.mode: zero1", stage=1, zero=n)
            yield Layout(
                "moments and gradients in pieces", 1, keys=f"run.devices: {n}, parallel.mode: zero2", stage=2, zero=n
            )
        yield Layout("sharded", n, keys=f"run.devices: {n}, parallel.mode: fsdp")
        if work.weight == 4 and work.optimizer_bytes == 8:
            keys = f"run.devices: {n}, parallel.mode: zero3"
            yield Layout("sharded by DeepSpeed", n, keys=keys, stage=3, zero=n)
        if there.nodes > 1:
            yield Layout(
                "sharded in each node", there.per_node,
                keys=f"run.devices: {n}, parallel.mode: fsdp, parallel.replicas: {there.nodes}",
            )  # fmt: skip
    apart = 1
    while work.sampled and apart < n:
        yield Layout(f"sharded, {apart} apart for sampling", n - apart, apart, "rollout.engine: vllm")
        apart *= 2
    if work.sampled and n > 1:
        half = n // 2
        keys = f"frozen_apart: true, run.devices: {half}"
        yield Layout(f"replicas, {half} apart for scoring", 1, keys=keys, scorers=half)
        if half > 1:
            pieces = f"sharded, {half} apart for scoring"
            yield Layout(pieces, n - half, keys=f"{keys}, parallel.mode: fsdp", scorers=half)
    if work.sampled:
        yield Layout("models in the node's memory between phases", n, offloaded=True, planned=True)
    for scorers in {n // 8, n // 4} - {0} if work.sampled else ():
        yield Layout(f"sharded, {scorers} apart for scoring", n - scorers, scorers=scorers, planned=True)
