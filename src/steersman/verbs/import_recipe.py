"""`steersman import-recipe FILE`: another toolkit's settings as a recipe, each key mapped or named as left out.

Read are YAML and JSON files of TRL and LLaMA-Factory, and command lines of TRL and OpenRLHF (`--key value`). Nothing
in the file is run. A setting is written where the recipe's key means the same; the others stand as comments.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from steersman.atomic import write_atomic
from steersman.config.load import load_recipe
from steersman.config.peer_names import FREE, PEERS
from steersman.config.recipe_text import RecipeDumper
from steersman.config.sections import Section, walk_keys
from steersman.guards.terminal import encodes, printable
from steersman.types import SteersmanError
from steersman.verbs.peers import together
from steersman.verbs.peers.batch import batch
from steersman.verbs.peers.defaults import TOOLKITS, peer_defaults
from steersman.verbs.peers.pair_loss import pair_loss
from steersman.verbs.peers.rules import RULES, SAME, UNLIKE
from steersman.verbs.peers.self_distillation import self_distillation
from steersman.verbs.peers.settings import ABOVE, VERBS, guess_verb, read_settings, recipe_of, toolkit_of
from steersman.verbs.peers.translation import LeftOutError, Translation, short

PRIORITY = (
    "bf16", "pure_bf16", "fp16", "param_dtype", "dtype", "torch_dtype", "sft_model_path", "adapter_name_or_path",
    "pretrain", "model_name_or_path", "model_name", "model", "actor_learning_rate", "learning_rate", "lr",
    "eps_clip_low_high", "epsilon_high", "epsilon", "cliprange", "eps_clip", "num_ppo_epochs", "ppo_epochs",
    "num_iterations", "zero_stage", "fsdp", "deepspeed", "max_norm", "max_grad_norm", "gradient_clipping",
    "max_completion_length", "response_length", "generate_max_len", "max_new_tokens", "save_path", "output_dir",
    "prompt_data", "dataset_name", "dataset", "train_file", "quantization_bit", "load_in_4bit", "load_in_8bit",
    "use_muon", "optim",
)  # fmt: skip
"""Where two settings are for one key the one that stands earlier here decides; of others, the one that is read
earlier."""
LAST = ("max_steps", "max_epochs", "num_train_epochs", "num_epochs", "total_episodes", "save_steps", "eval_steps",
        "logging_steps")  # fmt: skip
"""Read when the updates of an iteration are known."""
SILENT = ("stage", "do_train", "command", "save_strategy", "eval_strategy", "evaluation_strategy",
          "lr_scheduler_kwargs", "loss_weights", "overlong_penalty_factor")  # fmt: skip
"""Names that only choose the verb, or that are read beside another one; `_together` names those that are not."""
HELD = ("iterations", "train.epochs", "train.batch_size", "rollout.prompts", "rollout.samples",
        "rollout.max_new_tokens", "rollout.temperature", "optimizer.lr", "optimizer.schedule", "critic.optimizer.lr",
        "algorithm.beta", "loss.beta")  # fmt: skip
"""Keys that change what is learned, and that are told where neither the file nor its toolkit's defaults give them."""
_VARIABLE = re.compile(r"\$[\w{('@*#]|^[<>]\(")


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
    if verb not in (*VERBS, *ABOVE):
        raise SteersmanError(f"verb: {verb!r} is not one of {', '.join((*VERBS, *ABOVE))}")
    keys, left = translate_settings(settings, verb)
    if left and not keys:
        raise SteersmanError(
            f"{recipe.file}: nothing in it has a counterpart in a recipe of steersman {verb}: "
            + "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:5])
        )
    theirs, said = add_defaults(settings, verb, keys, left)
    comments = [f"steersman {verb}, from {Path(recipe.file).name}"]
    comments += [f"{name if name.isidentifier() else repr(name)}: {reason}" for name, reason in left.items()]
    comments += said
    known = {key for key, _ in walk_keys(recipe_of(verb))}
    if verb == "distill" and not _shows_feedback(keys):
        known -= {"reward.parts"}
    needed = [
        key for key in ("model.path", "data.path", "teacher.path", "reward.parts") if key in known and key not in keys
    ]
    comments += [f"{key}: not in the file; give it here, or as --{key} VALUE" for key in needed]
    if recipe.out is None:
        text = recipe_text(comments, keys)
        as_it_is = encodes(text) and printable(text) == text
        print(text if as_it_is else recipe_text(comments, keys, plain=True), end="")
    else:
        write_atomic(Path(recipe.out), recipe_text(comments, keys))
        print(printable(f"{len(keys)} settings written to {recipe.out}, {len(left)} left out; run it with: "
                        f"steersman {verb} {recipe.out}"))  # fmt: skip
    return {"verb": verb, "settings": keys, "defaults": theirs, "left_out": left}


