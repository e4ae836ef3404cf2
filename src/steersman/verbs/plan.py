"""`steersman plan`: what a recipe takes of which devices, laid out in every way that they allow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich.table import Table

from steersman.config.load import load_recipe
from steersman.config.sections import Section
from steersman.model import Adapted, LoraConfig, adapted, attributes_of, load_tokenizer, saved_lora, shape_of
from steersman.plan.costs import MBU, MFU, Verdict, weigh
from steersman.plan.devices import Cluster, cluster
from steersman.plan.layouts import Role, Work, layouts
from steersman.plan.routes import routes
from steersman.plan.simulate import Lengths, SimulatedIteration, best_apart, simulate
from steersman.recipe.on_policy import CriticConfig, OnPolicyRecipe
from steersman.recipe.sections import ModelConfig
from steersman.rollout.engine import ROWS
from steersman.run.console import new_console
from steersman.run.run_config import ON_ACCELERATOR
from steersman.setup.models import lora_of
from steersman.train.roles import serves_as_critic
from steersman.types import SteersmanError
from steersman.update.kinds import state_bytes
from steersman.update.optimizer import OptimizerConfig
from steersman.verbs.feedback import RECIPES as FEEDBACK
from steersman.verbs.feedback import FeedbackRecipe
from steersman.verbs.on_policy_recipes import RECIPES as ON_POLICY
from steersman.verbs.preference import PreferenceRecipe
from steersman.verbs.reward_model import RewardModelRecipe
from steersman.verbs.sft import SFTRecipe

KINDS: dict[str, type[Section]] = {
    "sft": SFTRecipe, "reward": RewardModelRecipe, "dpo": PreferenceRecipe, **FEEDBACK, **ON_POLICY,
}  # fmt: skip
MATRICES = {"none": None, "nf4": 0.516, "fp4": 0.516, "int8": 1.0}
"""Bytes of a quantised parameter: 4 bits, a scale of 8 bits for each 64, and one of 32 bits for each 256 of those."""


class PlanRecipe(Section):
    """Where a recipe's models can lie on many devices, and what each layout takes."""

    recipe: str = Field(description="the recipe to plan")
    verb: str = Field(default="ppo", description=f"the verb that the recipe is of: {', '.join(KINDS)}")
    devices: str = Field(default="1xH100-80GB", description="devices of each node, such as 8xH100-80GB")
    nodes: int = Field(default=1, ge=1, description="how many such nodes")
    size: str = Field(
        default="", description="another model in the recipe's place: 135m, 1b, 7b, 8b, 13b, 70b, or a folder"
    )
    prompt_tokens: int = Field(default=512, ge=1, description="tokens of a prompt, or of an example offline")
    simulate: bool = Field(
        default=False, description="also simulate the loop on 1, 2, 4, ... devices, with responses of many lengths"
    )
    mean_tokens: int | None = Field(
        default=None, ge=1, description="mean length of a response in the simulation; null: half the longest"
    )


