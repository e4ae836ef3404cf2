"""Another toolkit's settings out of a file, and what they say of the verb.

Read are YAML and JSON files, and command lines in shell scripts (`--key value`) with the variables and arrays that
the script sets. Nothing in the file is run.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from steersman.config.recipe_text import load_yaml
from steersman.config.sections import Section
from steersman.types import SteersmanError
from steersman.verbs.feedback import RECIPES as FEEDBACK
from steersman.verbs.on_policy_recipes import RECIPES as ON_POLICY
from steersman.verbs.peers.shell import Word, read_commands
from steersman.verbs.preference import PreferenceRecipe
from steersman.verbs.reward_model import RewardModelRecipe
from steersman.verbs.sft import SFTRecipe

VERBS: dict[str, type[Section]] = {
    "sft": SFTRecipe, "reward": RewardModelRecipe, "dpo": PreferenceRecipe, **FEEDBACK, **ON_POLICY,
}  # fmt: skip
ABOVE = {"distill": "steersman.distill.recipe:DistillRecipe"}
"""Verbs of rooms above this one, and their recipes, which are imported when a file is theirs."""
STAGES = {"sft": "sft", "pt": "sft", "rm": "reward", "ppo": "ppo", "dpo": "dpo", "kto": "kto"}
SCRIPTS = {
    "rm": "reward",
    "reward": "reward",
    "orpo": "dpo",
    "cpo": "dpo",
    "tpo": "dpo",
    "sdft": "distill",
    "sdpo": "distill",
    **{name: name for name in VERBS},
}
"""Words in the name of a program, and the verb for each."""
OTHER_SCRIPTS = {"online", "xpo", "nash", "gkd", "kd", "opd", "prm", "minillm"}
"""Words in the names of programs that train what no verb here reads from these files."""
ESTIMATORS = {
    "gae": "ppo", "reinforce": "reinforce++", "reinforce_baseline": "reinforce++-baseline", "rloo": "rloo",
    "group_norm": "grpo", "dr_grpo": "dr-grpo",
}  # fmt: skip
"""OpenRLHF's `advantage_estimator`, which says the method."""
OWN_LOSSES = ("cispo", "sapo", "vespo")
"""Of TRL's GRPO, the `loss_type`s that are verbs here; the others say how steps are averaged."""
TELLING = {
    "teacher_prompt_template": "distill", "reprompt_template": "distill", "success_reward_threshold": "distill",
    "distillation_weight": "distill", "teacher_update_rate": "distill",
    "num_value_samples": "a2po", "filter_all_incorrect": "a2po",
    "rloo_k": "rloo", "num_generations": "grpo", "num_ppo_epochs": "ppo", "cliprange": "ppo",
    "rollout_batch_size": "ppo", "desirable_weight": "kto", "pref_loss": "dpo", "rpo_alpha": "dpo",
    "simpo_gamma": "dpo", "ld_alpha": "dpo", "loss_weights": "dpo", "tpo_alpha": "dpo",
    "tpo_l_gamma": "dpo", "use_dft_loss": "sft",
    "center_rewards_coefficient": "reward", "packing": "sft",
}  # fmt: skip
"""Keys that tell the verb where nothing else does: those that one trainer alone has. `beta` is not among them."""
OF_TOOLKIT = {
    "openrlhf": {
        "pretrain", "prompt_data", "rollout_batch_size", "micro_train_batch_size", "actor_learning_rate",
        "n_samples_per_prompt", "generate_max_len", "prompt_max_len", "init_kl_coef", "zero_stage", "max_epochs",
        "save_path", "advantage_estimator", "aux_loss_coef",
    },
    "llamafactory": {
        "stage", "finetuning_type", "cutoff_len", "pref_beta", "pref_loss", "template", "lora_target", "dataset_dir",
        "val_size", "quantization_bit", "use_dft_loss", "pref_bco_weight", "mask_history", "train_on_prompt",
        "ppo_buffer_size", "neat_packing", "moe_aux_loss_coef",
    },
}  # fmt: skip
"""Names that one toolkit alone has; a file with none of them is TRL's."""
PROCESSES = ("num_processes", "nproc_per_node", "num_gpus", "nnodes", "num_machines")
ONE_WORD = {*PROCESSES, "config_file", "include", "hostfile", "master_port", "main_process_port", "address"}
"""Options of launchers, after which one word is the value and the next may be the program."""
LARGEST = 1 << 20


def recipe_of(verb: str) -> type[Section]:
    """The recipe of a verb of VERBS or ABOVE."""
    if verb in VERBS:
        return VERBS[verb]
    module, _, name = ABOVE[verb].partition(":")
    return getattr(importlib.import_module(module), name)