def recipe_text(comments: list[str], keys: dict[str, Any], *, plain: bool = False) -> str:
    """The recipe's file: a line for each comment, and the keys as YAML; with `plain` in ASCII, the rest escaped."""
    lines = [" ".join(printable(comment).split()) for comment in comments]
    if plain:
        lines = [line.encode("ascii", "backslashreplace").decode() for line in lines]
    body = yaml.dump(
        _nested(keys), Dumper=RecipeDumper, sort_keys=False, width=10**6, allow_unicode=not plain,
    )  # fmt: skip
    return "".join(f"# {line}\n" for line in lines) + body


def translate_settings(settings: dict[str, Any], verb: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Our keys with their values, which a recipe of the verb takes; and the names that were left out, each with the
    reason."""
    t = Translation(settings, verb)
    t.taken.update(SILENT)
    if "command" in t.settings:
        for name, value in t.settings.items():
            if name == value and _VARIABLE.search(name):
                t.leave(name, "stands for words that are not in the file; write settings that are among them out")
            elif _VARIABLE.search(str(value)):
                t.leave(name, f"is a variable of the shell, whose value is not in the file: {short(value)}")
            elif name == value:
                t.leave(name, "is no setting; where it names a file of settings, import that one")
    self_distillation(t)
    batch(t)
    together.adapters(t)
    together.rewards(t)
    together.sinks(t)
    together.correction(t)
    together.warmup(t)
    pair_loss(t)
    together.kl(t)
    together.optimal_values(t)
    together.moving_reference(t)
    together.strategies(t)
    together.columns(t)
    place = {name: i for i, name in enumerate(PRIORITY)}
    first = sorted((name for name in t.settings if name not in LAST), key=lambda n: place.get(n, len(place)))
    for name in [*first, *LAST]:
        if name in t.settings and name not in t.taken:
            _single(t, name)
    together.critic_too(t)
    _drop_refused(t)
    return t.keys, t.left


def add_defaults(
    settings: dict[str, Any], verb: str, keys: dict[str, Any], left: dict[str, str]
) -> tuple[list[str], list[str]]:
    """Adds to the file's `keys` what its toolkit takes where the file gives nothing and our value is another one, as
    far as the recipe takes it. Returns those keys, and comments on what was not in the file. What has to be known of
    a batch size so found goes to `left`."""
    missing = peer_defaults(settings, verb)
    theirs, reasons = translate_settings(settings | {n: v for n, v in missing.items() if "." not in n}, verb)
    theirs |= {name: value for name, value in missing.items() if "." in name}
    added: list[str] = []
    alike: list[str] = []
    ours = _our_values(verb, keys)
    for key, value in theirs.items():
        if key in keys:
            continue
        if key in ours and ours[key] == value:
            alike.append(key)
        elif _refusal(recipe_of(verb), {**keys, key: value}) is None:
            keys[key] = value
            added.append(key)
            ours = _our_values(verb, keys)
    if "world_size" in reasons and not {"train.batch_size", "rollout.prompts"}.isdisjoint(added):
        left.setdefault("world_size", reasons["world_size"])
    comments: list[str] = []
    if added:
        whose = TOOLKITS[toolkit_of(settings)]
        comments.append(f"not in the file, so the defaults of {whose} are written (releases differ; compare yours): "
                        + ", ".join(added))  # fmt: skip
    critic = Translation(settings, verb).has_critic()
    held = [f"{key} {short(value)}" for key, value in ours.items() if key in HELD and key not in alike
            and (critic or not key.startswith("critic."))]  # fmt: skip
    if held:
        comments.append(f"not in the file, so our values hold: {', '.join(held)}")
    return added, comments


def _our_values(verb: str, keys: dict[str, Any]) -> dict[str, Any]:
    """What holds here of every key that is not among `keys`: its value in the recipe that they make, and in a section
    that is null there the section's own."""
    recipe = recipe_of(verb)
    filled = load_recipe(recipe, None, _words(recipe, keys)).model_dump()
    found: dict[str, Any] = {}
    for key, info in walk_keys(recipe):
        *path, last = key.split(".")
        spot: Any = filled
        for part in path:
            spot = spot.get(part) if isinstance(spot, dict) else None
        if key not in keys:
            found[key] = spot[last] if isinstance(spot, dict) else info.default
    return found


def _single(t: Translation, name: str) -> None:
    """A setting that is read by itself."""
    value = t.settings[name]
    candidates = (SAME[name],) if name in SAME else PEERS.get(name, ((), ""))[0]
    ours = next((key for key in candidates if FREE.get(key, key) in t.known), None)
    try:
        if name in RULES:
            for key, meant in RULES[name](t, value).items():
                if FREE.get(key, key) not in t.known:
                    raise LeftOutError(f"{t.verb} has no counterpart")
                t.put(key, meant, name)
            t.taken.add(name)
        elif name in UNLIKE:
            raise LeftOutError(UNLIKE[name])
        elif ours is None:
            raise LeftOutError(_unknown(t, name, bool(candidates)))
        else:
            t.put(ours, value, name)
    except LeftOutError as reason:
        t.leave(name, str(reason))


def _unknown(t: Translation, name: str, of_others: bool) -> str:
    if of_others:
        return f"{t.verb} has no counterpart"
    like = [key for key in sorted(t.known) if key.rsplit(".", 1)[-1] == name]
    return f"no counterpart; {' and '.join(like)} has this name here, see what it means" if like else (
        "no counterpart"
    )  # fmt: skip


def _drop_refused(t: Translation) -> None:
    """Leaves out what the recipe refuses, as few keys as it takes in the order in which they were read."""
    if not t.keys or _refusal(t.recipe, t.keys) is None:
        return
    accepted: dict[str, Any] = {}
    waiting, reasons = dict(t.keys), {}
    while waiting:
        for key, value in list(waiting.items()):
            reasons[key] = _refusal(t.recipe, {**accepted, key: value})
            if reasons[key] is None:
                accepted[key] = waiting.pop(key)
                break
        else:
            break
    for key, value in waiting.items():
        for name in t.sources[key] or (key,):
            t.leave(name, f"{key} {short(value)} is refused here: {reasons[key]}")
    t.keys = {key: value for key, value in t.keys.items() if key in accepted}


def _refusal(recipe: type[Section], keys: dict[str, Any]) -> str | None:
    """Why the recipe class refuses these keys; None where it takes them. What must be given has a stand-in."""
    try:
        load_recipe(recipe, None, _words(recipe, keys))
    except SteersmanError as error:
        return str(error).removeprefix("settings: ").removeprefix("the recipe: ").replace("--", "")
    return None


def _words(recipe: type[Section], keys: dict[str, Any]) -> list[str]:
    """The keys as words of a command line, with stand-ins for what must be given."""
    known = {key for key, _ in walk_keys(recipe)}
    stand_ins: dict[str, Any] = {
        key: "STAND-IN" for key in ("model.path", "data.path", "teacher.path") if key in known
    }
    if _shows_feedback(keys):
        stand_ins["reward.parts"] = {"STAND-IN": {"builtin": "length"}}
    settings = {**stand_ins, **keys}
    return [f"--{key}={json.dumps(settings[key], ensure_ascii=False, default=str)}"
            for key in sorted(settings, key=lambda key: key.count("."))]  # fmt: skip


def _shows_feedback(keys: dict[str, Any]) -> bool:
    """Whether the recipe needs a reward for what its teacher is shown."""
    return any(key.startswith("teacher.feedback.") for key in keys)


def _nested(keys: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in sorted(json.loads(json.dumps(keys, default=str)).items(), key=lambda item: item[0].count(".")):
        *path, last = key.split(".")
        spot = out
        for part in path:
            spot = spot.setdefault(part, {})
        spot[last] = value
    return out
