"""Settings that say one thing together: adapters, rewards, sinks, the warm-up, a loss of pairs, KL."""

from __future__ import annotations

import re
from typing import Any

from steersman.guards.untrusted import is_number
from steersman.run.files.sinks import SINKS
from steersman.verbs.peers.translation import (
    OFF,
    LeftOutError,
    Translation,
    is_on,
    is_whole,
    listed,
    short,
)
from steersman.verbs.preference import PreferenceRecipe

PAIR_LOSSES = {
    "dpo": {"sigmoid": "dpo", "hinge": "rso", "ipo": "ipo", "robust": "robust_dpo", "sppo_hard": "sppo",
            "orpo": "orpo", "simpo": "simpo", "sigmoid_norm": "dpo_norm", "exo_pair": "exo", "nca_pair": "nca",
            "apo_zero": "apo_zero", "apo_down": "apo_down", "discopop": "discopop", "bco_pair": "bco_pair",
            "aot": "aot", "aot_unpaired": "aot_unpaired", "aot_pair": "aot_unpaired"},
    "cpo": {"sigmoid": "cpo", "hinge": "hinge", "simpo": "simpo"},
    "orpo": {"sigmoid": "orpo"},
    "tpo": {"sigmoid": "cpo", "hinge": "hinge", "tpo-l": "simpo"},
}  # fmt: skip
"""By trainer, their loss: ours. A hinge with a reference is RSO's; `aot_pair` is what TRL called `aot_unpaired`
once."""
PAIR_NUMBERS = (
    "beta", "pref_beta", "label_smoothing", "dpo_label_smoothing", "simpo_gamma", "cpo_alpha", "discopop_tau",
    "tpo_alpha", "tpo_l_gamma",
)  # fmt: skip
DIVERGENCE_KEYS = ("f_divergence_type", "f_alpha_divergence_coef")
PAIR_DEFAULTS = {
    "simpo": {"beta": 0.1, "margin": 0.5}, "hinge": {"beta": 0.1}, "dpo_norm": {"beta": 0.1},
    "discopop": {"beta": 0.1},
    "cpo": {"nll_weight": 1.0, "length_normalised_nll": 1.0},
}  # fmt: skip
"""What a loss takes there where the file gives nothing, in the places where ours takes another number."""
TRIPLE_DEFAULTS = {
    "cpo": {"beta": 0.01, "nll_weight": 0.0}, "hinge": {"beta": 0.01}, "simpo": {"beta": 0.01, "margin": 0.5},
}  # fmt: skip
"""The same of TPO's trainer, whose likelihood is that of gold answers."""
ADAPTERS = {"trl": {"r": 16, "alpha": 32, "dropout": 0.05}, "openrlhf": {"alpha": 16}, "llamafactory": {}}
"""By toolkit, its defaults of adapters where ours are others; LLaMA-Factory has ours."""
ADAPTER_KEYS = {
    "lora_r": "r", "lora_rank": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "lora_target": "targets",
    "lora_target_modules": "targets", "target_modules": "targets", "modules_to_save": "train_whole",
    "lora_modules_to_save": "train_whole", "additional_target": "train_whole", "use_dora": "dora",
    "use_rslora": "rslora",
}  # fmt: skip


def adapters(t: Translation) -> None:
    """Low-rank adapters: whether there are any, and their settings with the toolkit's defaults."""
    names = [n for n in ADAPTER_KEYS if n in t.settings and n not in t.left]
    on, why = _trains_adapters(t, names)
    t.taken.update({"use_peft", "finetuning_type", *names})
    if not on:
        for name in names:
            if str(t.settings[name]).lower() not in OFF:
                t.leave(name, f"{why}, so the whole model is trained there")
        return
    chosen = [n for n in ("use_peft", "finetuning_type") if n in t.settings]
    t.put("model.lora", {}, *chosen)
    for name in names:
        try:
            t.put(f"model.lora.{ADAPTER_KEYS[name]}", _adapter_value(t, name), name)
        except LeftOutError as reason:
            t.leave(name, str(reason))
    for key, value in ADAPTERS[t.toolkit].items():
        if not any(ADAPTER_KEYS[name] == key for name in names):
            t.put(f"model.lora.{key}", value, *chosen)
    if t.toolkit == "trl" and "model.lora.targets" not in t.keys:
        t.left.setdefault(
            "lora_target_modules",
            "not in the file; there the model's architecture decides, here all linear layers have adapters",
        )


