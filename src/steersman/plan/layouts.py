"""Where the models of a run can lie on many devices, what a layout takes of a device's memory, and how long it takes.

All is arithmetic on the model's shape and the devices' data sheets, and is shown, so that a reader can check it:

    held        weights / shards + trained x what the optimizer keeps / shards (zero1 to zero3: this and a
                copy of the weights / devices)
    gradients   trained x bytes / shards (zero2, zero3: / devices); where an update is one micro-batch, those of the
                model that is in its pass grow while its activations go, and only what is more than these counts
    activations tokens x layers x (2 (4 + 2 n) h + n (2 q + k) + 4 n i) bytes, numbers having n (`Shape.activations`);
                with checkpointing tokens x layers x n h, of one layer only where these wait in the CPU's memory, and
                one layer's of the former again
    backward    tokens x 4 n i, a layer's gradients; the output layer's gradient in float32, and two tiles of logits
    cache       2 x layers x kv heads x head size x sequences side by side x length x bytes (`rollout.max_batch` of
                them in steersman's engine; vLLM chooses for itself)
    seconds     2 P a token forward, 6 P trained (8 P with checkpointing), at `COMPUTE` of the data sheet's rate, P
                being the parameters that a token passes; a step of decoding reads weights and cache once, at
                `MEMORY` of the data sheet's bandwidth

Source: activations are counted on transformers' Llama as arXiv 2205.05198, section 4.1, counts GPT's (without the
attention scores, which no current kernel keeps); 2 P and 6 P a token, arXiv 2001.08361, section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from steersman.model import Shape
from steersman.ops.logprob import TILE
from steersman.plan.devices import Cluster

COMPUTE = 0.4
"""Share of the data sheet's rate that large matrix products reach in a training step; 0.3 to 0.5 are published."""
MEMORY = 0.6
"""Share of the data sheet's bandwidth that decoding reaches."""


HOST = 50e9
"""Bytes a second between a device and its node's memory, of the 64e9 of PCIe 5.0 x16 in one direction."""


@dataclass(frozen=True, slots=True)
class Role:
    """A model of the run: `trained` parameters of it learn. `owns_base` is False where it has another's base.
    `adapter_parameters` are those of its adapters, in float32; where there are any, what else learns is trained in a
    copy. `matrices` are the bytes of each parameter of the layers where these are quantised, and not as `Work` says.
    One that is `offloaded` waits in the node's memory until it is read, where every device holds whole models."""

    name: str
    shape: Shape
    trained: int = 0
    owns_base: bool = True
    adapter_parameters: int = 0
    matrices: float | None = None
    offloaded: bool = False

    def weights(self, number: int) -> float:
        """Bytes of its weights, those of another's base left out."""
        shape, added = self.shape, self.adapter_parameters * 4.0
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
    out and keeps its scores, else 0. A device decodes at most `max_batch` answers side by side (None: all of its)."""

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


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a layout takes: bytes by role and by what else on a device that trains, on each device that is set apart
    (`others`), and seconds by phase."""

    layout: Layout
    memory: dict[str, float]
    seconds: dict[str, float]
    room: float
    others: dict[str, float] = field(default_factory=dict)
    ahead: bool = False

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return max(self.peak, *self.others.values(), 0.0) <= self.room

    @property
    def iteration(self) -> float:
        """Seconds of an iteration; with `rollout.ahead` devices apart sample while the others train, else they wait
        for each other."""
        if self.layout.generators and self.ahead:
            rest = sum(s for name, s in self.seconds.items() if name != "generate")
            return max(self.seconds["generate"], rest)
        return sum(self.seconds.values())


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


def weigh(layout: Layout, roles: list[Role], work: Work, there: Cluster) -> Verdict:
    """Memory and time of a layout."""
    memory = _memory(layout, roles, work, there)
    others = _others(layout, roles, work, there)
    took = seconds(layout, roles, work, there)
    return Verdict(layout, memory, took, there.device.memory, others, work.ahead > 0)


def _others(layout: Layout, roles: list[Role], work: Work, there: Cluster) -> dict[str, float]:
    """What each device holds that is set apart: a sampler the whole actor and at least one response, a scorer the
    models that do not learn, or, in a layout that is planned only, its piece of them."""
    found, actor = {}, roles[0].shape
    if layout.generators:
        least = actor.parameters * work.compute + actor.cache(work.prompt + work.new, work.compute)
        found["a device that samples, at least"] = least + there.device.process
    if layout.scorers:
        frozen = sum(role.weights(work.weight) for role in roles if not role.trained)
        pieces = layout.scorers if layout.planned else 1
        found["a device that scores"] = frozen / pieces + there.device.process
    return found


