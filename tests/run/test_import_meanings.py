"""`import-recipe`: what is written means here what it means there, and every recipe that is written loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml

from steersman import cli
from steersman.config.load import load_recipe
from steersman.config.peer_names import PEERS
from steersman.verbs.import_recipe import VERBS, guess_verb, read_settings, translate_settings
from steersman.verbs.sft import SFTRecipe

DEVICES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
MEANINGS = [
    # what, settings, the keys that come out, the names that are left out
    ("sft", {"eval_steps": 500, "logging_steps": 10}, {"run.eval_every": 500}, {"logging_steps"}),
    ("sft", {"logging_steps": 10, "eval_strategy": "steps"}, {"run.eval_every": 10}, set()),
    ("sft", {"eval_steps": 500, "eval_strategy": "epoch"}, {}, {"eval_steps", "eval_strategy"}),
    ("sft", {"eval_steps": -1, "save_steps": 0.1}, {}, {"eval_steps", "save_steps"}),
    ("sft", {"warmup_ratio": 0.1, "warmup_steps": 0}, {"optimizer.warmup": 0.1}, set()),
    ("sft", {"warmup_ratio": 0.1, "warmup_steps": 50}, {"optimizer.warmup": 50}, {"warmup_ratio"}),
    ("sft", {"warmup_ratio": 1.0}, {}, {"warmup_ratio"}),
    ("sft", {"router_aux_loss_coef": 0.01}, {"train.router_loss": 0.01}, set()),
    ("kto", {"moe_aux_loss_coef": 0.01}, {"train.router_loss": 0.01, "model.lora": {}}, set()),
    ("dpo", {"aux_loss_coef": 0}, {}, set()),
    ("grpo", {"router_aux_loss_coef": 0.01}, {}, {"router_aux_loss_coef"}),
    ("dpo", {"warmup_steps": 0}, {"optimizer.warmup": 0}, set()),
    ("dpo", {"warmup_ratio": 0.1, "lr_scheduler_type": "constant"},
     {"optimizer.warmup": 0, "optimizer.schedule": "constant"}, {"warmup_ratio"}),
    ("sft", {"lr_scheduler_type": "cosine_with_min_lr"}, {}, {"lr_scheduler_type"}),
    ("sft",
     {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}, "learning_rate": 1e-5},
     {"optimizer.schedule": "cosine", "optimizer.min_lr": pytest.approx(0.1), "optimizer.lr": 1e-5}, set()),
    ("sft", {"output_dir": "out", "resume_from_checkpoint": False}, {"run.dir": "out"}, set()),
    ("dpo", {"sync_ref_model": True}, {"moving_reference": {}}, set()),
    ("dpo", {"sync_ref_model": "true", "ref_model_mixup_alpha": 0.7, "ref_model_sync_steps": 64},
     {"moving_reference": {}, "moving_reference.decay": 0.3, "moving_reference.every": 64}, set()),
    ("kto", {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0},
     {"moving_reference": {}, "moving_reference.decay": 0.0}, set()),
    ("dpo", {"sync_ref_model": True, "ref_model_mixup_alpha": 0, "ref_model_sync_steps": 0.5},
     {"moving_reference": {}}, {"ref_model_mixup_alpha", "ref_model_sync_steps"}),
    ("dpo", {"sync_ref_model": False, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 64}, {},
     {"ref_model_mixup_alpha", "ref_model_sync_steps"}),
    ("grpo", {"sync_ref_model": True, "ref_model_sync_steps": 64}, {}, {"sync_ref_model", "ref_model_sync_steps"}),
    ("sft", {"resume_from_checkpoint": "out/checkpoint-5"}, {}, {"resume_from_checkpoint"}),
    ("ppo", {"rollout_batch_size": 1024, "train_batch_size": 128},
     {"rollout.prompts": 1024, "algorithm.minibatches": 8}, set()),
    ("ppo", {"train_batch_size": 128, "rollout_batch_size": 1024},
     {"rollout.prompts": 1024, "algorithm.minibatches": 8}, set()),
    ("grpo", {"rollout_batch_size": 128, "train_batch_size": 1024, "n_samples_per_prompt": 8},
     {"rollout.prompts": 128, "rollout.samples": 8, "algorithm.minibatches": 1}, set()),
    ("ppo", {"rollout_batch_size": 100, "train_batch_size": 64}, {"rollout.prompts": 100}, {"train_batch_size"}),
    ("ppo", {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "num_mini_batches": 4},
     {"rollout.prompts": 64, "algorithm.minibatches": 4}, {"world_size"}),
    ("ppo", {"num_processes": 2, "per_device_train_batch_size": 64, "num_mini_batches": 2, "total_episodes": 10000},
     {"run.devices": 2, "rollout.prompts": 128, "algorithm.minibatches": 2, "iterations": 79}, set()),
    ("ppo", {"per_device_train_batch_size": 8, "num_mini_batches": 3}, {},
     {"per_device_train_batch_size", "num_mini_batches"}),
    ("ppo", {"stage": "ppo", "per_device_train_batch_size": 16, "gradient_accumulation_steps": 4,
             "ppo_buffer_size": 4},
     {"model.lora": {}, "rollout.prompts": 256, "algorithm.minibatches": 4}, {"world_size"}),
    ("dpo", {"nproc_per_node": 8, **DEVICES}, {"run.devices": 8, "train.batch_size": 64}, set()),
    ("dpo", {"nproc_per_node": 8, "nnodes": 2, **DEVICES}, {"run.devices": 16, "train.batch_size": 128}, {"nnodes"}),
    ("dpo", {"gradient_accumulation_steps": 2}, {"train.batch_size": 16}, {"world_size"}),
    ("sft", {"train_batch_size": 64, "nproc_per_node": 8, "max_epochs": 2},
     {"train.batch_size": 64, "run.devices": 8, "train.epochs": 2}, set()),
    ("grpo", {"num_processes": 2, "num_generations": 4, "steps_per_generation": 4, **DEVICES},
     {"run.devices": 2, "rollout.samples": 4, "rollout.prompts": 8, "algorithm.minibatches": 2}, set()),
    ("grpo", {"num_processes": 1, "num_generations": 3, **DEVICES}, {"run.devices": 1, "rollout.samples": 3},
     set(DEVICES)),
    ("ppo", {"max_epochs": 3}, {"algorithm.epochs": 3}, set()),
    ("ppo", {"zero_stage": 3}, {"parallel.mode": "zero3"}, set()),
    ("ppo", {"zero_stage": 0}, {"parallel.mode": "replicas"}, set()),
    ("sft", {"zero_stage": 2, "bf16": True},
     {"model.dtype": "float32", "parallel.mode": "fsdp", "parallel.compute_dtype": "bfloat16",
      "parallel.reshard": False}, set()),
    ("ppo", {"zero_stage": 3, "param_dtype": "bf16"},
     {"model.dtype": "float32", "parallel.mode": "fsdp", "parallel.compute_dtype": "bfloat16"}, set()),
    ("sft", {"use_muon": True, "optim": "adamw_torch"}, {"optimizer.kind": "muon"}, {"optim"}),
    ("sft", {"use_muon": False, "optim": "adamw_8bit"}, {"optimizer.kind": "adamw-8bit"}, set()),
    ("ppo", {"actor_num_nodes": 2, "actor_num_gpus_per_node": 8, "ref_num_nodes": 2}, {"run.devices": 16},
     {"actor_num_nodes", "ref_num_nodes"}),
    ("dapo", {"dynamic_filtering": True}, {}, set()),
    ("dapo", {"dynamic_filtering": False}, {"algorithm.dynamic_sampling": 0}, set()),
    ("grpo", {"dynamic_filtering": True, "policy_loss_type": "ppo"}, {}, {"dynamic_filtering"}),
    ("gspo", {"policy_loss_type": "gspo", "pretrain": "m"}, {"model.path": "m"}, set()),
    ("grpo", {"policy_loss_type": "gspo"}, {}, {"policy_loss_type"}),
    ("grpo", {"pretrain": "m", "enable_vllm_is_correction": True, "vllm_is_correction_type": "icepop",
              "vllm_is_truncated_threshold": [0.4, 4.0]},
     {"model.path": "m", "rollout.recompute_logp": True, "rollout.correction.kind": "token_masked",
      "rollout.correction.cap": 4.0, "rollout.correction.low": 0.4}, set()),
    ("grpo", {"pretrain": "m", "enable_vllm_is_correction": True, "vllm_is_truncated_threshold": 3.0},
     {"model.path": "m", "rollout.recompute_logp": True, "rollout.correction.kind": "token_truncated",
      "rollout.correction.cap": 3.0}, set()),
    ("grpo", {"pretrain": "m", "enable_vllm_is_correction": False, "vllm_is_correction_type": "icepop"},
     {"model.path": "m", "rollout.recompute_logp": True, "rollout.correction.kind": "none"},
     {"vllm_is_correction_type"}),
    ("grpo", {"pretrain": "m", "enable_vllm_is_correction": True, "vllm_is_correction_type": "seq-mask-tis"},
     {"model.path": "m"}, {"enable_vllm_is_correction", "vllm_is_correction_type"}),
    ("grpo", {"use_vllm": True, "vllm_importance_sampling_mode": "token_mask",
              "vllm_importance_sampling_clip_max": 4.0},
     {"rollout.recompute_logp": True, "rollout.correction.kind": "token_masked", "rollout.correction.cap": 4.0,
      "rollout.correction.low": 0.0}, {"use_vllm"}),
    ("grpo", {"use_vllm": False, "vllm_importance_sampling_cap": 4.0}, {}, {"vllm_importance_sampling_cap"}),
    ("dpo", {"chosen_key": "good", "rejected_key": "bad", "prompt_key": "prompt"},
     {"data.columns": {"prompt": "prompt", "chosen": "good", "rejected": "bad"}}, set()),
    ("dpo", {"chosen_key": "chosen", "rejected_key": "rejected"}, {}, set()),
    ("kto", {"input_key": "instruction", "output_key": "response", "label_key": "score"},
     {"data.columns": {"prompt": "instruction", "completion": "response", "label": "score"}}, set()),
    ("grpo", {"input_key": "messages", "label_key": "gold", "apply_chat_template": True},
     {"data.columns": {"prompt": "messages"}, "data.wrap_in_chat": True}, {"label_key"}),
    ("sft", {"input_key": "turns", "apply_chat_template": True},
     {"data.columns": {"messages": "turns"}, "data.wrap_in_chat": True}, set()),
    ("sft", {"input_key": "q", "output_key": ["a"]}, {"data.columns": {"prompt": "q"}}, {"output_key"}),
    ("sft", {"dataset_text_field": "body", "dataset_configs": ["all"]},
     {"data.columns": {"text": "body"}, "data.subset": "all"}, set()),
    ("sft", {"dataset_configs": ["a", "b"], "push_to_hub": True}, {}, {"dataset_configs", "push_to_hub"}),
    ("sft", {"fsdp": "", "max_steps": -1, "num_train_epochs": 3.0}, {"train.epochs": 3.0}, set()),
    ("sft", {"max_steps": 40, "num_train_epochs": 3.0}, {"train.max_steps": 40, "train.epochs": 40},
     {"num_train_epochs"}),
    ("grpo", {"max_steps": 40, "num_iterations": 2}, {"iterations": 20, "algorithm.epochs": 2}, set()),
    ("sft", {"fsdp": "shard_grad_op auto_wrap offload"},
     {"parallel.mode": "fsdp", "parallel.reshard": False, "parallel.offload": True}, set()),
    ("sft", {"fsdp": "hybrid_shard"}, {}, {"fsdp"}),
    ("sft", {"deepspeed": "ds_z3.json", "torch_dtype": "auto", "fp16": True}, {},
     {"deepspeed", "torch_dtype", "fp16"}),
    ("sft", {"torch_dtype": "float32", "bf16": True}, {"model.dtype": "bfloat16"}, {"torch_dtype"}),
    ("sft", {"max_grad_norm": 0.0, "save_total_limit": None}, {}, {"max_grad_norm", "save_total_limit"}),
    ("sft", {"packing": True}, {}, {"packing"}),
    ("sft", {"packing": True, "max_length": 512, **DEVICES}, {"train.pack": 512, "data.max_length": 512},
     set(DEVICES)),
    ("sft", {"stage": "sft", "neat_packing": True, "packing": True, "cutoff_len": 512, **DEVICES},
     {"model.lora": {}, "train.pack": 512, "data.max_length": 512}, set(DEVICES)),
    ("sft", {"neat_packing": True, "cutoff_len": 512, **DEVICES},
     {"model.lora": {}, "train.pack": 512, "data.max_length": 512}, set(DEVICES)),
    ("sft", {"stage": "sft", "packing": True, "cutoff_len": 512}, {"model.lora": {}, "data.max_length": 512},
     {"packing"}),
    ("sft", {"packing": False, "disable_gradient_checkpointing": True}, {"model.gradient_checkpointing": False},
     set()),
    ("sft", {"use_peft": True, "lora_r": 4},
     {"model.lora": {}, "model.lora.r": 4, "model.lora.alpha": 32, "model.lora.dropout": 0.05},
     {"lora_target_modules"}),
    ("sft", {"lora_r": 4}, {}, {"lora_r"}),
    ("sft", {"stage": "sft", "finetuning_type": "full", "lora_rank": 4}, {}, {"lora_rank"}),
    ("sft", {"pretrain": "m", "lora_rank": 0, "lora_alpha": 16}, {"model.path": "m"}, {"lora_alpha"}),
    ("sft", {"pretrain": "m", "lora_rank": 4},
     {"model.path": "m", "model.lora": {}, "model.lora.r": 4, "model.lora.alpha": 16}, set()),
    ("kto", {"desirable_weight": 1.33, "loss_type": "kto"}, {"loss.desirable_weight": 1.33}, set()),
    ("kto", {"kto_rejected_weight": 2.0}, {"loss.undesirable_weight": 2.0}, set()),
    ("kto", {"train_batch_size": 1}, {}, {"train_batch_size"}),
    ("ppo", {"gamma": 0.99, "lam": 0.9, "missing_eos_penalty": 1.0},
     {"algorithm.gamma": 0.99, "algorithm.lam": 0.9, "reward.missing_eos_penalty": 1.0}, set()),
    ("ppo", {"lambd": 0.9, "vf_coef": 0.1}, {"algorithm.lam": 0.9}, {"vf_coef"}),
    ("ppo", {"learning_rate": 3e-6}, {"optimizer.lr": 3e-6, "critic.optimizer.lr": 3e-6}, set()),
    ("ppo", {"actor_learning_rate": 1e-6, "critic_learning_rate": 9e-6, "l2": 0.1},
     {"optimizer.lr": 1e-6, "critic.optimizer.lr": 9e-6, "optimizer.weight_decay": 0.1,
      "critic.optimizer.weight_decay": 0.1}, set()),
    ("grpo", {"min_p": 0.05, "top_k": -1, "temperature": 0}, {"rollout.min_p": 0.05, "rollout.top_k": 0},
     {"temperature"}),
    ("grpo", {"scale_rewards": "batch", "loss_type": "dr_grpo"},
     {"algorithm.scale": "batch_scores", "algorithm.average": "episode"}, set()),
    ("grpo", {"loss_type": "cispo"}, {}, {"loss_type"}),
    ("vespo", {"loss_type": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "vespo_k_neg": 4.0,
               "vespo_lambda_neg": 1.0, "importance_sampling_level": "token", "scale_rewards": "none"},
     {"algorithm.k_positive": 1.5, "algorithm.lambda_positive": 2.5, "algorithm.k_negative": 4.0,
      "algorithm.lambda_negative": 1.0, "algorithm.scale": "none"}, set()),
    ("grpo", {"loss_type": "vespo", "vespo_k_pos": 1.5}, {}, {"loss_type", "vespo_k_pos"}),
    ("luspo", {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 2e-3,
               "epsilon_high": 2.5e-3},
     {"algorithm.clip_low": 2e-3, "algorithm.clip_high": 2.5e-3}, set()),
    ("a2po", {"beta1": 0.4, "beta2": 2e-3, "num_value_samples": 4, "filter_all_incorrect": True,
              "per_device_train_batch_size": 16, "num_processes": 1},
     {"algorithm.value_beta": 0.4, "algorithm.beta": 2e-3, "algorithm.value_samples": 4,
      "algorithm.solved_above": 0.0, "rollout.prompts": 16, "run.devices": 1}, set()),
    ("a2po", {"beta2": 1e-3}, {"algorithm.beta": 1e-3, "algorithm.solved_above": 0.0}, set()),
    ("a2po", {"beta2": 1e-3, "filter_all_incorrect": False}, {"algorithm.beta": 1e-3}, set()),
    ("grpo", {"beta1": 0.4, "filter_all_incorrect": True}, {}, {"beta1", "filter_all_incorrect"}),
    ("grpo", {"loss_type": "luspo"}, {"algorithm.average": "episode"}, set()),
    ("luspo", {"loss_type": "luspo"}, {}, {"loss_type"}),
    ("gspo", {"loss_type": "luspo", "importance_sampling_level": "sequence"}, {}, {"loss_type"}),
    ("grpo", {"top_entropy_quantile": 0.2, "off_policy_mask_threshold": 0.5},
     {"algorithm.top_entropy": 0.2, "algorithm.off_policy_threshold": 0.5}, set()),
    ("grpo", {"top_entropy_quantile": 0.0, "off_policy_mask_threshold": None}, {}, {"top_entropy_quantile"}),
    ("gspo", {"top_entropy_quantile": 0.2}, {}, {"top_entropy_quantile"}),
    ("sapo", {"loss_type": "sapo", "sapo_temperature_pos": 1.1, "sapo_temperature_neg": 1.2},
     {"algorithm.tau_positive": 1.1, "algorithm.tau_negative": 1.2}, set()),
    ("cispo", {"epsilon_high": 5.0, "epsilon": 0.2}, {"algorithm.clip_high": 4.0}, {"epsilon"}),
    ("grpo", {"epsilon": 0.2, "epsilon_high": 0.28}, {"algorithm.clip_low": 0.2, "algorithm.clip_high": 0.28}, set()),
    ("grpo", {"init_kl_coef": 0.01, "kl_target": 6.0},
     {"algorithm.beta": 0.01, "algorithm.kl_in": "reward", "algorithm.kl_estimator": "k1"}, {"kl_target"}),
    ("dpo", {"loss_type": "hinge"}, {"loss.name": "rso"}, set()),
    ("dpo", {"loss_type": "sigmoid_norm"}, {"loss.name": "dpo_norm", "loss.settings.beta": 0.1}, set()),
    ("dpo", {"loss_type": ["exo_pair"], "label_smoothing": 0.01},
     {"loss.name": "exo", "loss.settings.epsilon": 0.01}, set()),
    ("dpo", {"loss_type": "discopop"}, {"loss.name": "discopop", "loss.settings.beta": 0.1}, set()),
    ("dpo", {"loss_type": "apo_zero", "beta": 0.2}, {"loss.name": "apo_zero", "loss.settings.beta": 0.2}, set()),
    ("dpo", {"f_divergence_type": "forward_kl"}, {"loss.name": "fdpo_alpha", "loss.settings.alpha": 1.0}, set()),
    ("dpo", {"f_divergence_type": "js_divergence", "beta": 0.3},
     {"loss.name": "fdpo_js", "loss.settings.beta": 0.3}, set()),
    ("dpo", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
     {"loss.name": "fdpo_alpha", "loss.settings.alpha": pytest.approx(0.3)}, set()),
    ("dpo", {"f_divergence_type": "reverse_kl"}, {}, set()),
    ("dpo", {"loss_type": "apo_zero", "f_divergence_type": "forward_kl"}, {"loss.name": "apo_zero"},
     {"f_divergence_type"}),
    ("dpo", {"loss_type": "aot", "label_smoothing": 0.1},
     {"loss.name": "aot", "loss.settings.label_smoothing": 0.1}, set()),
    ("dpo", {"loss_type": "aot_unpaired", "beta": 0.2}, {"loss.name": "aot_unpaired", "loss.settings.beta": 0.2},
     set()),
    ("dpo", {"loss_type": "aot_pair"}, {"loss.name": "aot_unpaired"}, set()),
    ("dpo", {"loss_type": "newest"}, {}, {"loss_type"}),
    ("dpo", {"tpo_alpha": 0.5, "beta": 0.02},
     {"loss.name": "cpo", "loss.settings.beta": 0.02, "loss.settings.nll_weight": 0.0, "loss.gold_nll": 0.5,
      "data.columns": {"gold": "reference"}}, set()),
    ("dpo", {"loss_type": "tpo-l", "tpo_l_gamma": 1.6},
     {"loss.name": "simpo", "loss.settings.beta": 0.01, "loss.settings.margin": 1.6, "loss.gold_nll": 1.0,
      "data.columns": {"gold": "reference"}}, set()),
    ("dpo", {"loss_type": "hinge", "tpo_alpha": 0.0, "tpo_l_gamma": 0.5},
     {"loss.name": "hinge", "loss.settings.beta": 0.01, "loss.gold_nll": 0.0}, {"tpo_l_gamma"}),
    ("dpo", {"loss_type": "ipo", "tpo_alpha": 1.0}, {}, {"loss_type", "tpo_alpha"}),
    ("dpo", {"command": "tpo.py", "label_smoothing": 0.1},
     {"loss.name": "cpo", "loss.settings.beta": 0.01, "loss.settings.nll_weight": 0.0, "loss.gold_nll": 1.0,
      "data.columns": {"gold": "reference"}}, {"label_smoothing"}),
    ("sft", {"loss_type": "dft"}, {"train.loss": "dft"}, set()),
    ("sft", {"loss_type": "chunked_nll"}, {}, set()),
    ("sft", {"loss_type": "asft"}, {}, {"loss_type"}),
    ("sft", {"use_dft_loss": True, "finetuning_type": "full"}, {"train.loss": "dft"}, set()),
    ("reward", {"use_dft_loss": True, "finetuning_type": "full"}, {}, {"use_dft_loss"}),
    ("dpo", {"loss_type": "sigmoid", "ld_alpha": 0.5}, {"loss.name": "dpo", "loss.ld_alpha": 0.5}, set()),
    ("dpo", {"loss_type": "sigmoid_norm", "ld_alpha": 0.5}, {"loss.name": "dpo_norm", "loss.settings.beta": 0.1},
     {"ld_alpha"}),
    ("dpo", {"ld_alpha": 0.5, "pref_loss": "sigmoid", "finetuning_type": "full"}, {"loss.name": "dpo"}, {"ld_alpha"}),
    ("kto", {"loss_type": "apo_zero_unpaired", "beta": 0.2}, {"loss.name": "apo_zero_unpaired", "loss.beta": 0.2},
     set()),
    ("kto", {"loss_type": "kto"}, {}, set()),
    ("dpo", {"loss_type": "bco_pair"}, {"loss.name": "bco_pair"}, set()),
    ("dpo", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
     {"loss.name": "dpo", "loss.weight": 0.8, "loss.also": {"bco_pair": 0.2}, "loss.nll": 1.0}, set()),
    ("dpo", {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [1, 0], "beta": 0.3},
     {"loss.name": "dpo", "loss.settings.beta": 0.3}, set()),
    ("dpo", {"loss_type": ["robust", "exo_pair"], "label_smoothing": 0.1, "f_divergence_type": "js_divergence"},
     {"loss.name": "robust_dpo", "loss.also": {"exo": 1}, "loss.settings.flip": 0.1, "loss.settings.epsilon": 0.1},
     {"f_divergence_type"}),
    ("dpo", {"loss_type": ["sigmoid", "sft"], "f_divergence_type": "js_divergence"},
     {"loss.name": "fdpo_js", "loss.nll": 1}, set()),
    ("dpo", {"loss_type": ["sigmoid", "newest"], "loss_weights": [1, 2], "beta": 0.2}, {},
     {"loss_type", "loss_weights", "beta"}),
    ("dpo", {"loss_type": ["sigmoid"], "loss_weights": [0.5]}, {"loss.name": "dpo"}, {"loss_weights"}),
    ("dpo", {"loss_type": ["sigmoid", "ipo"], "loss_weights": [0.5, -1]}, {}, {"loss_type", "loss_weights"}),
    ("dpo", {"pref_loss": "sigmoid", "pref_bco_weight": 0.5, "finetuning_type": "full"}, {"loss.name": "dpo"},
     {"pref_bco_weight"}),
    ("sft", {"loss_weights": [1, 2]}, {}, {"loss_weights"}),
    ("dpo", {"loss_type": "ipo"}, {"loss.name": "ipo", "loss.settings.length_normalised": 1.0}, set()),
    ("dpo", {"pref_loss": "orpo", "pref_beta": 0.2, "finetuning_type": "full"},
     {"loss.name": "orpo", "loss.settings.weight": 0.2}, set()),
    ("dpo", {"pref_loss": "simpo", "simpo_gamma": 1.0, "finetuning_type": "full"},
     {"loss.name": "simpo", "loss.settings.beta": 0.1, "loss.settings.margin": 1.0}, set()),
    ("dpo", {"loss_type": "robust", "label_smoothing": 0.1}, {"loss.name": "robust_dpo", "loss.settings.flip": 0.1},
     set()),
    ("dpo", {"loss_type": "ipo", "label_smoothing": 0.1},
     {"loss.name": "ipo", "loss.settings.length_normalised": 1.0}, {"label_smoothing"}),
    ("dpo", {"num_generations": 4, "max_completion_length": 64}, {}, {"num_generations", "max_completion_length"}),
    ("dpo", {"report_to": ["wandb", "clearml"], "trust_remote_code": True}, {"run.sinks": ["wandb"]},
     {"report_to", "trust_remote_code"}),
    ("dpo", {"epochs": 2}, {}, {"epochs"}),
    ("sft", {"assistant_only_loss": True, "completion_only_loss": False}, {}, {"completion_only_loss"}),
    ("sft", {"learning_rate": 1e-5, "lr": 2e-5}, {"optimizer.lr": 1e-5}, {"lr"}),
    ("sft", {"model": "b", "model_name_or_path": "a"}, {"model.path": "a"}, {"model"}),
    ("ppo", {"model_name_or_path": "a", "sft_model_path": "b"}, {"model.path": "b"}, {"model_name_or_path"}),
    ("grpo", {"reward_funcs": ["r.py:f", "rewards.g"], "reward_weights": [1, 2]},
     {"reward.parts": {"score0": {"function": "r.py:f", "weight": 1},
                       "score1": {"function": "rewards:g", "weight": 2}}},
     set()),
    ("sft", {"optimizer": 3, "seed": -1, "save_steps": "often"}, {}, {"optimizer", "seed", "save_steps"}),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "settings", "keys", "left"), MEANINGS)
def test_what_is_written_means_the_same_and_what_is_not_is_named(verb, settings, keys, left, tmp_path):
    found, why = translate_settings(settings, verb)
    assert found == keys
    assert set(why) == left
    assert all(why.values())
    file, out = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    file.write_text(yaml.safe_dump(settings))
    refused = bool(left) and not keys
    assert cli.main(["import-recipe", str(file), "--verb", verb, "--out", str(out)]) == (2 if refused else 0)
    if not refused:
        load_recipe(VERBS[verb], out, ["--model.path", "m", "--data.path", "d"])


@pytest.mark.parametrize(("verb", "settings", "keys", "left"), MEANINGS)
def test_the_order_of_the_settings_decides_nothing(verb, settings, keys, left):
    found, why = translate_settings(dict(reversed(settings.items())), verb)
    assert (found, set(why)) == (keys, left)


ODD = [-1, 0, 1e9, True, "", "auto", [], {"a": 1}, float("nan")]


@pytest.mark.parametrize("place", range(len(ODD)))
def test_no_value_of_any_name_makes_a_recipe_that_does_not_load(place):
    """Each name with an odd value, another one in each turn: what is written loads."""
    for number, name in enumerate(PEERS):
        verb = ("sft", "dpo", "ppo", "grpo")[(number // len(ODD) + place) % 4]
        keys, _ = translate_settings({name: ODD[(number + place) % len(ODD)]}, verb)
        if keys:
            words = [f"--{key}={json.dumps(value)}" for key, value in keys.items()]
            stand_ins = [f"--{key}=x" for key in ("model.path", "data.path") if key not in keys]
            load_recipe(VERBS[verb], None, [*words, *stand_ins])


COMMANDS = {
    "accelerate launch trl/scripts/sft.py --lora_target_modules q_proj k_proj v_proj --use_peft --learning_rate 1e-4":
        ("sft", {"lora_target_modules": ["q_proj", "k_proj", "v_proj"], "use_peft": True, "learning_rate": 1e-4}),
    "trl grpo --reward_funcs a.f b.g --num_generations 8":
        ("grpo", {"reward_funcs": ["a.f", "b.g"], "num_generations": 8}),
    "accelerate launch --config_file z.yaml trl/scripts/grpo.py --beta 0.04 -1":
        ("grpo", {"config_file": "z.yaml", "beta": [0.04, -1]}),
    "trl grpo --loss_type vespo --vespo_k_neg 3.0": ("vespo", {"loss_type": "vespo", "vespo_k_neg": 3.0}),
    "trl grpo --loss_type luspo --importance_sampling_level sequence":
        ("luspo", {"loss_type": "luspo", "importance_sampling_level": "sequence"}),
    "trl grpo --loss_type luspo": ("grpo", {"loss_type": "luspo"}),
    "trl grpo --loss_type dr_grpo": ("grpo", {"loss_type": "dr_grpo"}),
    "deepspeed --module openrlhf.cli.train_kto --beta 0.1": ("kto", {"beta": 0.1}),
    "torchrun --nproc_per_node 8 dpo/train_rm.py --bf16 > log 2>&1": ("reward", {"nproc_per_node": 8, "bf16": True}),
    "trl sft --eos_token '<|im_end|>' --bos_token \"> a\" --pad_token \\<pad\\> --use_peft --lora_r 32":
        ("sft", {"eos_token": "<|im_end|>", "bos_token": "> a", "pad_token": "<pad>", "use_peft": True,
                 "lora_r": 32}),
    "trl sft --lora_r 4 2>> 'a log' </dev/null --use_peft &> \"all 1\" --seed 2 > >(tee a.log) 2>&1 | tee --append b":
        ("sft", {"lora_r": 4, "use_peft": True, "seed": 2}),
    "torchrun --nproc-per-node=8 -m openrlhf.cli.train_sft --l2 0.1": ("sft", {"nproc_per_node": 8, "l2": 0.1}),
    "ray job submit --address=x -- python3 -m openrlhf.cli.train_ppo_ray --advantage_estimator group_norm":
        ("grpo", {"address": "x", "advantage_estimator": "group_norm"}),
    "set -x\nread -r -d '' words <<EOF\n"
    "openrlhf.cli.train_dpo \\\n --adam_betas 0.9 0.95 \\\n --packing_samples\nEOF\n"
    "# it's\ndeepspeed --module $words": ("dpo", {"adam_betas": [0.9, 0.95], "packing_samples": True}),
    "trl a2po --beta1 0.4 --beta2 0.001": ("a2po", {"beta1": 0.4, "beta2": 0.001}),
    "python train.py --num_value_samples 4": ("a2po", {"num_value_samples": 4}),
    "trl orpo --beta 0.2": ("dpo", {"beta": 0.2}),
}  # fmt: skip


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_line_keeps_its_lists_and_names_its_verb(line, tmp_path):
    file = tmp_path / "run.sh"
    file.write_text(line)
    verb, expected = COMMANDS[line]
    settings = read_settings(file)
    assert guess_verb(settings) == verb
    settings.pop("command")
    assert settings == expected


@pytest.mark.parametrize("line", ["trl online_dpo.py --beta 0.1", "python gkd.py --beta 0.5", "python x.py --beta 1"])
def test_a_program_without_a_verb_here_takes_none(line, tmp_path, capsys):
    file = tmp_path / "run.sh"
    file.write_text(line)
    assert cli.main(["import-recipe", str(file)]) == 2
    assert "nothing in the file tells what it trains" in capsys.readouterr().err


def test_the_program_says_the_loss_and_a_variable_is_no_value(tmp_path, capsys):
    file = tmp_path / "run.sh"
    file.write_text("trl orpo --beta 0.2 --output_dir $OUT --use_wandb sk-secret")
    assert cli.main(["import-recipe", str(file)]) == 0
    told = capsys.readouterr().out
    assert yaml.safe_load(told) == {
        "loss": {"name": "orpo", "settings": {"weight": 0.2}},
        "run": {"sinks": ["wandb"]},
        "train": {"batch_size": 8, "epochs": 3.0},
        "optimizer": {"lr": 1e-6, "warmup": 0},
        "data": {"max_length": 1024},
    }
    assert "# output_dir: is a variable of the shell" in told
    assert "secret" not in told


def test_several_command_lines_and_none_are_refused(tmp_path, capsys):
    file = tmp_path / "run.sh"
    for text, said in (("trl sft --a 1\ntrl dpo --a 1", "several command lines"), ("trl sft x.yaml", "no command")):
        file.write_text(text)
        assert cli.main(["import-recipe", str(file)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("line", ["trl sft --output_dir <path> --lora_r 4", "trl sft --lora_r 4 --output_dir <path>"])
def test_a_placeholder_that_the_shell_would_redirect_is_refused(line, tmp_path, capsys):
    file = tmp_path / "run.sh"
    file.write_text(line)
    assert cli.main(["import-recipe", str(file)]) == 2
    assert "put quotation marks around a value that has < or >" in " ".join(capsys.readouterr().err.split())


def test_one_import_leaves_nothing_to_the_next(tmp_path, capsys):
    file = tmp_path / "theirs.yaml"
    for rank in ("lora_r: 4", ""):
        file.write_text(f"use_peft: true\n{rank}\nlora_alpha: 8\nlora_dropout: 0\n")
        assert cli.main(["import-recipe", str(file), "--verb", "sft"]) == 0
        lora = yaml.safe_load(capsys.readouterr().out)["model"]["lora"]
        assert lora == {"r": 4 if rank else 16, "alpha": 8, "dropout": 0}
    assert translate_settings({"use_peft": True}, "sft")[0]["model.lora"] == {}


def test_settings_beyond_the_encoding_of_the_output_are_escaped(tmp_path):
    file, out = tmp_path / "réglages.yaml", tmp_path / "ours.yaml"
    file.write_text("model_name_or_path: café\ndataset_name: '\u202e1e-5'\nclé: 1\nlr: 1.0\n", encoding="utf-8")
    command = [sys.executable, "-m", "steersman", "import-recipe", str(file), "--verb", "sft"]
    told = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=120)
    assert told.returncode == 0, told.stderr
    assert told.stdout.isascii()
    out.write_bytes(told.stdout)
    recipe = load_recipe(SFTRecipe, out)
    assert recipe.model.path == "café"
    assert recipe.data.path == "\u202e1e-5"