def _trains_adapters(t: Translation, names: list[str]) -> tuple[bool, str]:
    kind = t.settings.get("finetuning_type")
    rank = t.settings.get("lora_rank")
    if "use_peft" in t.settings:
        return is_on(t.settings["use_peft"]), "use_peft is not on"
    if kind is not None:
        if kind not in ("lora", "full"):
            t.leave("finetuning_type", f"{short(kind)} has no counterpart; all weights are trained here")
        return kind == "lora", f"finetuning_type is {short(kind)}"
    if t.toolkit == "llamafactory":
        return True, ""
    if t.toolkit == "openrlhf":
        return is_whole(rank), "lora_rank is not above 0"
    return False, "use_peft is not on"


def _adapter_value(t: Translation, name: str) -> Any:
    key, value = ADAPTER_KEYS[name], t.settings[name]
    if key in ("dora", "rslora"):
        return is_on(value)
    if key not in ("targets", "train_whole"):
        return value
    if key == "targets" and isinstance(value, str) and re.search(r"[\\*(|\[^$]", value):
        return value  # a regular expression
    modules = [str(v).strip() for v in listed(value)]
    return "all-linear" if key == "targets" and modules in (["all"], ["all-linear"]) else modules


def rewards(t: Translation) -> None:
    """The parts of the reward with their weights."""
    names = ("reward_model_path", "reward_pretrain", "reward_model_name_or_path", "reward_funcs")
    names = tuple(n for n in names if n in t.settings and n not in t.left)
    if not names or "reward.parts" not in t.known:
        if "reward_weights" in t.settings:
            t.leave("reward_weights", "goes with reward_funcs, which are not there")
        return
    models = [str(m).strip() for n in names if n != "reward_funcs" for m in listed(t.settings[n])]
    asked = [str(f) for f in (listed(t.settings["reward_funcs"]) if "reward_funcs" in names else [])]
    parts: dict[str, dict[str, Any]] = {}
    for place, path in enumerate(models):
        parts["score" if len(models) == 1 else f"score{place}"] = {"model": path}
    known = [f for f in asked if ":" in f or "." in f]
    for function in asked:
        if function in known:
            module, _, own = function.rpartition(".")
            spot = function if ":" in function else f"{module}:{own}"
            parts[f"score{len(parts)}"] = {"function": spot}
    if len(known) < len(asked):
        own = ", ".join(f for f in asked if f not in known)
        t.leave(
            "reward_funcs",
            f"{own}: functions of TRL's, which take messages; here a function takes texts, such as --reward.parts "
            "'{score: {function: my_rewards.py:score}}'",
        )
    weights = t.settings.get("reward_weights")
    if weights is not None:
        t.taken.add("reward_weights")
        numbers = listed(weights)
        if len(numbers) == len(parts) and len(known) == len(asked):
            for part, weight in zip(parts.values(), numbers, strict=True):
                part["weight"] = weight
        else:
            t.leave("reward_weights", f"{len(numbers)} weights, and {len(parts)} parts are written")
    if parts:
        t.put("reward.parts", parts, *(n for n in names if n not in t.left), *(
            ["reward_weights"] if weights is not None and "reward_weights" not in t.left else []))  # fmt: skip
    t.taken.update(names)


def sinks(t: Translation) -> None:
    """Where else numbers go."""
    names = [n for n in ("report_to", "use_wandb", "use_tensorboard", "use_swanlab") if n in t.settings]
    names = [n for n in names if n not in t.left]
    sinks: list[str] = []
    for name in names:
        value = t.settings[name]  # of OpenRLHF's use_wandb it may be a key of an account
        asked = listed(value) if name == "report_to" else ([name[4:]] if str(value).lower() not in OFF else [])
        asked = [str(sink) for sink in asked if sink != "none"]
        unknown = [sink for sink in asked if sink not in SINKS]
        if unknown:
            t.leave(name, f"{short(', '.join(unknown))}: run.sinks has {', '.join(SINKS)}")
        sinks += [sink for sink in asked if sink in SINKS and sink not in sinks]
    if names and (sinks or not any(n in t.left for n in names)):
        t.put("run.sinks", sinks, *(n for n in names if n not in t.left))
    t.taken.update(names)