def _memory(layout: Layout, roles: list[Role], work: Work, there: Cluster) -> dict[str, float]:
    held = {}
    for role in roles:
        if (layout.scorers and not role.trained) or (role.offloaded and layout.shards == 1):
            continue
        kept = role.optimizer(work, 4 * (layout.stage > 0)) / layout.moments
        held[role.name] = role.weights(work.weight) / layout.shards + kept
    actor = roles[0].shape
    if layout.shards > 1:
        held["a layer put together, and the next"] = (2 * actor.largest_layer + actor.tables) * work.compute
    trained = max((role.shape for role in roles if role.trained), key=lambda s: s.parameters, default=actor)
    length = work.prompt + work.new
    update = -(-work.samples // (work.minibatches * (there.count - layout.apart))) * length
    micro = min(max(1, work.micro // length) * length, update)  # whole rows
    one = micro * trained.activations(work.compute, work.scores)
    activations = one * trained.layers
    if work.checkpointing:
        kept = 1 if work.offload_activations else trained.layers
        activations = micro * trained.hidden * kept * work.compute + one
    activations += backward(trained, roles, micro, work)
    gradients = sorted(role.gradients(work) / layout.gradients for role in roles if role.trained)
    if gradients and update <= micro:
        gradients[-1] = max(gradients[-1] - activations, 0)
    if layout.offloaded:  # the largest phase alone: sampling with the actor, or one model that learns
        learning = max(
            (role for role in roles if role.trained),
            key=lambda r: r.weights(work.weight) + r.optimizer(work), default=roles[0],
        )  # fmt: skip
        held = {name: x for name, x in held.items() if name == learning.name or name.startswith("a layer")}
        gradients = gradients[-1:]
    held["gradients"] = sum(gradients)
    sampling = 0.0
    if work.sampled and not layout.generators:
        here = -(-work.samples // (there.count - layout.scorers))
        whole = actor.parameters * work.compute if layout.shards > 1 else 0
        sampling = whole + actor.cache(work.prompt + work.new, work.compute) * work.side_by_side(here, layout)
    come = waiting(layout, roles, work)
    held["activations, or cache and whole weights while sampling"] = max(activations, sampling, *come)
    held["process"] = there.device.process
    return held


def waiting(layout: Layout, roles: list[Role], work: Work) -> list[float]:
    """Bytes of each model that comes to a device for its phase only, while nothing is sampled or updated."""
    return [role.weights(work.weight) for role in roles if role.offloaded and layout.shards == 1]


def backward(trained: Shape, roles: list[Role], micro: int, work: Work) -> float:
    """Bytes that a backward pass makes beside what was kept for it and the gradients."""
    inside = 4 * micro * trained.wide * work.compute
    whole = any(role.trained >= role.shape.parameters for role in roles)
    output = 4 * trained.vocabulary * trained.hidden if whole else 0
    return max(inside, output + 2 * min(TILE["accelerator"][1], 4 * micro * trained.vocabulary))


def seconds(layout: Layout, roles: list[Role], work: Work, there: Cluster) -> dict[str, float]:
    """Seconds of each phase of an iteration, every response as long as `work` says."""
    device, actor = there.device, roles[0].shape
    flops, training = device.flops * COMPUTE, there.count - layout.apart
    found: dict[str, float] = {}
    if work.sampled:
        samplers = layout.generators or training
        here = -(-work.samples // samplers)
        prefill = 2 * actor.active * here * work.prompt / flops
        rows = work.side_by_side(here, layout)
        waves = [rows] * (here // rows) + [here % rows] * (here % rows > 0)  # all answers are as long
        steps = sum(decoding_step(wave, actor, work, there) for wave in waves)
        found["generate"] = prefill + work.new * steps
        scored = sum(role.shape.active for role in roles[1:] if not (layout.scorers and not role.trained))
        found["score"] = 2 * scored * work.tokens / training / flops
        if layout.scorers:
            frozen = sum(role.shape.active for role in roles if not role.trained)
            found["score"] += 2 * frozen * work.tokens / layout.scorers / flops
    per = 8 if work.checkpointing else 6
    learning = [role for role in roles if role.trained]
    passed = sum(role.shape.active for role in learning)
    found["train"] = work.epochs * per * passed * work.tokens / training / flops
    moved = sum(role.gradients(work) for role in learning)
    micro = max(1, round(work.epochs * work.tokens / training / max(work.micro, 1)))
    if layout.shards > 1:
        gathered = 3 * sum(role.shape.parameters for role in learning) * work.compute
        inside = gathered * micro / there.link(layout.shards)
        between = 2 * moved / layout.shards / device.network if training > layout.shards else 0.0
        found["exchange"] = inside + between
    elif training > 1:
        found["exchange"] = work.epochs * 2 * moved / there.link(training)
    if layout.generators or (work.sampled and layout.shards > 1):
        through = there.count if layout.generators else layout.shards
        found["move weights"] = actor.parameters * work.compute / there.link(through)
    if layout.offloaded:
        found["move models"] = moved_between_phases(roles, work) / layout.shards / HOST
    elif work.sampled and (come := waiting(layout, roles, work)):  # offline updates do without the reference
        found["move models"] = sum(come) / HOST
    return found


def decoding_step(rows: int, actor: Shape, work: Work, there: Cluster) -> float:
    """Seconds of a step of decoding `rows` answers side by side, half of their tokens written."""
    device = there.device
    read = actor.parameters * work.compute + rows * actor.cache(work.prompt + work.new / 2, work.compute)
    return max(read / (device.bandwidth * MEMORY), 2 * actor.active * rows / (device.flops * COMPUTE))


def moved_between_phases(roles: list[Role], work: Work) -> float:
    """Bytes that an iteration moves between devices and nodes' memory: what learns goes away and comes back with its
    optimizer, what does not learn only comes, since its copy in memory stays true."""
    learning = sum(2 * (role.weights(work.weight) + role.optimizer(work)) for role in roles if role.trained)
    return learning + sum(role.weights(work.weight) for role in roles if not role.trained)