def run(recipe: PlanRecipe) -> dict[str, Any]:
    """Prints the layouts, the fastest that fits first, and the arithmetic of the best; returns them as numbers."""
    if recipe.verb not in KINDS:
        raise SteersmanError(f"verb: {recipe.verb} has no plan; there are {', '.join(KINDS)}")
    asked: Any = load_recipe(KINDS[recipe.verb], Path(recipe.recipe))
    there = cluster(recipe.devices, recipe.nodes)
    roles, work = roles_of(asked, recipe.size), work_of(asked, recipe.prompt_tokens)
    found = [weigh(one, roles, work, there) for one in layouts(there, work)]
    found.sort(key=lambda v: (not v.fits, v.layout.planned, v.iteration if v.fits else v.peak))
    show(found, roles, work, there)
    if recipe.simulate and work.sampled:
        lengths = Lengths(recipe.mean_tokens or max(work.new // 2, 1), work.new)
        show_growth(growth(there, roles, work, lengths), work)
    return {
        "layouts": [
            {
                "name": v.layout.name,
                "fits": v.fits,
                "planned_only": v.layout.planned,
                "peak_bytes": v.peak,
                "iteration": v.iteration,
                "memory": v.memory,
                "seconds": v.seconds,
            }
            for v in found
        ]
    }


def roles_of(recipe: Any, size: str) -> list[Role]:
    """The models of the recipe, the actor (or the model that is trained) first; all of another `size` where one is
    given."""
    model = recipe.model
    if model.scratch is not None and not size:
        raise SteersmanError(
            "model.scratch: a plan counts a model by the config in its folder, and this one has none yet; give "
            "--size, a name or a folder with such a config"
        )
    if isinstance(recipe, RewardModelRecipe):
        return [learner("model", model.path, model, size, scalar=True)]
    own = learner("actor" if isinstance(recipe, OnPolicyRecipe) else "model", model.path, model, size)
    if isinstance(recipe, FeedbackRecipe | PreferenceRecipe) and recipe.moving_reference is not None:
        return [own, moving_reference(own, recipe)]
    if isinstance(recipe, FeedbackRecipe):
        return [own, reference(recipe.reference, own, recipe, size, waits=recipe.reference_waits)]
    if isinstance(recipe, PreferenceRecipe):
        folders = [recipe.reference if recipe.reads_reference else None, recipe.anchor]
        asked, waits = [folder for folder in folders if folder is not None], recipe.reference_waits
        return [own, *(reference(folder, own, recipe, size, waits=waits) for folder in asked)]
    if not isinstance(recipe, OnPolicyRecipe):
        return [own]
    found = [own]
    if recipe.algorithm.critic and (recipe.critic or CriticConfig()).init != "shared":
        source, apart = size or critic_source(recipe), recipe.share != "base"
        found.append(learner("critic", source, model, size, scalar=True, owns_base=apart))
    if recipe.reference != "none":
        found.append(reference(recipe.reference, own, recipe, size, waits=recipe.offload))
    if recipe.algorithm.sampling_mask() is not None:
        found.append(replace(own, name="masking policy", trained=0))
    judges = {name: part.model for name, part in recipe.reward.parts.items() if part.model is not None}
    return found + [judge(f"reward {name}", path, recipe, size) for name, path in judges.items()]


def learner(
    name: str, path: str, model: ModelConfig, size: str, *, scalar: bool = False, owns_base: bool = True
) -> Role:
    """A model that learns as the section says, whole or by its adapters."""
    shape, added = shape_of(size or path), adapters(path, lora_of(model), size, scalar=scalar)
    if scalar:
        shape = shape.scalar()
    if added is None:
        return Role(name, shape, shape.parameters, owns_base, matrices=MATRICES[model.quantise])
    return Role(name, shape, added.trained, owns_base, added.adapters, MATRICES[model.quantise])


def adapters(path: str, lora: LoraConfig | None, size: str, *, scalar: bool) -> Adapted | None:
    """What learns under the adapters that the folder holds, or else under `lora`; None without either.

    On a model of another `size` saved adapters are on the layers of the same names, or on all linear ones where it
    has none of that name.
    """
    saved = saved_lora(path)
    if saved is None or not size:
        return None if saved is None and lora is None else adapted(size or path, lora or LoraConfig(), scalar=scalar)
    targets, whole = saved["targets"], tuple(saved["train_whole"])
    names = targets if isinstance(targets, str) else sorted({name.rsplit(".", 1)[-1] for name in targets})
    asked = LoraConfig(**{**saved, "targets": names, "train_whole": whole})
    try:
        return adapted(size, asked, scalar=scalar)
    except SteersmanError:
        return adapted(size, replace(asked, targets="all-linear"), scalar=scalar)


def reference(folder: str, own: Role, recipe: Any, size: str, *, waits: bool) -> Role:
    """A frozen policy that answers are measured against, which `waits` in the CPU's memory or not; the start of a
    policy with adapters is on its base."""
    if folder == "start" and own.adapter_parameters:
        return Role("reference", own.shape, owns_base=False)
    name, shape = ("reference", own.shape) if folder == "start" else (f"reference {folder}", shape_of(size or folder))
    return Role(name, shape, matrices=MATRICES[recipe.model.quantise], offloaded=waits)


def moving_reference(own: Role, recipe: Any) -> Role:
    """A copy of the policy that follows it, with the averages that it keeps. It is on the policy's base where only
    adapters learn and the base does not lie in pieces."""
    if recipe.moving_reference.kind == "bema":
        kept = 2 * own.trained
    else:
        kept = own.trained_whole if weight_bytes(recipe.model.dtype) < 4 else 0
    if own.adapter_parameters:
        kept += own.trained_whole  # modules that are trained whole beside adapters are copied too
    shares = own.adapter_parameters and not recipe.parallel.in_pieces
    return replace(own, name="reference", trained=0, owns_base=not shares, averages=kept)


def weight_bytes(dtype: str) -> int:
    """Bytes of a weight of `model.dtype` on an accelerator."""
    return 2 if dtype in ("bfloat16", "float16", "auto") else 4


def judge(name: str, path: str, recipe: OnPolicyRecipe[Any], size: str) -> Role:
    """A reward model; saved adapters stand on the shared base where there is one."""
    shape, added = shape_of(size or path).scalar(), adapters(path, None, size, scalar=True)
    if added is None:
        return Role(name, shape, offloaded=recipe.offload)
    return Role(name, shape, 0, recipe.share != "base", added.adapters, offloaded=recipe.offload)


def critic_source(recipe: OnPolicyRecipe[Any]) -> str:
    """The folder that a critic with a trunk of its own begins from, as a run chooses it."""
    init = (recipe.critic or CriticConfig()).init
    if init == "auto":
        models = (part.model for part in recipe.reward.parts.values() if part.model is not None)
        init = next((path for path in models if can_be_critic(path, recipe)), "policy")
    return recipe.model.path if init == "policy" else init


def can_be_critic(path: str, recipe: OnPolicyRecipe[Any]) -> bool:
    """`serves_as_critic`, by the reward model's folder."""
    own, theirs = (load_tokenizer(one).get_vocab() for one in (recipe.model.path, path))
    placed = recipe.share != "base" or saved_lora(path) is not None
    return serves_as_critic(len(attributes_of(path)), same_tokens=own == theirs, on_the_base=placed)


def work_of(recipe: Any, prompt_tokens: int) -> Work:
    """What an iteration (offline: an update) goes through."""
    weight = weight_bytes(recipe.model.dtype)
    common = {
        "micro": recipe.run.micro_tokens if "micro_tokens" in recipe.run.model_fields_set else ON_ACCELERATOR,
        "weight": weight,
        "optimizer_bytes": optimizer_bytes(recipe.optimizer, weight, adapters=False),
        "adapter_optimizer_bytes": optimizer_bytes(recipe.optimizer, weight, adapters=True),
        "scores": prompt_tokens if recipe.model.attention == "eager" else 0,
        "compute": {"same": weight, "float32": 4, "bfloat16": 2}[recipe.parallel.compute_dtype],
        "checkpointing": recipe.model.gradient_checkpointing,
        "offload_activations": recipe.model.offload_activations,
    }
    if isinstance(recipe, OnPolicyRecipe):
        rollout = recipe.rollout
        return Work(
            rollout.prompts * rollout.samples,
            prompt_tokens,
            rollout.max_new_tokens,
            recipe.algorithm.epochs,
            minibatches=recipe.algorithm.minibatches,
            ahead=rollout.ahead,
            max_batch=None if rollout.engine == "vllm" else rollout.max_batch or ROWS["accelerator"],
            per_prompt=rollout.samples,
            **common,
        )
    pairs = 2 if isinstance(recipe, PreferenceRecipe | RewardModelRecipe) else 1
    return Work(recipe.train.batch_size * pairs, prompt_tokens, 0, 1, sampled=False, **common)


def optimizer_bytes(optimizer: OptimizerConfig, weight: int, *, adapters: bool) -> float:
    """Bytes that the optimizer keeps of each parameter, as for a matrix of 4,096 x 4,096; adapters are in float32,
    and Muon leaves them to AdamW."""
    dtype = torch.bfloat16 if weight == 2 and not adapters else torch.float32
    like = torch.empty(4096, 4096, dtype=dtype, device="meta")
    return state_bytes([like], optimizer, [like] if adapters else []) / like.numel()


def growth(there: Cluster, roles: list[Role], work: Work, lengths: Lengths) -> list[list[SimulatedIteration]]:
    """For 1, 2, 4, ... devices: together, and the best split for sampling 0, 1 and 2 updates ahead."""
    counts = [2**i for i in range(there.count.bit_length()) if 2**i <= there.count]
    found = []
    for n in counts:
        some = Cluster(there.device, min(n, there.per_node), max(1, n // there.per_node))
        apart = [best_apart(some, roles, work, lengths, ahead) for ahead in (0, 1, 2)]
        found.append([simulate(some, roles, work, lengths), *(one for one in apart if one is not None)])
    return found


def show_growth(found: list[list[SimulatedIteration]], work: Work) -> None:
    """Seconds of an iteration and answers a second and device, by devices and layout; who waits how long."""
    table = Table("devices", "layout", "iteration s", "answers/s a device", "samplers wait", "trainers wait")
    for rows in found:
        for one in rows:
            name = "together" if not one.apart else f"{one.apart} apart, {one.ahead} ahead"
            table.add_row(
                str(one.devices), name, f"{one.seconds:.1f}", f"{work.samples / one.seconds / one.devices:.3g}",
                f"{one.samplers_wait:.0%}", f"{one.trainers_wait:.0%}",
            )  # fmt: skip
    new_console().print(table)


def show(found: list[Verdict], roles: list[Role], work: Work, there: Cluster) -> None:
    """The table of layouts, and how the first one's numbers come about."""
    console, device = new_console(), there.device
    console.print(
        f"{there.nodes} x {there.per_node} {device.name}; "
        f"{work.samples:,} sequences of {work.prompt} + {work.new} tokens"
        + (f", at most {work.max_batch} decoded side by side (rollout.max_batch)" if work.max_batch else ""),
        highlight=False,
    )
    phases = list(dict.fromkeys(name for verdict in found for name in verdict.seconds))
    table = Table("layout", "fits", "peak, a device", *(f"{name} s" for name in phases), "iteration s", "settings")
    for v in found:
        cells = (f"{v.seconds[name]:.1f}" if name in v.seconds else "-" for name in phases)
        table.add_row(
            v.layout.name, "yes" if v.fits else "no", f"{v.peak / 1e9:.1f} GB", *cells, f"{v.iteration:.1f}",
            "planned only" if v.layout.planned else v.layout.keys,
        )  # fmt: skip
    console.print(table)
    best = found[0]
    console.print(f'\nmemory of "{best.layout.name}", a device', highlight=False)
    for role in roles:
        kept = f"{work.optimizer_bytes:.3g} bytes that the optimizer keeps + {work.weight} of gradient"
        learned = f"{role.trained_whole / 1e9:.3f} G trained x ({kept})"
        if role.trained_adapters:
            kept = f"{work.adapter_optimizer_bytes:.3g} bytes that the optimizer keeps + 4 of gradient"
            adapters = f"{role.trained_adapters / 1e9:.3f} G of adapters x ({kept})"
            learned = f"{adapters} + {learned}" if role.trained_whole else adapters
        console.print(
            f"  {role.name}: {role.weights(work.weight) / 1e9:.3f} GB of weights + {learned}; on "
            f"{best.layout.shards}, {best.layout.moments} and {best.layout.gradients} devices",
            highlight=False, markup=False,
        )  # fmt: skip
    for name, size in best.memory.items():
        console.print(f"  {name:<58}{size / 1e9:8.2f} GB", highlight=False, markup=False)
    for name, size in best.others.items():
        console.print(f"  {name:<58}{size / 1e9:8.2f} GB (not in the sum)", highlight=False, markup=False)
    console.print(
        f"  {'in all, of ' + format(device.memory / 1e9, '.0f'):<58}{best.peak / 1e9:8.2f} GB\n"
        f"seconds: 2 P a token forward, {8 if work.checkpointing else 6} P trained, at {MFU:.0%} of "
        f"{device.flops / 1e12:.0f} TFLOP/s; decoding at {MBU:.0%} of {device.bandwidth / 1e12:.2f} TB/s",
        *(f"\n{line}" for line in routes(best, roles, work, there)), sep="", highlight=False, markup=False,
    )  # fmt: skip