def read_settings(path: Path) -> dict[str, Any]:
    """Every setting of the file by its name without dashes; of a command line also `command`, the program's name.

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
        lines = read_commands(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise SteersmanError(f"{path}: can not be read as settings: {error}") from error
    counted = [(sum(word.text.startswith("--") for word in words), words) for words in lines]
    most, words = max(counted, key=lambda each: each[0], default=(0, []))
    if not most:
        raise SteersmanError(f"{path}: holds no command line with settings (--key value); name a YAML file as .yaml")
    if sum(count == most for count, _ in counted) > 1:
        raise SteersmanError(f"{path}: holds several command lines; leave the one that is to be imported")
    return _command(words)


def guess_verb(settings: dict[str, Any]) -> str:
    """The verb that the settings are of: LLaMA-Factory's stage, the program's name, or keys that only one has.

    Raises SteersmanError where none of them tells, or no verb here trains what the program does.
    """
    if str(settings.get("stage")) in STAGES:
        return STAGES[str(settings["stage"])]
    words = script_words(settings)
    if OTHER_SCRIPTS.isdisjoint(words):
        verb = next((SCRIPTS[word] for word in words if word in SCRIPTS), None)
        verb = verb or next((verb for key, verb in TELLING.items() if key in settings), None)
        if verb == "ppo":
            verb = ESTIMATORS.get(str(settings.get("advantage_estimator")), verb)
            return "gspo" if settings.get("policy_loss_type") == "gspo" else verb
        if verb == "grpo" and (settings.get("loss_type") in OWN_LOSSES or is_luspo(settings)):
            return settings["loss_type"]
        if verb is not None:
            return verb
    raise SteersmanError("verb: nothing in the file tells what it trains; say it with --verb sft, dpo, grpo, ...")


def is_luspo(settings: dict[str, Any]) -> bool:
    """Whether TRL's `loss_type` luspo is LUSPO: unless the file says so, a response has no ratio of its own there."""
    return settings.get("loss_type") == "luspo" and settings.get("importance_sampling_level") == "sequence"


def toolkit_of(settings: dict[str, Any]) -> Literal["openrlhf", "llamafactory", "trl"]:
    """Whose settings these are: by the program, and by names that one toolkit alone has."""
    command = str(settings.get("command", "")).lower()
    for name in ("openrlhf", "llamafactory"):
        if name in command or not OF_TOOLKIT[name].isdisjoint(settings):
            return name
    return "trl"


def script_words(settings: dict[str, Any]) -> list[str]:
    """The words in the name of the program: of `openrlhf.cli.train_kto`, train and kto."""
    name = PurePosixPath(str(settings.get("command", "")).lower().removesuffix(".py")).name
    return re.split(r"[^a-z0-9+]+", name.rsplit(".", 1)[-1])


def _command(told: list[Word]) -> dict[str, Any]:
    """`--key value` pairs of a command line, several values as a list; a key without a value is true. `command` is
    the program: what launchers are told stands in front of it. A word that the shell would put something else for and
    that is not a key's only value is a name of its own, with itself as its value; so is a word behind the program
    that is no key's value."""
    words = [word.text for word in told]
    start = _program(words)
    found: dict[str, Any] = {} if start is None else {"command": words[start]}
    whole: dict[str, str] = {}
    i = 0
    while i < len(words):
        name, equals, value = words[i].removeprefix("--").partition("=")
        is_key, i = words[i].startswith("--") and name != "", i + 1
        if not is_key:
            if i - 1 != start and (told[i - 1].unread or (start is not None and i > start and words[i - 1] != "--")):
                found[words[i - 1]] = words[i - 1]
            continue
        in_front = start is not None and i <= start
        key = name.replace("-", "_")
        key = key.rsplit(".", 1)[-1] if whole.setdefault(key.rsplit(".", 1)[-1], key) == key else key
        values = [value] if equals else []
        while not equals and i < len(words) and not words[i].startswith("--") and i != start:
            if (in_front or key in ONE_WORD) and values:
                break
            if told[i].several or (told[i].unread and values):
                break
            values.append(words[i])
            i += 1
        if key != "module" or not in_front:
            found[key] = True if not values else _word(values[0]) if len(values) == 1 else [_word(v) for v in values]
    return found


def _program(words: list[str]) -> int | None:
    """Where the program is among the words: a Python file, a module, a command of `trl` or `llamafactory-cli`; else
    the last word in front of the settings."""
    launchers = ("torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch", "deepspeed")
    for i, word in enumerate(words[:-1]):
        following = words[i + 1]
        if word in ("-m", "--module") and following not in launchers and not following.startswith("-"):
            return i + 1
        if PurePosixPath(word).name in ("trl", "llamafactory-cli") and not following.startswith("-"):
            return i + 1
        if word.endswith(".py"):
            return i
    first = next((i for i, word in enumerate(words) if word.startswith("--")), 0)
    return first - 1 if first else None


def _word(text: str) -> Any:
    """A value of a command line as YAML reads it; what YAML can not read is text."""
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text