def warmup(t: Translation) -> None:
    """Warm-up in updates, or as a share of them: where a number of steps above 0 is given, it decides."""
    counts, shares = ("warmup_steps", "warmup_num_steps"), ("warmup_ratio", "lr_warmup_ratio")
    names = [n for n in (*counts, *shares) if n in t.settings and n not in t.left]
    if not names or "optimizer.warmup" not in t.known:
        return
    if t.settings.get("lr_scheduler_type") == "constant" and t.toolkit != "openrlhf":
        for name in names:
            t.leave(name, "lr_scheduler_type constant has no warm-up there")
        return t.put("optimizer.warmup", 0)
    numbers: dict[str, float] = {}
    for name in names:
        value = t.settings[name]
        if not is_number(value) or value < 0:
            t.leave(name, f"{short(value)} has no counterpart for optimizer.warmup")
        elif name in shares and value >= 1:
            t.leave(name, f"{short(value)} is the whole run there, and optimizer.warmup counts updates from 1")
        else:
            numbers[name] = value
    decides = next((name for name, value in numbers.items() if value > 0), next(iter(numbers), ""))
    for name, value in numbers.items():
        if name == decides:
            t.put("optimizer.warmup", value, name)
        elif value > 0:
            t.leave(name, f"{decides} decides there where it is above 0")
        t.taken.add(name)


def pair_loss(t: Translation) -> None:
    """Which loss of pairs, or which several with their weights, and their own numbers."""
    if t.recipe is not PreferenceRecipe:
        if t.settings.get("loss_weights"):
            t.leave("loss_weights", "weighs losses of pairs")
        return
    trainer = next((word for word in t.words if word in ("cpo", "orpo", "tpo")), "dpo")
    if "tpo_alpha" in t.settings or "tpo_l_gamma" in t.settings:
        trainer = "tpo"
    source, theirs = t.given("loss_type", "pref_loss")
    if isinstance(theirs, list) and len(theirs) == 1:
        theirs = theirs[0]
    if "ipo" in t.settings:
        t.taken.add("ipo")
        if is_on(t.settings["ipo"]):
            source, theirs = "ipo", "ipo"
    weights = _weights(t, theirs if source else "sigmoid", trainer)
    nll = weights.pop("nll", 0)
    numbers = [n for n in PAIR_NUMBERS if n in t.settings and n not in t.left]
    if None in weights or not weights:
        t.leave(source, f"{short(theirs)} has no counterpart for loss.name")
        if t.settings.get("loss_weights"):
            numbers.append("loss_weights")
        for number in numbers:
            t.leave(number, f"belongs to {source} {short(theirs)}, which has no counterpart")
        return
    name, settings, divergence = _of_divergence(t, [str(each) for each in weights])
    said = [n for n in (source, *divergence) if n]
    if said or name != "dpo":
        t.put("loss.name", name, *said)
    first, *more = weights.items()
    also = {str(each): weight for each, weight in more}
    for key, value, plain in (("weight", first[1], 1), ("also", also, {}), ("nll", nll, 0)):
        if value != plain:
            t.put(f"loss.{key}", value, *(n for n in (source, "loss_weights") if n in t.settings))
    for each in (name, *also):
        settings |= (TRIPLE_DEFAULTS if trainer == "tpo" else PAIR_DEFAULTS).get(each, {})
        if each == "ipo" and t.toolkit != "openrlhf":
            settings["length_normalised"] = 1.0  # means of the answers' log-probabilities, not sums
    from_names = dict.fromkeys(settings, said)
    for number in numbers:
        value = t.settings[number]
        keys = {key for each in (name, *also) if (key := _pair_number(t, number, each, trainer))}
        for key in keys:
            if key in ("loss.nll", "loss.gold_nll"):
                t.put(key, value, number)
            else:
                settings[key], from_names[key] = value, [number]
        if not keys and value not in (0, None, False):
            t.leave(number, f"loss.name {name} does not read it")
        t.taken.add(number)
    if trainer == "cpo" and name != "cpo" and "cpo_alpha" not in numbers:
        t.put("loss.nll", 1.0)  # its default there
    if trainer == "tpo":
        if "tpo_alpha" not in numbers:
            t.put("loss.gold_nll", 1.0)  # its default there
        if t.keys["loss.gold_nll"]:
            t.put("data.columns", {"gold": "reference"})
    for key, value in settings.items():
        t.put(f"loss.settings.{key}", value, *from_names[key])


