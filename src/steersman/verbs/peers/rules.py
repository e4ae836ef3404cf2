"""What single settings say in our keys, where it is more than a name: other units, other words, values that ask for
nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from steersman.guards.untrusted import is_number
from steersman.verbs.peers.settings import ESTIMATORS, VERBS, is_luspo
from steersman.verbs.peers.translation import (
    OFF,
    LeftOutError,
    Translation,
    is_on,
    is_whole,
    listed,
    short,
)

OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "paged_adamw_32bit": "adamw",
    "paged_adamw": "adamw", "adamw_8bit": "adamw-8bit", "adamw_bnb_8bit": "adamw-8bit",
    "paged_adamw_8bit": "adamw-8bit-paged", "adafactor": "adafactor", "lion_32bit": "lion", "lion_8bit": "lion-8bit",
    "muon": "muon",
}  # fmt: skip
SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}
WHOLE_RATIO = ("gspo", "luspo")
"""Verbs that TRL has as `importance_sampling_level` sequence."""
AVERAGES = {"grpo": "sequence", "dapo": "token", "dr_grpo": "episode"}
UNLIKE = {
    "vf_coef": "weighs the value loss in one optimizer with the policy's; here the critic has its own optimizer, and "
    "critic.vf_coef is read with critic.init: shared alone",
    "kl_target": "is in nats per token there, and algorithm.kl_target is in nats per response",
    "kl_horizon": "goes with kl_target",
    "normalize_reward": "takes the mean and deviation that the reward model was saved with; reward.normalise takes "
    "running ones",
    "reward_model": "is a model with a value head there, which transformers does not load as a classifier; train one "
    "with steersman reward, and give reward.parts",
    "trust_remote_code": "runs Python code that comes with the model; read it, then give model.trust_remote_code",
    "micro_train_batch_size": "what goes through a model at once is run.micro_tokens here, in tokens",
    "micro_rollout_batch_size": "what is decoded side by side is rollout.max_batch here",
    "per_device_eval_batch_size": "what goes through a model at once is run.micro_tokens here, in tokens",
    "packing_samples": "says how rows lie in memory; run.micro_tokens does that here",
    "config": "names another file, which is not read; import that one",
    "config_file": "names another file, which is not read; parallel.mode and run.devices say how devices share a run",
    "engine": "parallel.mode says it here: zero1, zero2 or zero3 for DeepSpeed",
    "num_episodes": "counts passes over the prompts; iterations are passes through the loop here",
    "template": "texts of turns are laid out by the model's own chat template here; data.wrap_in_chat says whether "
    "plain text is put into it",
    "input_template": "data.prompt_template makes the prompt out of columns here, such as 'User: {prompt}'",
    **dict.fromkeys(
        (
            "ref_num_nodes",
            "ref_num_gpus_per_node",
            "reward_num_nodes",
            "reward_num_gpus_per_node",
            "critic_num_nodes",
            "critic_num_gpus_per_node",
            "colocate_all_models",
            "colocate_actor_ref",
            "colocate_critic_reward",
        ),
        "all models share the devices of run.devices here",
    ),
    **dict.fromkeys(
        (
            "vllm_gpu_memory_utilization",
            "vllm_tensor_parallel_size",
            "vllm_max_model_length",
            "enforce_eager",
            "enable_prefix_caching",
        ),
        "is an argument of vLLM's: with rollout.engine vllm, rollout.arguments takes those of its command line",
    ),
    "vllm_num_engines": "with rollout.engine vllm, rollout.servers says how many are started",
    **dict.fromkeys(
        ("vllm_mode", "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout"),
        "with rollout.engine vllm, rollout.url names servers that run already, and rollout.timeout is their time",
    ),
    **dict.fromkeys(
        ("use_dynamic_batch", "train_max_tokens_per_gpu", "rollout_max_tokens_per_gpu"),
        "what goes through a model at once is run.micro_tokens here, in tokens",
    ),
    "dynamic_filtering_reward_range": "dapo leaves out groups whose scores are all equal, whatever their mean is",
    "agent_func_path": "is called otherwise here; environment.path names a class of yours",
    "ckpt_path": "checkpoints are in run.dir here",
    "save_hf_ckpt": "checkpoints are in run.dir here; `steersman export` makes a model of what a run has saved",
    **dict.fromkeys(
        ("hub_model_id", "hub_strategy"),
        "`steersman push` uploads the model of a run that has ended",
    ),
    "dataset_probs": "how long an epoch is differs; see data.mix",
    "prompt_data_probs": "how long an epoch is differs; see data.mix",
    "load_checkpoint": "goes on from another toolkit's checkpoint; here --resume goes on with the run in run.dir",
    "remote_rm_url": "is called otherwise here; give reward.parts a function of prompts and completions",
}
"""Names whose like means something else here, and what to do."""
SAME = {
    "desirable_weight": "loss.desirable_weight", "undesirable_weight": "loss.undesirable_weight",
    "dual_clip": "algorithm.dual_clip", "gamma": "algorithm.gamma", "kl_estimator": "algorithm.kl_estimator",
    "lam": "algorithm.lam", "min_p": "rollout.min_p", "missing_eos_penalty": "reward.missing_eos_penalty",
    "value_clip": "critic.value_clip",
}  # fmt: skip
"""Names that both have, with one meaning."""


def _choice(key: str, options: dict[Any, Any]) -> Callable[[Translation, Any], dict[str, Any]]:
    """A rule: their value is one of a few, each with its counterpart, or None for what is so anyway."""

    def rule(_: Translation, value: Any) -> dict[str, Any]:
        chosen = value.lower() if isinstance(value, str) else value
        if isinstance(chosen, (list, dict)) or chosen not in options:
            raise LeftOutError(f"{short(value)} has no counterpart for {key}")
        return {} if options[chosen] is None else {key: options[chosen]}

    return rule


def _switch(key: str, on: Any, off: Any = None) -> Callable[[Translation, Any], dict[str, Any]]:
    """A rule: on and off, None for what is so anyway."""

    def rule(_: Translation, value: Any) -> dict[str, Any]:
        meant = on if is_on(value) else off
        return {} if meant is None else {key: meant}

    return rule


def _only(state: bool, reason: str) -> Callable[[Translation, Any], dict[str, Any]]:
    """A rule: one state is so anyway, the other is left out for the reason."""

    def rule(_: Translation, value: Any) -> dict[str, Any]:
        if is_on(value) is not state:
            raise LeftOutError(reason)
        return {}

    return rule


def _schedule(t: Translation, value: Any) -> dict[str, Any]:
    if value != "cosine_with_min_lr":
        return _choice("optimizer.schedule", SCHEDULES)(t, value)
    given = t.settings.get("lr_scheduler_kwargs")
    options: dict[str, Any] = given if isinstance(given, dict) else {}
    share = 0.1 if t.toolkit == "openrlhf" else options.get("min_lr_rate")
    peak = t.settings.get("learning_rate")
    if share is None and is_number(options.get("min_lr")) and is_number(peak) and peak > 0:
        share = options["min_lr"] / peak
    if share is None:
        raise LeftOutError(
            "where the rate ends is not in the file; give optimizer.schedule cosine and optimizer.min_lr"
        )
    return {"optimizer.schedule": "cosine", "optimizer.min_lr": share}


def _betas(_: Translation, value: Any) -> dict[str, Any]:
    betas = listed(value)
    if len(betas) != 2:
        raise LeftOutError(f"{short(value)} is not two numbers")
    return {"optimizer.beta1": betas[0], "optimizer.beta2": betas[1]}


def _grad_norm(_: Translation, value: Any) -> dict[str, Any]:
    if value is None or value == 0:
        raise LeftOutError(
            f"{short(value)} clips nothing there; give optimizer.max_grad_norm a large number for that"
        )
    return {"optimizer.max_grad_norm": value}


def _keep_last(_: Translation, value: Any) -> dict[str, Any]:
    if value is None or (is_number(value) and value <= 0):
        raise LeftOutError(f"{short(value)} keeps all checkpoints there; give run.keep_last a large number for that")
    return {"run.keep_last": value}


def _dtype(_: Translation, value: Any) -> dict[str, Any]:
    if value == "auto":
        raise LeftOutError("auto is the precision of the model's file there; model.dtype auto goes by the device")
    return {"model.dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(str(value), value)}


def _fp16(_: Translation, value: Any) -> dict[str, Any]:
    if is_on(value):
        raise LeftOutError("scales the loss there, which is not done here; use model.dtype bfloat16 or float32")
    return {}


def _pure_bf16(_: Translation, value: Any) -> dict[str, Any]:
    return {"model.dtype": "bfloat16", "optimizer.rounding": "nearest"} if is_on(value) else {}


def _quantised(t: Translation, value: Any) -> dict[str, Any]:
    """The 4-bit kind, nf4 unless another one is named."""
    if not is_on(value):
        return {}
    name, kind = t.given("bnb_4bit_quant_type", "quantization_type")
    t.taken.add(name)
    return {"model.quantise": kind or "nf4"}


def _quantization_bit(t: Translation, value: Any) -> dict[str, Any]:
    method = t.settings.get("quantization_method", "bnb")
    if method not in ("bnb", "bitsandbytes") or value not in (4, 8):
        raise LeftOutError(f"{short(value)} bits by {short(method)} has no counterpart for model.quantise")
    t.taken.add("quantization_method")
    return _quantised(t, True) if value == 4 else {"model.quantise": "int8"}


def _adapters_folder(_: Translation, value: Any) -> dict[str, Any]:
    if len(listed(value)) != 1:
        raise LeftOutError("several folders of adapters; model.path takes one, which names its base")
    return {"model.path": str(listed(value)[0])}


def _zero_stage(t: Translation, value: Any) -> dict[str, Any]:
    """DeepSpeed's stage. Beside bfloat16 its optimizer keeps float32 weights there, in shards, and passes are in
    bfloat16: `fsdp` does that here, with gathered weights that are kept after a pass where stage 2 keeps them."""
    if isinstance(value, bool) or value not in (0, 1, 2, 3):
        raise LeftOutError(f"{short(value)} is no stage of ZeRO")
    if value >= 2 and t.keys.get("model.dtype") == "bfloat16":
        t.keys["model.dtype"] = "float32"
        found: dict[str, Any] = {"parallel.mode": "fsdp", "parallel.compute_dtype": "bfloat16"}
        return found if value == 3 else {**found, "parallel.reshard": False}
    return {"parallel.mode": f"zero{value}" if value else "replicas"}


def _fsdp(_: Translation, value: Any) -> dict[str, Any]:
    if str(value).lower() in OFF or value == []:
        return {}
    words = {str(word) for part in listed(value) for word in str(part).split()}
    if words - {"full_shard", "shard_grad_op", "auto_wrap", "offload", "true", "True"} or words == {"offload"}:
        raise LeftOutError(f"{short(value)} has no counterpart for parallel.mode")
    found: dict[str, Any] = {"parallel.mode": "fsdp"}
    if "shard_grad_op" in words:
        found["parallel.reshard"] = False
    return found | ({"parallel.offload": True} if "offload" in words else {})


def _deepspeed(_: Translation, value: Any) -> dict[str, Any]:
    if str(value).lower() in OFF:
        return {}
    raise LeftOutError(
        "the stage is in that file: give parallel.mode zero1, zero2 or zero3, and as parallel.deepspeed a file of "
        "what the recipe does not say"
    )


def _packing(t: Translation, value: Any) -> dict[str, Any]:
    if is_on(value) and t.toolkit == "llamafactory" and not is_on(t.settings.get("neat_packing")):
        raise LeftOutError("lets the sequences of a row see each other there; train.pack keeps them apart")
    return _packed_apart(t, value)


def _packed_apart(t: Translation, value: Any) -> dict[str, Any]:
    """Sequences of one row that do not see each other: TRL's `packing`, and LLaMA-Factory's `neat_packing`, which
    needs no `packing` beside it."""
    if not is_on(value):
        return {}
    _, length = t.given("cutoff_len", "max_length", "max_seq_length")
    if length is None:
        raise LeftOutError("how long a packed row is is not in the file; give train.pack in tokens")
    return {"train.pack": length}


def _dataset(t: Translation, value: Any) -> dict[str, Any]:
    paths = listed(value) if t.toolkit != "trl" else [value]
    return {"data.path": paths[0] if len(paths) == 1 else [str(path).strip() for path in paths]}


def _max_samples(t: Translation, value: Any) -> dict[str, Any]:
    if t.toolkit == "llamafactory" and len(listed(t.settings.get("dataset", ""))) > 1:
        raise LeftOutError("is of each data set there; data.limit is of all together")
    return {"data.limit": value}


def _average(t: Translation, value: Any) -> dict[str, Any]:
    """`loss_type` of trainers other than those of pairs."""
    if t.verb == "sft":
        return _choice("train.loss", {"nll": None, "chunked_nll": None, "dft": "dft"})(t, value)
    if t.verb == "kto" and value == "apo_zero_unpaired":
        return {"loss.name": value}
    if value == "luspo" and not is_luspo(t.settings):
        if t.verb in WHOLE_RATIO:
            raise LeftOutError(f"{t.verb} has one ratio per response, and there importance_sampling_level says token")
        return {"algorithm.average": "episode"}  # sums of what each token's own ratio gives
    if str(value) == t.verb or ("algorithm.average" not in t.known and str(value) in ("kto", "bco", "nll")):
        return {} if str(value) != "dapo" else {"algorithm.average": "token"}
    if "algorithm.average" in t.known and str(value) in AVERAGES:
        return {"algorithm.average": AVERAGES[str(value)]}
    if value == "bnpo":
        raise LeftOutError("averages over the tokens of each device there; algorithm.average token is over all")
    raise LeftOutError(_own_method(value))


def _dft(t: Translation, value: Any) -> dict[str, Any]:
    if is_on(value) and t.verb != "sft":
        raise LeftOutError(f"{t.verb} has no counterpart")
    return {"train.loss": "dft"} if is_on(value) else {}


def _ld_alpha(t: Translation, value: Any) -> dict[str, Any]:
    if t.toolkit == "llamafactory":
        raise LeftOutError("leaves the reference's log-probabilities whole there; loss.ld_alpha weighs them likewise")
    return {"loss.ld_alpha": value}


def _pref_bco_weight(_: Translation, value: Any) -> dict[str, Any]:
    if value != 0:
        raise LeftOutError("takes a running mean off the rewards there, and loss.also {bco_pair: WEIGHT} does not")
    return {}


def _own_method(value: Any) -> str:
    verb = str(value).replace("_", "-")
    return f"{short(value)} is a method of its own here: --verb {verb}" if verb in VERBS else (
        f"{short(value)} has no counterpart"
    )  # fmt: skip


def _ratio_level(t: Translation, value: Any) -> dict[str, Any]:
    if (value == "sequence") is not (t.verb in WHOLE_RATIO):
        raise LeftOutError(
            f"{short(value)}: one ratio per response is --verb gspo or luspo, one per token the others"
        )
    return {}


def _estimator(t: Translation, value: Any) -> dict[str, Any]:
    if ESTIMATORS.get(str(value)) != t.verb and t.verb != "gspo":
        raise LeftOutError(f"{short(value)} is the verb {ESTIMATORS.get(str(value), 'of none')} here")
    return {}


def _clip_low(t: Translation, value: Any) -> dict[str, Any]:
    """One number for both sides, unless the upper one is given by itself."""
    if t.verb == "gmpo":
        raise LeftOutError("clips the ratio there; algorithm.clip_low and clip_high are of its logarithm, in nats")
    if "algorithm.clip_low" not in t.known:
        raise LeftOutError(f"{t.verb} has no counterpart")
    found = {"algorithm.clip_low": value}
    return found if "algorithm.clip_high" in t.keys else {**found, "algorithm.clip_high": value}


def _clip_high(t: Translation, value: Any) -> dict[str, Any]:
    if t.verb == "gmpo":
        return _clip_low(t, value)
    if t.verb == "cispo" and is_number(value):
        return {"algorithm.clip_high": round(value - 1, 9)}  # weights are cut at it there, at 1 more than ours here
    return {"algorithm.clip_high": value}


def _clip_both(t: Translation, value: Any) -> dict[str, Any]:
    ends = listed(value)
    if len(ends) != 2:
        raise LeftOutError(f"{short(value)} is not two numbers")
    return {**_clip_low(t, ends[0]), **_clip_high(t, ends[1])}


def _reward_clip(_: Translation, value: Any) -> dict[str, Any]:
    ends = listed(value)
    if len(ends) != 2 or not all(is_number(end) for end in ends) or ends[0] != -ends[1]:
        raise LeftOutError(f"{short(value)}: reward.clip is one number, for both sides of 0")
    return {"reward.clip": ends[1]}


def _overlong(t: Translation, value: Any) -> dict[str, Any]:
    if t.settings.get("overlong_penalty_factor", 1) != 1:
        raise LeftOutError("overlong_penalty_factor is not 1, which is the largest penalty here")
    return {"reward.overlong_buffer": value}


def _actor_waits(_: Translation, value: Any) -> dict[str, Any]:
    return {} if is_number(value) and value <= 0 else {"critic.warmup": value}


def _dynamic_filtering(t: Translation, value: Any) -> dict[str, Any]:
    if t.verb != "dapo" and is_on(value):
        raise LeftOutError("is algorithm.dynamic_sampling of dapo here: --verb dapo")
    return {} if is_on(value) or t.verb != "dapo" else {"algorithm.dynamic_sampling": 0}


def _loss_kind(t: Translation, value: Any) -> dict[str, Any]:
    if (value == "gspo") is not (t.verb == "gspo"):
        raise LeftOutError(f"{short(value)}: of the verbs here, gspo alone has the loss gspo")
    return {}


def _subset(_: Translation, value: Any) -> dict[str, Any]:
    if len(listed(value)) != 1:
        raise LeftOutError("several configurations; data.subset takes one")
    return {"data.subset": str(listed(value)[0])}


def _top_k(_: Translation, value: Any) -> dict[str, Any]:
    return {"rollout.top_k": 0 if value == -1 else value}


def _new_tokens(t: Translation, value: Any) -> dict[str, Any]:
    if "rollout.max_new_tokens" not in t.known:
        raise LeftOutError(f"{t.verb} has no counterpart")
    return {"rollout.max_new_tokens": value}


def _epochs(t: Translation, value: Any) -> dict[str, Any]:
    if "train.epochs" not in t.known:
        raise LeftOutError("counts passes over the data; iterations are passes through the loop here")
    if "train.max_steps" in t.keys:
        raise LeftOutError("max_steps ends the run there")
    return {"train.epochs": value}


def _max_epochs(t: Translation, value: Any) -> dict[str, Any]:
    return _epochs(t, value) if "train.epochs" in t.known else {"algorithm.epochs": value}


def _max_steps(t: Translation, value: Any) -> dict[str, Any]:
    if is_number(value) and value <= 0:
        return {}  # off there
    if not is_whole(value):
        raise LeftOutError(f"{short(value)} is no number of updates")
    if "train.max_steps" in t.known:
        return {"train.max_steps": value, "train.epochs": value}  # as many passes hold as many updates at least
    if t.has_critic():
        raise LeftOutError("total_episodes ends the run there; iterations do here")
    return {"iterations": t.in_iterations(value)}


def _episodes(t: Translation, value: Any) -> dict[str, Any]:
    if not is_whole(value) or "rollout.prompts" not in t.keys:
        raise LeftOutError("counts responses; iterations is it / (rollout.prompts x rollout.samples)")
    return {"iterations": math.ceil(value / (t.keys["rollout.prompts"] * t.keys.get("rollout.samples", 1)))}


def _save_steps(t: Translation, value: Any) -> dict[str, Any]:
    return t.steps("run.save_every", value, "save_strategy")


def _eval_steps(t: Translation, value: Any) -> dict[str, Any]:
    return t.steps("run.eval_every", value, "eval_strategy", "evaluation_strategy")


def _logging_steps(t: Translation, value: Any) -> dict[str, Any]:
    _, strategy = t.given("eval_strategy", "evaluation_strategy")
    if strategy == "steps" and "eval_steps" not in t.settings:
        return _eval_steps(t, value)  # what eval_steps is there if it is not given
    raise LeftOutError("numbers are logged at every step here")


def _resume(_: Translation, value: Any) -> dict[str, Any]:
    if str(value).lower() in OFF:
        return {}
    raise LeftOutError("is another toolkit's checkpoint; here --resume goes on with the run in run.dir")


def _router_loss(_: Translation, value: Any) -> dict[str, Any]:
    return {} if is_number(value) and value == 0 else {"train.router_loss": value}


_ANYWAY = "the loss is on completions alone here: answers, and the assistant's turns of a chat"
RULES: dict[str, Callable[[Translation, Any], dict[str, Any]]] = {
    "lr_scheduler_type": _schedule, "lr_scheduler": _schedule, "adam_betas": _betas, "max_grad_norm": _grad_norm,
    "gradient_clipping": _grad_norm, "max_norm": _grad_norm, "optim": _choice("optimizer.kind", OPTIMIZERS),
    "save_total_limit": _keep_last, "max_ckpt_num": _keep_last, "torch_dtype": _dtype, "dtype": _dtype,
    "param_dtype": _dtype, "bf16": _switch("model.dtype", "bfloat16"), "fp16": _fp16, "pure_bf16": _pure_bf16,
    "load_in_4bit": _quantised, "load_in_8bit": _switch("model.quantise", "int8"),
    "quantization_bit": _quantization_bit, "adapter_name_or_path": _adapters_folder,
    "gradient_checkpointing": _switch("model.gradient_checkpointing", True, False),
    "disable_gradient_checkpointing": _switch("model.gradient_checkpointing", False, True),
    "flash_attn": _choice("model.attention", {
        "auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3",
        True: "flash_attention_2", False: None}),
    "zero_stage": _zero_stage, "fsdp": _fsdp, "deepspeed": _deepspeed, "packing": _packing,
    "neat_packing": _packed_apart, "dataset": _dataset,
    "prompt_data": _dataset, "max_samples": _max_samples, "mask_history": _switch("data.assistant_turns", "last"),
    "streaming": _switch("data.stream", True), "dataset_streaming": _switch("data.stream", True),
    "assistant_only_loss": _only(True, _ANYWAY), "completion_only_loss": _only(True, _ANYWAY),
    "train_on_prompt": _only(False, _ANYWAY), "use_dft_loss": _dft, "ld_alpha": _ld_alpha,
    **dict.fromkeys(("router_aux_loss_coef", "moe_aux_loss_coef", "aux_loss_coef"), _router_loss),
    "pref_bco_weight": _pref_bco_weight, "loss_type": _average, "importance_sampling_level": _ratio_level,
    "advantage_estimator": _estimator, "epsilon": _clip_low, "cliprange": _clip_low, "eps_clip": _clip_low,
    "epsilon_high": _clip_high, "eps_clip_low_high": _clip_both, "reward_clip_range": _reward_clip,
    "overlong_buffer_len": _overlong, "freezing_actor_steps": _actor_waits, "top_k": _top_k,
    "scale_rewards": _choice("algorithm.scale", {
        True: "group", "true": "group", "group": "group", False: "none", "false": "none", "none": "none",
        "batch": "batch_scores"}),
    "filter_all_incorrect": _switch("algorithm.solved_above", 0.0),
    "use_kl_loss": _switch("algorithm.kl_in", "loss"), "max_new_tokens": _new_tokens, "num_train_epochs": _epochs,
    "num_epochs": _epochs, "max_epochs": _max_epochs, "max_steps": _max_steps, "total_episodes": _episodes,
    "save_steps": _save_steps, "eval_steps": _eval_steps, "logging_steps": _logging_steps,
    "resume_from_checkpoint": _resume, "use_muon": _switch("optimizer.kind", "muon"),
    "use_vllm": _only(False, "rollout.engine: vllm does that here"), "dynamic_filtering": _dynamic_filtering,
    "apply_chat_template": _switch("data.wrap_in_chat", True, False), "policy_loss_type": _loss_kind,
    "dataset_configs": _subset,
    "push_to_hub": _only(False, "`steersman push` uploads the model of a run that has ended"),
}  # fmt: skip
"""By their name, what it says in our keys. What is in none of the tables keeps its value under the key in PEERS."""
