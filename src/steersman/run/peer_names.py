"""Names of settings in other toolkits (TRL, LLaMA-Factory, transformers' trainer) and what is the same here.

They are told, not taken: a setting has one name, and a recipe that is read later says what it means.
"""

from __future__ import annotations

from collections.abc import Collection

PEERS: dict[str, tuple[tuple[str, ...], str]] = {
    "learning_rate": (("optimizer.lr",), ""),
    "lr": (("optimizer.lr",), ""),
    "lr_scheduler_type": (("optimizer.schedule",), "constant, linear or cosine"),
    "warmup_ratio": (("optimizer.warmup",), "a share of the updates"),
    "warmup_steps": (("optimizer.warmup",), "see its help for shares and counts"),
    "weight_decay": (("optimizer.weight_decay",), ""),
    "adam_beta1": (("optimizer.beta1",), ""),
    "adam_beta2": (("optimizer.beta2",), ""),
    "adam_epsilon": (("optimizer.eps",), ""),
    "max_grad_norm": (("optimizer.max_grad_norm",), ""),
    "num_train_epochs": (
        ("train.epochs", "iterations", "rounds"),
        "passes: of on-policy verbs through the loop",
    ),
    "max_steps": (("train.max_steps", "iterations", "rounds"), "in iterations or rounds where there are such"),
    "per_device_train_batch_size": (
        ("train.batch_size", "rollout.prompts"),
        "rows (or prompts) of a whole update; what fits the memory is run.micro_tokens, in tokens",
    ),
    "train_batch_size": (("train.batch_size", "rollout.prompts"), ""),
    "gradient_accumulation_steps": (
        ("train.batch_size", "rollout.prompts"),
        "the whole batch of an update; it is split by run.micro_tokens, with the same gradient",
    ),
    "num_generations": (("rollout.samples", "samples.prompts"), "responses per prompt"),
    "max_completion_length": (("rollout.max_new_tokens", "samples.max_new_tokens"), "tokens"),
    "max_new_tokens": (("rollout.max_new_tokens", "samples.max_new_tokens"), "tokens"),
    "response_length": (("rollout.max_new_tokens", "samples.max_new_tokens"), "tokens"),
    "max_prompt_length": (("data.max_prompt_tokens",), "tokens"),
    "max_length": (("data.max_length",), "prompt and response, in tokens"),
    "max_seq_length": (("data.max_length",), "prompt and response, in tokens"),
    "cutoff_len": (("data.max_length",), "prompt and response, in tokens"),
    "packing": (("train.pack",), ""),
    "temperature": (("rollout.temperature",), ""),
    "top_p": (("rollout.top_p",), ""),
    "top_k": (("rollout.top_k",), ""),
    "beta": (("algorithm.beta", "loss.beta", "loss.settings.beta"), ""),
    "kl_coef": (("algorithm.beta",), ""),
    "pref_beta": (("loss.beta", "loss.settings.beta"), ""),
    "loss_type": (("loss.name", "train.loss"), ""),
    "pref_loss": (("loss.name",), ""),
    "epsilon": (("algorithm.clip_low",), "and algorithm.clip_high"),
    "epsilon_high": (("algorithm.clip_high",), ""),
    "cliprange": (("algorithm.clip_low",), "and algorithm.clip_high"),
    "vf_coef": (("critic.vf_coef",), ""),
    "num_ppo_epochs": (("algorithm.epochs",), ""),
    "num_iterations": (("algorithm.epochs",), "passes over the samples of one iteration"),
    "num_mini_batches": (("algorithm.minibatches",), ""),
    "output_dir": (("run.dir",), ""),
    "model_name_or_path": (("model.path",), ""),
    "model": (("model.path",), ""),
    "adapter_name_or_path": (("model.path",), "a folder of adapters loads on the model that it names"),
    "ref_model": (("reference",), ""),
    "reward_model_path": (("reward.parts",), "such as '{score: {model: PATH}}'"),
    "reward_funcs": (("reward.parts",), "such as '{score: {function: my_rewards.py:score}}'"),
    "dataset_name": (("data.path",), ""),
    "dataset": (("data.path",), ""),
    "dataset_config": (("data.subset",), ""),
    "dataset_train_split": (("data.hub_split",), ""),
    "max_samples": (("data.limit",), ""),
    "val_size": (("data.held_out",), ""),
    "bf16": (("model.dtype",), "bfloat16"),
    "fp16": (("model.dtype",), "float16"),
    "torch_dtype": (("model.dtype",), ""),
    "dtype": (("model.dtype",), ""),
    "attn_implementation": (("model.attention",), ""),
    "gradient_checkpointing": (("model.gradient_checkpointing",), ""),
    "use_peft": (("model.lora",), "'{}', or any of its settings"),
    "finetuning_type": (("model.lora",), "'{}', or any of its settings"),
    "lora_r": (("model.lora.r",), ""),
    "lora_rank": (("model.lora.r",), ""),
    "lora_alpha": (("model.lora.alpha",), ""),
    "lora_target_modules": (("model.lora.targets",), ""),
    "lora_target": (("model.lora.targets",), ""),
    "save_steps": (("run.save_every",), ""),
    "save_total_limit": (("run.keep_last",), ""),
    "eval_steps": (("run.eval_every",), ""),
    "logging_steps": (("run.eval_every",), "numbers are logged at every step; this is how often held-out data are"),
    "report_to": (("run.sinks",), "such as '[tensorboard]'"),
    "seed": (("run.seed",), ""),
    "optim": (("optimizer.kind",), "adamw, adamw-8bit, adafactor, lion or muon"),
    "quantization_bit": (("model.quantise",), "nf4 or int8"),
    "load_in_4bit": (("model.quantise",), "nf4"),
    "load_in_8bit": (("model.quantise",), "int8"),
    "lora_dropout": (("model.lora.dropout",), ""),
    "use_dora": (("model.lora.dora",), ""),
    "use_rslora": (("model.lora.rslora",), ""),
    "modules_to_save": (("model.lora.train_whole",), ""),
    "pretrain": (("model.path",), ""),
    "save_path": (("run.dir",), ""),
    "max_len": (("data.max_length",), "prompt and response, in tokens"),
    "actor_learning_rate": (("optimizer.lr",), ""),
    "critic_learning_rate": (("critic.optimizer.lr",), ""),
    "init_kl_coef": (("algorithm.beta",), ""),
    "n_samples_per_prompt": (("rollout.samples",), "responses per prompt"),
    "rollout_batch_size": (("rollout.prompts",), "prompts of an iteration"),
    "eps_clip": (("algorithm.clip_low",), "and algorithm.clip_high"),
    "prompt_data": (("data.path",), ""),
    "reward_pretrain": (("reward.parts",), "such as '{score: {model: PATH}}'"),
    "generate_max_len": (("rollout.max_new_tokens",), "tokens"),
    "prompt_max_len": (("data.max_prompt_tokens",), "tokens"),
    "deepspeed": (("parallel.mode",), "fsdp lays weights, gradients and optimizer in pieces, as ZeRO 3 does"),
    "engine": (
        ("parallel.mode",),
        "DeepSpeed is not there; fsdp lays weights and optimizer in pieces, as ZeRO 3 does",
    ),
    "zero_stage": (("parallel.mode",), "replicas is stage 0, fsdp is stage 3"),
    "fsdp": (("parallel.mode",), "fsdp"),
    "nproc_per_node": (("run.devices",), ""),
    "resume_from_checkpoint": (("run.dir",), "with the flag --resume"),
}
"""Their name: the keys that may stand for it here, the first that a verb has, and what to know about it."""

FREE = {"loss.settings.beta": "loss.settings"}
"""Keys inside a mapping that no recipe class lists: the mapping that they are in."""


def peer_hint(key: str, known: Collection[str]) -> str | None:
    """What to write in the place of another toolkit's `key`; None where no key of the verb stands for it."""
    keys, note = PEERS.get(key.rsplit(".", 1)[-1].lower(), ((), ""))
    ours = next((k for k in keys if FREE.get(k, k) in known), None)
    return None if ours is None else f"here it is {ours}{f' ({note})' if note else ''}"
