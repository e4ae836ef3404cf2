"""Settings that say one thing together: adapters, rewards, sinks, the warm-up, KL."""

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


COLUMNS = {
    "prompt_key": "prompt", "input_key": "prompt", "output_key": "completion", "chosen_key": "chosen",
    "rejected_key": "rejected", "label_key": "label", "dataset_text_field": "text",
}  # fmt: skip
"""Names that name a column of the data, and what it is here."""


def columns(t: Translation) -> None:
    """Where the data's own columns are."""
    found: dict[str, str] = {}
    names = [n for n in COLUMNS if n in t.settings and n not in t.left]
    for name in names:
        column, value = COLUMNS[name], t.settings[name]
        if name == "label_key" and t.verb != "kto":
            t.leave(name, "rewards read the columns of a row by their own names here: name a parameter of the "
                    "function so")  # fmt: skip
            continue
        if name == "input_key" and t.verb == "sft" and "output_key" not in t.settings:
            column = "messages" if is_on(t.settings.get("apply_chat_template")) else "text"
        if not isinstance(value, str) or not value:
            t.leave(name, f"{short(value)} is no name of a column")
        elif column in found:
            t.leave(name, f"{short(found[column])} is the column already that data.columns gives for {column}")
        else:
            found[column] = value
    t.taken.update(names)
    if any(column != value for column, value in found.items()):
        t.put("data.columns", found, *(n for n in names if n not in t.left))


CORRECTIONS = {
    "token_truncate": "token_truncated", "token_mask": "token_masked", "sequence_truncate": "sequence_truncated",
    "sequence_mask": "sequence_masked", "tis": "token_truncated", "icepop": "token_masked",
}  # fmt: skip
"""What TRL and OpenRLHF do with the ratio of training's probabilities to the sampler's: our `rollout.correction`."""
CORRECTED = ("enable_vllm_is_correction", "vllm_enable_is_correction", "vllm_importance_sampling_correction")
CORRECTION_KINDS = ("vllm_is_correction_type", "vllm_importance_sampling_mode")
CORRECTION_CAPS = ("vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap", "vllm_is_truncated_threshold")


def correction(t: Translation) -> None:
    """The weight of what another engine has sampled."""
    switch, on = t.given(*CORRECTED)
    kind_name, kind = t.given(*CORRECTION_KINDS)
    cap_name, cap = t.given(*CORRECTION_CAPS)
    low_name, low = t.given("vllm_importance_sampling_clip_min")
    names = [n for n in (switch, kind_name, cap_name, low_name) if n]
    if not names:
        return
    t.taken.update(names)
    why = "" if "rollout.correction.kind" in t.known else f"{t.verb} has no counterpart"
    if t.toolkit == "trl" and not is_on(t.settings.get("use_vllm")):
        why = why or "is read with use_vllm alone"
    if not why and not is_on(on) and (switch or t.toolkit == "openrlhf"):
        if switch:
            t.put("rollout.recompute_logp", True, switch)
            t.put("rollout.correction.kind", "none", switch)
        names, why = [n for n in names if n != switch], f"{switch or CORRECTED[0]} is not on"
    if why:
        for name in names:
            t.leave(name, why)
        return
    kind = kind or ("tis" if t.toolkit == "openrlhf" else "sequence_mask")
    ours = CORRECTIONS.get(str(kind))
    if ours is None:
        for name in names:
            t.leave(name, f"{short(kind)} has no counterpart for rollout.correction.kind")
        return
    t.put("rollout.recompute_logp", True, *(n for n in (switch, kind_name) if n))
    t.put("rollout.correction.kind", ours, *(n for n in (switch, kind_name) if n))
    if isinstance(cap, list) and len(cap) == 2:
        low_name, (low, cap) = cap_name, cap
    if cap_name:
        t.put("rollout.correction.cap", cap, cap_name)
    if ours == "token_masked" and (low_name or t.toolkit == "trl"):
        t.put("rollout.correction.low", low or 0.0, *([low_name] if low_name else []))
    elif low_name and low:
        t.leave(low_name, f"{short(low)} at its lower end: rollout.correction.low is of token_masked and "
                "geometric_masked")  # fmt: skip


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


def optimal_values(t: Translation) -> None:
    """Prompts that the reference never solves, which TRL leaves out unless the file says otherwise."""
    if t.toolkit == "trl" and t.verb == "a2po" and "filter_all_incorrect" not in t.settings:
        t.put("algorithm.solved_above", 0.0)


SYNCED = ("ref_model_mixup_alpha", "ref_model_sync_steps")
"""How TRL's reference follows the policy where `sync_ref_model` is on."""


def moving_reference(t: Translation) -> None:
    """A reference that follows the policy."""
    switch, on = t.given("sync_ref_model")
    names = [name for name in SYNCED if name in t.settings and name not in t.left]
    t.taken.update({switch, *names})
    if "moving_reference.every" not in t.known or not is_on(on):
        why = "sync_ref_model is not on" if "moving_reference.every" in t.known else f"{t.verb} has no counterpart"
        for name in [*names, *([switch] if is_on(on) else [])]:
            t.leave(name, why)
        return
    t.put("moving_reference", {}, switch)
    share, steps = (t.settings.get(name) if name in names else None for name in SYNCED)
    if is_number(share) and 0 < share <= 1:
        t.put("moving_reference.decay", round(1 - share, 9), SYNCED[0])
    elif share is not None:
        t.leave(SYNCED[0], f"{short(share)} is no share above 0")
    if is_whole(steps):
        t.put("moving_reference.every", steps, SYNCED[1])
    elif steps is not None:
        t.leave(SYNCED[1], f"{short(steps)} is no number of updates")


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
