"""What a layout of a run's models takes of a device's memory, and how long an iteration takes in it.

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
                them in steersman's engine, with room for those that take a row later, and one prefill; vLLM chooses
                for itself)
    seconds     2 P a token forward, 6 P trained (8 P with checkpointing), at `MFU` of the data sheet's rate, P
                being the parameters that a token passes; a step of decoding reads weights and cache once, at
                `MBU` of the data sheet's bandwidth

Source: activations are counted on transformers' Llama as arXiv 2205.05198, section 4.1, counts GPT's (without the
attention scores, which no current kernel keeps); 2 P and 6 P a token, arXiv 2001.08361, section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from steersman.model import Shape
from steersman.ops.logprob import TILE
from steersman.plan.devices import Cluster
from steersman.plan.layouts import Layout, Role, Work
from steersman.rollout.batch import live_cache_size, prefill_size
from steersman.rollout.engine import PREFILL

MFU = 0.4
"""Model FLOPs utilisation: the share of the data sheet's rate that large matrix products reach in a training step;
0.3 to 0.5 are published."""
MBU = 0.6
"""Memory bandwidth utilisation: the share of the data sheet's bandwidth that decoding reaches."""
HOST_BANDWIDTH = 50e9
"""Bytes a second between a device and its node's memory, of the 64e9 of PCIe 5.0 x16 in one direction."""


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
        sampling = whole + _sampling_cache(actor, work, layout, here)
    come = waiting(layout, roles, work)
    held["activations, or cache and whole weights while sampling"] = max(activations, sampling, *come)
    held["process"] = there.device.process
    return held


def _sampling_cache(actor: Shape, work: Work, layout: Layout, answers: int) -> float:
    """Bytes of keys and values as steersman's engine has them: those of the live rows, and of one prefill."""
    rows, columns = live_cache_size(work.side_by_side(answers, layout), work.prompt, work.new, answers)
    read = prefill_size(rows, work.prompt, work.per_prompt, PREFILL)
    return rows * actor.cache(columns, work.compute) + actor.cache(read, work.compute)


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
    flops, training = device.flops * MFU, there.count - layout.apart
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
        found["move models"] = moved_between_phases(roles, work) / layout.shards / HOST_BANDWIDTH
    elif work.sampled and (come := waiting(layout, roles, work)):  # offline updates do without the reference
        found["move models"] = sum(come) / HOST_BANDWIDTH
    return found


def decoding_step(rows: int, actor: Shape, work: Work, there: Cluster) -> float:
    """Seconds of a step of decoding `rows` answers side by side, half of their tokens written."""
    device = there.device
    read = actor.parameters * work.compute + rows * actor.cache(work.prompt + work.new / 2, work.compute)
    return max(
        read / (device.bandwidth * MBU),
        2 * actor.active * rows / (device.flops * MFU),
    )


def moved_between_phases(roles: list[Role], work: Work) -> float:
    """Bytes that an iteration moves between devices and nodes' memory: what learns goes away and comes back with its
    optimizer, what does not learn only comes, since its copy in memory stays true."""
    learning = sum(2 * (role.weights(work.weight) + role.optimizer(work)) for role in roles if role.trained)
    return learning + sum(role.weights(work.weight) for role in roles if not role.trained)
