"""`steersman plan`: what a recipe takes of which devices, laid out in every way that they allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console
from rich.table import Table

from steersman.model import Shape, shape_of
from steersman.plan.devices import Cluster, cluster
from steersman.plan.layouts import COMPUTE, MEMORY, Role, Verdict, Work, layouts, weigh
from steersman.recipe.on_policy import OnPolicyRecipe
from steersman.recipe.sections import ON_ACCELERATOR
from steersman.run.config import Section, load_recipe
from steersman.types import SteersmanError
from steersman.verbs.feedback import RECIPES as FEEDBACK
from steersman.verbs.on_policy_recipes import RECIPES as ON_POLICY
from steersman.verbs.preference import PreferenceRecipe
from steersman.verbs.reward_model import RewardModelRecipe
from steersman.verbs.sft import SFTRecipe

KINDS: dict[str, type[Section]] = {
    "sft": SFTRecipe, "reward": RewardModelRecipe, "dpo": PreferenceRecipe, **FEEDBACK, **ON_POLICY,
}  # fmt: skip


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


def run(recipe: PlanRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Prints the layouts, the fastest that fits first, and the arithmetic of the best; returns them as numbers."""
    if recipe.verb not in KINDS:
        raise SteersmanError(f"verb: {recipe.verb} has no plan; there are {', '.join(KINDS)}")
    asked: Any = load_recipe(KINDS[recipe.verb], Path(recipe.recipe))
    there = cluster(recipe.devices, recipe.nodes)
    roles, work = roles_of(asked, recipe.size), work_of(asked, recipe.prompt_tokens)
    found = [weigh(one, roles, work, there) for one in layouts(there, work)]
    found.sort(key=lambda verdict: (not verdict.fits, verdict.iteration if verdict.fits else verdict.peak))
    show(found, roles, work, there)
    return {
        "layouts": [
            {
                "name": v.layout.name,
                "fits": v.fits,
                "peak_bytes": v.peak,
                "iteration": v.iteration,
                "memory": v.memory,
                "seconds": v.seconds,
            }
            for v in found
        ]
    }


def roles_of(recipe: Any, size: str) -> list[Role]:
    """The models of the recipe, the actor (or the model that is trained) first."""
    shape = shape_of(size or recipe.model.path)
    lora = recipe.model.lora
    trained = shape.parameters if lora is None else adapters(shape, lora.r)
    if not isinstance(recipe, OnPolicyRecipe):
        own = [Role("model", shape, trained)]
        frozen = getattr(recipe, "reference", None) is not None and lora is None
        return [*own, Role("reference", shape)] if frozen else own
    found = [Role("actor", shape, trained)]
    if recipe.algorithm.critic:
        found.append(Role("critic", shape, trained))
    if recipe.reference != "none":
        found.append(Role("reference", shape, own=lora is None))
    found += [
        Role(f"reward {name}", shape_of(size or part.model))
        for name, part in recipe.reward.parts.items()
        if part.model is not None
    ]
    return found


def adapters(shape: Shape, r: int) -> int:
    """Parameters of rank-r adapters on all linear layers, each of which is about hidden x (a few) hidden wide: r of
    every 2 hidden x hidden of a layer, in and out."""
    return round(shape.layers * shape.largest_layer * 2 * r / shape.hidden)


def work_of(recipe: Any, prompt_tokens: int) -> Work:
    """What an iteration (offline: an update) goes through."""
    weight = 2 if recipe.model.dtype in ("bfloat16", "float16", "auto") else 4
    common = {
        "micro": recipe.run.micro_tokens if "micro_tokens" in recipe.run.model_fields_set else ON_ACCELERATOR,
        "weight": weight,
        "compute": {"same": weight, "float32": 4, "bfloat16": 2}[recipe.parallel.compute_dtype],
        "checkpointing": recipe.model.gradient_checkpointing,
    }
    if isinstance(recipe, OnPolicyRecipe):
        rollout = recipe.rollout
        return Work(
            rollout.prompts * rollout.samples,
            prompt_tokens,
            rollout.max_new_tokens,
            recipe.algorithm.epochs,
            **common,
        )
    pairs = 2 if isinstance(recipe, PreferenceRecipe | RewardModelRecipe) else 1
    return Work(recipe.train.batch_size * pairs, prompt_tokens, 0, 1, sampled=False, **common)


def show(found: list[Verdict], roles: list[Role], work: Work, there: Cluster) -> None:
    """The table of layouts, and how the first one's numbers come about."""
    console, device = Console(), there.device
    console.print(
        f"{there.nodes} x {there.per_node} {device.name}; "
        f"{work.samples:,} sequences of {work.prompt} + {work.new} tokens",
        highlight=False,
    )
    phases = list(dict.fromkeys(name for verdict in found for name in verdict.seconds))
    table = Table("layout", "fits", "peak, a device", *(f"{name} s" for name in phases), "iteration s", "settings")
    for v in found:
        cells = (f"{v.seconds[name]:.1f}" if name in v.seconds else "-" for name in phases)
        table.add_row(
            v.layout.name, "yes" if v.fits else "no", f"{v.peak / 1e9:.1f} GB", *cells, f"{v.iteration:.1f}",
            v.layout.keys,
        )  # fmt: skip
    console.print(table)
    best = found[0]
    console.print(f'\nmemory of "{best.layout.name}", a device', highlight=False)
    for role in roles:
        console.print(
            f"  {role.name}: ({role.weights / 1e9:.3f} G weights + {role.trained / 1e9:.3f} G trained x (gradient + "
            f"2 moments)) x {work.weight} bytes / {best.layout.shards} devices",
            highlight=False, markup=False,
        )  # fmt: skip
    for name, size in best.memory.items():
        console.print(f"  {name:<58}{size / 1e9:8.2f} GB", highlight=False, markup=False)
    console.print(
        f"  {'in all, of ' + format(device.memory / 1e9, '.0f'):<58}{best.peak / 1e9:8.2f} GB\n"
        f"seconds: 2 P a token forward, {8 if work.checkpointing else 6} P trained, at {COMPUTE:.0%} of "
        f"{device.flops / 1e12:.0f} TFLOP/s; decoding at {MEMORY:.0%} of {device.bandwidth / 1e12:.2f} TB/s",
        highlight=False, markup=False,
    )  # fmt: skip
