"""`steersman import-recipe FILE`: another toolkit's settings as a recipe, each key mapped or named as left out.

Read are YAML and JSON files of TRL and LLaMA-Factory, and command lines of TRL and OpenRLHF (`--key value`). Nothing
in the file is run.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from steersman.atomic import write_atomic
from steersman.config.peer_names import FREE, PEERS
from steersman.config.recipe_text import load_yaml
from steersman.config.sections import Section, walk_keys
from steersman.loss.offline import LOSSES
from steersman.types import SteersmanError
from steersman.verbs.feedback import RECIPES as FEEDBACK
from steersman.verbs.on_policy_recipes import RECIPES as ON_POLICY
from steersman.verbs.preference import PreferenceRecipe
from steersman.verbs.reward_model import RewardModelRecipe
from steersman.verbs.sft import SFTRecipe

VERBS: dict[str, type[Section]] = {
    "sft": SFTRecipe, "reward": RewardModelRecipe, "dpo": PreferenceRecipe, **FEEDBACK, **ON_POLICY,
}  # fmt: skip
STAGES = {"sft": "sft", "pt": "sft", "rm": "reward", "ppo": "ppo", "dpo": "dpo", "kto": "kto"}
OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw_8bit": "adamw-8bit",
    "adamw_bnb_8bit": "adamw-8bit", "paged_adamw_8bit": "adamw-8bit-paged", "adafactor": "adafactor",
    "lion_32bit": "lion", "lion_8bit": "lion-8bit", "muon": "muon",
}  # fmt: skip
SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine",
             "cosine_with_min_lr": "cosine"}  # fmt: skip
BATCH = ("per_device_train_batch_size", "train_batch_size", "gradient_accumulation_steps")
SWITCHES = {"bf16": ("model.dtype", "bfloat16"), "fp16": ("model.dtype", "float16"), "use_peft": ("model.lora", {}),
            "load_in_4bit": ("model.quantise", "nf4"), "load_in_8bit": ("model.quantise", "int8"),
            "use_dora": ("model.lora.dora", True), "use_rslora": ("model.lora.rslora", True)}  # fmt: skip
SILENT = ("stage", "do_train", "finetuning_type")
"""Keys that only choose the verb, or are said by another one."""
TELLING = {
    "num_generations": "grpo", "num_ppo_epochs": "ppo", "cliprange": "ppo", "desirable_weight": "kto", "beta": "dpo",
    "pref_beta": "dpo", "packing": "sft",
}  # fmt: skip
"""Keys that tell the verb where nothing else does."""
LARGEST = 1 << 20


class ImportRecipe(Section):
    """Another toolkit's settings, to be written as a recipe of this one."""

    file: str = Field(description="a YAML or JSON file, or a shell script with one command line")
    verb: str = Field(default="auto", description="the verb that the recipe is for; auto goes by the settings")
    out: str | None = Field(default=None, description="file to write; not given: the recipe is printed")


def run(recipe: ImportRecipe) -> dict[str, Any]:
    """Prints or writes the recipe, with a comment for each setting without a counterpart; returns what became of all.

    Raises SteersmanError where the file can not be read as settings, the verb is unknown, or `out` is there already.
    """
    if recipe.out is not None and Path(recipe.out).exists():
        raise SteersmanError(f"out: {recipe.out} is there already; name a file that is not")
    settings = read_settings(Path(recipe.file))
    verb = guess_verb(settings) if recipe.verb == "auto" else recipe.verb
    if verb not in VERBS:
        raise SteersmanError(f"verb: {verb!r} is not one of {', '.join(VERBS)}")
    keys, left = translate_settings(settings, verb)
    lines = [f"# steersman {verb}, from {Path(recipe.file).name}"]
    lines += [f"# {name if name.isidentifier() else repr(name)}: {reason}" for name, reason in left.items()]
    text = "\n".join(lines) + "\n" + yaml.safe_dump(_nested(keys), sort_keys=False, allow_unicode=True)
    if recipe.out is None:
        print(text, end="")
    else:
        write_atomic(Path(recipe.out), text)
        print(f"{len(keys)} settings written to {recipe.out}, {len(left)} left out; run it with: "
              f"steersman {verb} {recipe.out}")  # fmt: skip
    return {"verb": verb, "settings": keys, "left_out": left}


