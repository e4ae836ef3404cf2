"""Where the models of a run can lie on many devices, what a layout takes of a device's memory, and how long it takes.

All is arithmetic on the model's shape and the devices' data sheets, and is shown, so that a reader can check it:

    held        (weights + trained x what the optimizer keeps) / shards
    gradients   trained x bytes / shards; where an update is one micro-batch, those of the model that is in its pass
                grow while its activations go, and only what is more than these counts
    activations tokens x layers x (2 (4 + 2 n) h + n (2 q + k) + 4 n i) bytes, numbers having n (`Shape.activations`);
                with checkpointing tokens x layers x n h, and one layer's of the former again
    backward    tokens x 4 n i, a layer's gradients; the output layer's gradient in float32, and two tiles of logits
    cache       2 x layers x kv heads x head size x sequences x length x bytes
    seconds     2 P a token forward, 6 P trained (8 P with checkpointing), at `COMPUTE` of the data sheet's rate; a
                step of decoding reads weights and cache once, at `MEMORY` of the data sheet's bandwidth

Source: activations are counted on transformers' Llama as arXiv 2205.05198, section 4.1, counts GPT's (without the
attention scores, which no current kernel keeps); 2 P and 6 P a token, arXiv 2001.08361, section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from steersman.model import Shape
from steersman.ops.logprob import TILE
from steersman.plan.devices import Cluster

COMPUTE = 0.4
"""Share of the data sheet's rate that large matrix products reach in a training step; 0.3 to 0.5 are published."""
MEMORY = 0.6
"""Share of the data sheet's bandwidth that decoding reaches."""


@dataclass(frozen=True, slots=True)
class Role:
    """A model of the run: `trained` parameters of it learn. `own` is False where it has another's base. `added` are
    its adapters' parameters, in float32. `matrices` are the bytes of each parameter of the layers where these are
    quantised, and not as `Work` says."""

    name: str
    shape: Shape
    trained: int = 0
    own: bool = True
    added: int = 0
    matrices: float | None = None

    def weights(self, number: int) -> float:
        """Bytes of its weights, those of another's base left out."""
        shape, adapters = self.shape, self.added * 4.0
        if not self.own:
            return adapters
        if self.matrices is None:
            return shape.parameters * number + adapters
        inside = shape.layers * shape.largest_layer
        return inside * self.matrices + (shape.parameters - inside) * number + adapters


@dataclass(frozen=True, slots=True)
class Work:
    """An iteration: `samples` answers of `new` tokens to prompts of `prompt` tokens (offline: none is sampled), gone
    through `epochs` times, `minibatches` updates each, in micro-batches of `micro` tokens. Weights and gradients have
    `weight` bytes, activations and the cache `compute`; the optimizer keeps `kept` bytes of each parameter. `scores`
    is the length of a sequence where attention is written out and keeps its scores, else 0."""

    samples: int
    prompt: int
    new: int
    epochs: int
    micro: int
    weight: int = 4
    compute: int = 4
    kept: float = 8
    minibatches: int = 1
    scores: int = 0
    checkpointing: bool = False
    sampled: bool = True

    @property
    def tokens(self) -> int:
        return self.samples * (self.prompt + self.new)


