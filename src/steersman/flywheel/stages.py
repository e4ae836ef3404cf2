"""What the loops hand to the verbs that are their stages, and whether those take it: asked before a loop starts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from steersman.config.sections import Section
from steersman.model.adapter_files import saved_lora
from steersman.run.files.ledger import refusal
from steersman.run.run_config import RunConfig

if TYPE_CHECKING:
    from steersman.flywheel.sections import LoopRecipe

PLACE = "made in the run"
"""Stands for a table or a model that is not there yet."""


def below(section: str, *keys: str) -> dict[str, str]:
    """`words` of a stage whose sections lie below one of the loop: {"train.": "sft.train."}."""
    return {f"{key}.": f"{section}.{key}." for key in keys}


WORDS = {
    "sft": below("sft", "train", "optimizer"),
    "kto": below("kto", "train", "optimizer", "loss"),
    "dpo": below("dpo", "train", "optimizer", "loss"),
    "reward": {"train.": "ppo.reward_train.", "optimizer.": "ppo.reward_optimizer."},
    "ppo": below("ppo", "algorithm", "optimizer", "critic")
    | {"rollout.prompts": "ppo.prompts", "rollout.samples": "ppo.samples"},
}
"""What a verb's keys are called in a loop with a section for each stage; `reward` trains PPO's reward model."""


NOT_IN_PAIRS = ("margin_weight", "explore", "gold_nll")
"""Keys of a pair loss that read columns (`margin`, `chosen_from_reference`, `gold`) which the pairs of a loop do not
have."""


OPTIMIZERS = {
    "sft": ["sft.optimizer"], "kto": ["kto.optimizer"], "dpo": ["dpo.optimizer"],
    "ppo": ["ppo.reward_optimizer", "ppo.optimizer"],
}  # fmt: skip
"""Dotted keys of the optimizers that a stage trains by, in such a loop."""


def trained_by(known: Iterable[str], asked: Any) -> list[str]:
    """Dotted keys of the optimizers by which those of a loop's known stages train that a recipe asks for. What it
    asks for is not validated yet: of what is no list there are none."""
    names = asked if isinstance(asked, list) else []
    return [key for name in known if name in names for key in OPTIMIZERS[name]]


def require_stage(
    name: str, kind: type[Section], values: Mapping[str, Any], run: RunConfig, words: Mapping[str, str]
) -> None:
    """Raises ValueError where a verb's recipe, of class `kind`, refuses what the loop's stage `name` will hand to it.

    `words` say what the verb's keys are called in the loop, such as {"train.": "sft.train."}.
    """
    try:
        kind.model_validate({**values, "run": run.model_dump()})
    except ValidationError as error:
        told = refusal(error)
        if words:
            known = "|".join(map(re.escape, words))
            told = re.sub(rf"(?<![\w.])(?:{known})", lambda found: words[found[0]], told)
        raise ValueError(f"stage {name}: {told}") from None


def stage_data(recipe: LoopRecipe, path: str | list[str]) -> dict[str, Any]:
    """A verb's data section for a table of the loop, with the recipe's limits of length. A row that the verb can not
    learn from is left out and counted: nobody could mend it but the loop."""
    kept = {"max_prompt_tokens", "max_length", "append_eos", "allow_special_tokens", "shuffle"}
    limits = {k: v for k, v in recipe.data.model_dump().items() if k in kept}
    too_long = recipe.data.on_too_long
    return {
        "path": path,
        "wrap_in_chat": False,
        "assistant_turns": "last",
        "on_bad_row": "skip",
        "on_too_long": "drop" if too_long == "error" else too_long,
    } | limits


def stage_model(recipe: LoopRecipe, path: str) -> dict[str, Any]:
    """A verb's model section: the recipe's, at another path, saved whole."""
    return recipe.model.model_dump() | {"path": path, "merge": True}


def refresh_values(recipe: LoopRecipe, model: str, files: list[str]) -> dict[str, Any]:
    """What trains the judge's reward model, which is at `model`, again on files of pairs: by adapters where the
    recipe has them, or the reward model was adapters at first."""
    refresh = recipe.refresh
    assert refresh is not None
    section = stage_model(recipe, model)
    if section["lora"] is None:
        section["lora"] = saved_lora(recipe.judge.reward_model()[1])
    return {
        "model": section,
        "data": {
            "path": files, "append_eos": recipe.data.append_eos, "on_too_long": "drop",
            "on_bad_row": recipe.data.on_bad_row,
        },
        "train": refresh.train, "optimizer": refresh.optimizer,
    }  # fmt: skip
