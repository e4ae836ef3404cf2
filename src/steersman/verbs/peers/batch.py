"""How many rows or answers an update and an iteration take, out of numbers that are per device there."""

from __future__ import annotations

from typing import Any

from steersman.verbs.peers.translation import LeftOutError, Translation, is_on, is_whole, short

SAMPLES = ("num_generations", "rloo_k", "n_samples_per_prompt")
BATCH = ("train_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches",
         "ppo_buffer_size", "steps_per_generation", "generation_batch_size")  # fmt: skip


def batch(t: Translation) -> None:
    """How many answers or rows an update and an iteration take, on all devices."""
    world, processes = _world(t)
    names = [n for n in BATCH if n in t.settings and n not in t.left]
    try:
        if t.verb == "distill":
            _prompts_of_update(t, world, names)
        elif "rollout.prompts" in t.known:
            _iteration(t, world, names)
        elif names:
            _rows_of_update(t, world, names)
    except LeftOutError as reason:
        for name in names:
            t.leave(name, str(reason))
    peers = {n for key in ("train.batch_size", "rollout.prompts") for n in t.sources.get(key, ())}
    if not processes and peers & set(BATCH[1:]):
        key = "rollout.prompts" if "rollout.prompts" in t.keys else "train.batch_size"
        t.left["world_size"] = (
            f"not in the file, so {key} is that of one device; multiply it by the number of devices"
        )


def _world(t: Translation) -> tuple[int, bool]:
    """Processes of all machines together, and whether the file says it."""
    name, number = t.given("num_processes", "nproc_per_node", "num_gpus", "actor_num_gpus_per_node")
    machines, several = t.given("nnodes", "num_machines", "actor_num_nodes")
    several = several if is_whole(several) else 1
    if not name:
        return 1, False
    if not is_whole(number):
        t.leave(name, f"{short(number)} is not a number of devices")
        return 1, False
    world = number if name == "num_processes" else number * several
    t.put("run.devices", world, name)
    if machines:
        t.leave(machines, "run.devices counts the processes of all machines")
    return world, True


def _rows_of_update(t: Translation, world: int, names: list[str]) -> None:
    for name in names:
        if name not in BATCH[:3]:
            t.leave(name, f"{t.verb} has no counterpart")
    if "train_batch_size" in names:
        t.put("train.batch_size", t.whole("train_batch_size", 0), "train_batch_size")
        for name in names[1:]:
            t.leave(name, "train_batch_size says the batch of all devices")
        return
    per_device = [name for name in names if name not in t.left]
    packed = next((name for name in ("packing", "neat_packing") if is_on(t.settings.get(name))), "")
    if per_device and packed:
        raise LeftOutError(f"counts packed rows with {packed}, and train.batch_size counts examples; give that")
    if per_device:
        rows = t.whole(BATCH[1], 8) * t.whole(BATCH[2], 1) * world  # 8 is transformers' default
        t.put("train.batch_size", rows, *per_device)


def _prompts_of_update(t: Translation, world: int, names: list[str]) -> None:
    """Prompts of an update whose answers are sampled for it: the answers of all devices, by those to a prompt."""
    sampled, _ = t.given(*SAMPLES)
    samples = t.whole(sampled, 1) if sampled else 8  # TRL's default
    t.put("rollout.samples", samples, *([sampled] if sampled else []))
    for name in (n for n in names if n not in BATCH[1:3]):
        t.leave(name, "each answer is learned from once here, in the update that it was sampled for")
    own = [n for n in names if n in BATCH[1:3]]
    if own:
        rows = t.whole(BATCH[1], 8) * t.whole(BATCH[2], 1) * world  # 8 is transformers' default
        if rows % samples:
            raise LeftOutError(f"{rows} answers are no whole number of prompts with {samples} answers each")
        t.put("train.batch_size", rows // samples, *own)


def _iteration(t: Translation, world: int, names: list[str]) -> None:
    """Prompts, samples of each, and minibatches."""
    sampled, _ = t.given(*SAMPLES)
    samples = t.whole(sampled, 1) if sampled else _default_samples(t, names)
    if sampled:
        t.put("rollout.samples", samples, sampled)
    prompts_name, _ = t.given("rollout_batch_size")
    if prompts_name:
        t.put("rollout.prompts", t.whole(prompts_name, 0), prompts_name)
    if "train_batch_size" in names:
        names.remove("train_batch_size")
        _samples_of_update(t, prompts_name, samples)
    if not names:
        return
    if prompts_name:
        raise LeftOutError("rollout_batch_size says the batch of all devices")
    if not sampled and samples > 1:
        t.put("rollout.samples", samples)
    update = t.whole(BATCH[1], 8) * t.whole(BATCH[2], 1) * world
    minibatches, _ = t.given("num_mini_batches", "ppo_buffer_size")
    if minibatches or t.has_critic():
        parts = t.whole(minibatches, 1)
        responses, own = update, [n for n in names if n in (*BATCH[1:3], minibatches)]
        if minibatches == "ppo_buffer_size":  # counts batches; TRL's num_mini_batches cuts the batch
            responses *= parts
        elif responses % parts:
            raise LeftOutError(f"{responses} responses of an iteration can not be cut into {parts} minibatches")
    else:
        name, _ = t.given("generation_batch_size", "steps_per_generation")
        responses = update
        if name:
            share = t.whole(BATCH[1], 8) * world if name == "steps_per_generation" else 1
            responses = t.whole(name, 1) * share
        if responses % update:
            raise LeftOutError(
                f"{responses} responses of an iteration are no whole number of updates of {update} responses"
            )
        parts, own = responses // update, [n for n in names if n in (*BATCH[1:3], name)]
        minibatches = name
    if responses % samples:
        raise LeftOutError(f"{responses} responses are no whole number of prompts with {samples} answers each")
    t.put("rollout.prompts", responses // samples, *own)
    if minibatches:
        t.put("algorithm.minibatches", parts, *own)
    for name in names:
        if name not in own:
            t.leave(name, f"{minibatches or 'the batch'} says the minibatches")


def _samples_of_update(t: Translation, prompts_name: str, samples: int) -> None:
    name = "train_batch_size"
    prompts, size = t.keys.get("rollout.prompts", 0), t.settings[name]
    ratio = f"rollout_batch_size x n_samples_per_prompt / {name}"
    if not is_whole(size) or not prompts_name or (prompts * samples) % size:
        t.leave(name, f"counts the samples of an update: algorithm.minibatches is {ratio}, not whole here")
    else:
        t.put("algorithm.minibatches", prompts * samples // size, name)


def _default_samples(t: Translation, names: list[str]) -> int:
    """Answers to a prompt where the file does not say it; TRL's numbers."""
    method: Any = t.recipe.model_fields["algorithm"].annotation
    if t.toolkit != "trl" or not method.group or not names:
        return 1
    return 2 if t.verb == "rloo" else 8