@dataclass(frozen=True, slots=True)
class Layout:
    """`shards` devices hold one copy between them; `generators` devices are set apart for sampling (0: all sample).
    `keys` are the settings that ask for it."""

    name: str
    shards: int
    generators: int = 0
    keys: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a layout takes: bytes by role and by what else, and seconds by phase."""

    layout: Layout
    memory: dict[str, float]
    seconds: dict[str, float]
    room: float

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.room

    @property
    def iteration(self) -> float:
        """Seconds of an iteration; devices that are set apart for sampling do so while the others train."""
        if self.layout.generators:
            rest = sum(s for name, s in self.seconds.items() if name != "generate")
            return max(self.seconds["generate"], rest)
        return sum(self.seconds.values())


def layouts(there: Cluster, work: Work) -> Iterator[Layout]:
    """Every layout that the devices allow."""
    n = there.count
    yield Layout("replicas", 1, keys="" if n == 1 else f"run.devices: {n}")
    if n > 1:
        yield Layout("sharded", n, keys=f"run.devices: {n}, parallel.mode: fsdp")
        if there.nodes > 1:
            yield Layout(
                "sharded in each node", there.per_node,
                keys=f"run.devices: {n}, parallel.mode: fsdp, parallel.replicas: {there.nodes}",
            )  # fmt: skip
    apart = 1
    while work.sampled and apart < n:
        yield Layout(f"sharded, {apart} apart for sampling", n - apart, apart, "rollout.engine: vllm")
        apart *= 2


def weigh(layout: Layout, roles: list[Role], work: Work, there: Cluster) -> Verdict:
    """Memory and time of a layout."""
    memory = _memory(layout, roles, work, there)
    return Verdict(layout, memory, seconds(layout, roles, work, there), there.device.memory)


def _memory(layout: Layout, roles: list[Role], work: Work, there: Cluster) -> dict[str, float]:
    held = {}
    for role in roles:
        held[role.name] = (role.weights(work.weight) + role.trained * work.kept) / layout.shards
    actor = roles[0].shape
    if layout.shards > 1:
        held["a layer put together, and the next"] = (2 * actor.largest_layer + actor.tables) * work.compute
    trained = max((role.shape for role in roles if role.trained), key=lambda s: s.parameters, default=actor)
    length = work.prompt + work.new
    update = -(-work.samples // (work.minibatches * (there.count - layout.generators))) * length
    micro = min(max(1, work.micro // length) * length, update)  # whole rows
    one = micro * trained.activations(work.compute, work.scores)
    activations = one * trained.layers
    if work.checkpointing:
        activations = micro * trained.hidden * trained.layers * work.compute + one
    activations += backward(trained, roles, micro, work)
    gradients = sorted(
        role.trained * (4 if role.added else work.weight) / layout.shards for role in roles if role.trained
    )
    if gradients and update <= micro:
        gradients[-1] = max(gradients[-1] - activations, 0)
    held["gradients"] = sum(gradients)
    sampling = 0.0
    if work.sampled and not layout.generators:
        here = -(-work.samples // there.count)
        whole = actor.parameters * work.compute if layout.shards > 1 else 0
        sampling = whole + actor.cache(work.prompt + work.new, work.compute) * here
    held["activations, or cache and whole weights while sampling"] = max(activations, sampling)
    held["process"] = there.device.process
    return held


def backward(trained: Shape, roles: list[Role], micro: int, work: Work) -> float:
    """Bytes that a backward pass makes beside what was kept for it and the gradients."""
    inside = 4 * micro * trained.wide * work.compute
    whole = any(role.trained >= role.shape.parameters for role in roles)
    output = 4 * trained.vocabulary * trained.hidden if whole else 0
    return max(inside, output + 2 * min(TILE["accelerator"][1], 4 * micro * trained.vocabulary))


def seconds(layout: Layout, roles: list[Role], work: Work, there: Cluster) -> dict[str, float]:
    """Seconds of each phase of an iteration, every response as long as `work` says."""
    device, actor = there.device, roles[0].shape
    flops, training = device.flops * COMPUTE, there.count - layout.generators
    found: dict[str, float] = {}
    if work.sampled:
        samplers = layout.generators or there.count
        here = -(-work.samples // samplers)
        prefill = 2 * actor.parameters * here * work.prompt / flops
        read = actor.parameters * work.compute + here * actor.cache(work.prompt + work.new / 2, work.compute)
        step = max(read / (device.bandwidth * MEMORY), 2 * actor.parameters * here / flops)
        found["generate"] = prefill + work.new * step
        scored = sum(role.shape.parameters for role in roles[1:])
        found["score"] = 2 * scored * work.tokens / training / flops
    per = 8 if work.checkpointing else 6
    trained = sum(role.shape.parameters for role in roles if role.trained)
    found["train"] = work.epochs * per * trained * work.tokens / training / flops
    moved = sum(role.trained for role in roles) * work.weight
    micro = max(1, round(work.epochs * work.tokens / training / max(work.micro, 1)))
    if layout.shards > 1:
        inside = 3 * trained * work.compute * micro / there.link(layout.shards)
        between = 2 * moved / layout.shards / device.network if training > layout.shards else 0.0
        found["exchange"] = inside + between
    elif there.count > 1:
        found["exchange"] = work.epochs * 2 * moved / there.link(there.count)
    if layout.generators or (work.sampled and layout.shards > 1):
        through = there.count if layout.generators else layout.shards
        found["move weights"] = actor.parameters * work.compute / there.link(through)
    return found