def _weights(t: Translation, theirs: Any, trainer: str) -> dict[str | None, float]:
    """Each loss asked for, by our name and "nll" for the likelihood, with its weight; None in the place of one that
    has no counterpart, and nothing at all where the weights are not those of different losses. A weight of 0 asks for
    nothing."""
    given = t.settings.get("loss_weights")
    if not isinstance(theirs, list):
        if given:
            t.leave("loss_weights", "weighs several losses, and the file has one")
        return {PAIR_LOSSES[trainer].get(str(theirs)): 1}
    names = ["nll" if word == "sft" else PAIR_LOSSES[trainer].get(str(word)) for word in theirs]
    weights = listed(given) if given else [1] * len(names)
    if not len(weights) == len(names) == len(set(names)) or not all(is_number(w) and w >= 0 for w in weights):
        return {}
    return {name: weight for name, weight in zip(names, weights, strict=True) if weight}


def _of_divergence(t: Translation, names: list[str]) -> tuple[str, dict[str, Any], list[str]]:
    """The first of the losses with TRL's `f_divergence_type`, its own settings, and the file's keys that say so."""
    name = names[0]
    kind, coefficient = (t.settings.get(key) for key in DIVERGENCE_KEYS)
    found = [key for key in DIVERGENCE_KEYS if key in t.settings and key not in t.left]
    if kind in (None, "reverse_kl"):
        t.taken.update(found)
        return name, {}, []
    alpha = {"forward_kl": 1.0, "alpha_divergence": 0.5}.get(str(kind))
    if kind == "alpha_divergence" and is_number(coefficient):
        alpha = 1 - float(coefficient)
    if names != ["dpo"] or (kind != "js_divergence" and (alpha is None or not 0 <= alpha <= 1)):
        for key in found:
            t.leave(key, f"{short(t.settings[key])} has no counterpart for {' and '.join(names)}")
        return name, {}, []
    t.taken.update(found)
    return ("fdpo_js", {}, found) if kind == "js_divergence" else ("fdpo_alpha", {"alpha": alpha}, found)


def _pair_number(t: Translation, number: str, name: str, trainer: str) -> str:
    """The setting of the loss that the number is; "" where the loss has none."""
    if number in ("beta", "pref_beta"):
        return "weight" if name == "orpo" else "beta"
    if number == "cpo_alpha":
        return "" if trainer != "cpo" else "nll_weight" if name == "cpo" else "loss.nll"
    if number == "tpo_alpha":
        return "loss.gold_nll" if trainer == "tpo" else ""
    if number == "tpo_l_gamma":
        return "margin" if trainer == "tpo" and name == "simpo" else ""
    if number == "simpo_gamma":
        return "margin" if name == "simpo" else ""
    if number == "discopop_tau":
        return "tau" if name == "discopop" else ""
    smoothed = dict.fromkeys(("dpo", "aot", "aot_unpaired"), "label_smoothing")
    return {**smoothed, "robust_dpo": "flip", "exo": "epsilon"}.get(name, "")


def kl(t: Translation) -> None:
    """OpenRLHF's KL, which is in the reward unless `use_kl_loss` is on."""
    name, coefficient = t.given("init_kl_coef")
    if not name or t.toolkit != "openrlhf" or "algorithm.kl_in" not in t.known:
        return
    in_loss = is_on(t.settings.get("use_kl_loss"))
    estimator = t.settings.get("kl_estimator", "k1")
    t.put("algorithm.beta", coefficient, name)
    t.put("algorithm.kl_in", "loss" if in_loss else "reward", *(n for n in ("use_kl_loss",) if n in t.settings))
    t.put("algorithm.kl_estimator", estimator, *(n for n in ("kl_estimator",) if n in t.settings))


def strategies(t: Translation) -> None:
    """Where what is counted in epochs, or never done, is named; `steps` is said by the number of steps."""
    for name, key in (("eval_strategy", "run.eval_every"), ("evaluation_strategy", "run.eval_every"),
                      ("save_strategy", "run.save_every")):  # fmt: skip
        if name in t.settings and t.settings[name] != "steps":
            t.leave(name, f"{short(t.settings[name])} has no counterpart; {key} counts steps")
    if t.settings.get("lr_scheduler_kwargs") and "lr_scheduler_type" not in t.settings:
        t.leave("lr_scheduler_kwargs", "goes with lr_scheduler_type, of which one alone has a counterpart")


def critic_too(t: Translation) -> None:
    """Their one optimizer, or two that share all but the rate, moves the critic as well."""
    if not t.has_critic():
        return
    for key in [k for k in t.keys if k.startswith("optimizer.")]:
        if not (t.toolkit == "openrlhf" and key == "optimizer.lr"):
            t.put(f"critic.{key}", t.keys[key], *t.sources[key])