def read_settings(path: Path) -> dict[str, Any]:
    """Every setting of the file by its name without dashes.

    Raises SteersmanError where the file is missing, larger than a megabyte, or holds no settings.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise SteersmanError(f"{path}: larger than a megabyte, so it is no file of settings")
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml", ".json"):
            found = load_yaml(text)
            if not isinstance(found, dict):
                raise SteersmanError(f"{path}: holds no settings (name: value)")
            return {str(key).replace("-", "_"): value for key, value in found.items()}
        return _command(shlex.split(text.replace("\\\n", " "), comments=True))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise SteersmanError(f"{path}: can not be read as settings: {error}") from error


def guess_verb(settings: dict[str, Any]) -> str:
    """The verb that the settings are of: LLaMA-Factory's stage, the command's name, or keys that only one has."""
    if settings.get("stage") in STAGES:
        return STAGES[str(settings["stage"])]
    command = str(settings.get("command", ""))
    for word, verb in (("rm", "reward"), ("reward", "reward"), *((name, name) for name in VERBS)):
        if word in command.replace(".", " ").replace("_", " ").split():
            return verb
    for key, verb in TELLING.items():
        if key in settings:
            return verb
    raise SteersmanError("verb: nothing in the file tells what it trains; say it with --verb sft, dpo, grpo, ...")


def translate_settings(settings: dict[str, Any], verb: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Our keys with their values; and the names that were left out, each with the reason."""
    known = {key for key, _ in walk_keys(VERBS[verb])} - VERBS[verb].unread_keys()
    sections = {key.rsplit(".", 1)[0] for key in known if "." in key}
    keys: dict[str, Any] = {}
    left: dict[str, str] = {}
    batch = [settings[name] for name in BATCH if isinstance(settings.get(name), int)]
    for name, value in settings.items():
        if name in SILENT or name == "command" or value is None:
            continue
        if name in SWITCHES:
            ours, meant = SWITCHES[name]
            if str(value).lower() in ("true", "yes", "on"):
                keys.setdefault(ours, meant)
            continue
        candidates, note = PEERS.get(name, ((), ""))
        ours = next((k for k in candidates if FREE.get(k, k) in known | sections), None)
        if ours is None:
            left[name] = "no counterpart" if name not in PEERS else f"{verb} has no counterpart"
            continue
        try:
            keys[ours] = _value(name, value, batch)
            if ours == "iterations":
                raise ValueError  # passes over the data there, passes through the loop here
            if ours == "rollout.prompts" and name in BATCH:  # responses there, prompts here
                keys[ours] = _whole(keys[ours], int(settings.get("num_generations") or 1))
        except (KeyError, ValueError, TypeError):
            keys.pop(ours, None)
            left[name] = f"{value!r} has no counterpart for {ours}{f' ({note})' if note else ''}"
    if "algorithm.clip_low" in keys and "algorithm.clip_high" in known:
        keys.setdefault("algorithm.clip_high", keys["algorithm.clip_low"])
    if settings.get("finetuning_type") in ("lora", "qlora"):
        keys.setdefault("model.lora", {})
    return keys, left


def _value(name: str, value: Any, batch: list[int]) -> Any:
    """What the value is here. Raises KeyError, ValueError or TypeError for one that has no counterpart."""
    if name in BATCH:
        product = 1
        for size in batch:
            product *= size
        return product
    if name == "optim":
        return OPTIMIZERS[str(value)]
    if name == "lr_scheduler_type":
        return SCHEDULES[str(value)]
    if name == "quantization_bit":
        return {4: "nf4", 8: "int8"}[int(value)]
    if name in ("lora_target", "lora_target_modules"):
        names = value.split(",") if isinstance(value, str) else list(value)
        return "all-linear" if names in (["all"], ["all-linear"]) else [n.strip() for n in names]
    if name == "report_to":
        sinks = [value] if isinstance(value, str) else list(value)
        if "all" in sinks:
            raise ValueError
        return [s for s in sinks if s != "none"]
    if name in ("loss_type", "pref_loss"):
        loss = {"sigmoid": "dpo"}.get(str(value), str(value))
        return LOSSES[loss] and loss
    if name in ("reward_model_path", "reward_pretrain"):
        return {"score": {"model": str(value)}}
    if name == "reward_funcs":
        functions = [value] if isinstance(value, str) else list(value)
        return {f"score{i}": {"function": str(f)} for i, f in enumerate(functions)}
    return value


def _whole(number: int, divisor: int) -> int:
    if number % divisor:
        raise ValueError
    return number // divisor


def _command(words: list[str]) -> dict[str, Any]:
    """`--key value` pairs of a command line; a key without a value is true. What stands before them is `command`."""
    found: dict[str, Any] = {"command": " ".join(w for w in words[: next(
        (i for i, w in enumerate(words) if w.startswith("--")), len(words))])}  # fmt: skip
    for i, word in enumerate(words):
        if not word.startswith("--"):
            continue
        name, equals, value = word[2:].partition("=")
        after = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else None
        raw = value if equals else after
        found[name.rsplit(".", 1)[-1].replace("-", "_")] = True if raw is None else load_yaml(raw)
    return found


def _nested(keys: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in sorted(keys.items(), key=lambda item: item[0].count(".")):
        *path, last = key.split(".")
        spot = out
        for part in path:
            spot = spot.setdefault(part, {})
        spot[last] = value
    return json.loads(json.dumps(out, default=str))
