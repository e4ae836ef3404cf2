"""What the toolkits take where a file gives no value, for the settings that change what is learned.

Looked up in TRL 1.16 (its configurations, which build on transformers 5.23's) and in copies of OpenRLHF
(`openrlhf/cli/train_*.py`) and LLaMA-Factory (`hparams/`, and its PPO trainer, on TRL 0.9.6) without a number of
a release. Releases differ, which is why a recipe names the keys that come from here.
"""

from __future__ import annotations

from typing import Any

from steersman.config.peer_names import PEERS
from steersman.verbs.peers.settings import ABOVE, script_words, toolkit_of

TOOLKITS = {"trl": "TRL 1.16", "openrlhf": "OpenRLHF", "llamafactory": "LLaMA-Factory"}
"""What they are called, with the release where the one that was looked up has a number."""
_TRAINER: dict[str, Any] = {
    "lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999,
    "max_grad_norm": 1.0, "num_train_epochs": 3.0, "per_device_train_batch_size": 8,
}  # fmt: skip
_PAIRS = {**_TRAINER, "learning_rate": 1e-6, "beta": 0.1, "max_length": 1024}
_GROUPS = {
    **_TRAINER, "learning_rate": 1e-6, "beta": 0.0, "num_iterations": 1, "max_completion_length": 512,
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "importance_sampling_level": "token",
}  # fmt: skip
_CORRECTED = {"vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": 3.0}
_CLIPPED = {**_GROUPS, "epsilon": 0.2}
_TRL: dict[str, dict[str, Any]] = {
    "sft": {**_TRAINER, "learning_rate": 2e-5, "max_length": 1024},
    "reward": {**_TRAINER, "learning_rate": 1e-4, "max_length": 1024},
    "dpo": _PAIRS,
    "kto": {**_PAIRS, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "grpo": {**_CLIPPED, "loss_type": "dapo", "scale_rewards": "group"},
    "gspo": {**_CLIPPED, "loss_type": "dapo", "scale_rewards": "group", "importance_sampling_level": "sequence"},
    "luspo": {**_CLIPPED, "importance_sampling_level": "sequence"},
    "dapo": _CLIPPED,
    "dr-grpo": _CLIPPED,
    **dict.fromkeys(("cispo", "sapo", "vespo", "gmpo"), _GROUPS),
    "rloo": {**_GROUPS, "beta": 0.05},
    "a2po": {
        **_TRAINER, "learning_rate": 5e-5, "beta1": 0.5, "beta2": 0.001, "num_value_samples": 8,
        "max_completion_length": 256, "max_prompt_length": 512, "temperature": 1.0, "top_p": 1.0,
    },
    "ppo": {
        **_TRAINER, "num_ppo_epochs": 4, "whiten_rewards": False, "kl_coef": 0.05, "kl_estimator": "k1",
        "cliprange": 0.2, "cliprange_value": 0.2, "gamma": 1.0, "lam": 0.95,
    },
    "distill": {
        **_TRAINER, "learning_rate": 5e-5, "max_completion_length": 256, "max_prompt_length": 512, "temperature": 1.0,
        "top_p": 1.0,
    },
}  # fmt: skip
"""By verb. PPO is not in TRL 1.16: its numbers are those of older releases, and its rate is not among them."""
_OPENRLHF_ALL: dict[str, Any] = {
    "lr_scheduler": "cosine_with_min_lr", "lr_warmup_ratio": 0.03, "l2": 0.0, "adam_betas": [0.9, 0.95],
    "max_norm": 1.0, "train_batch_size": 128, "max_epochs": 1,
}  # fmt: skip
_OPENRLHF_RL: dict[str, Any] = {
    **_OPENRLHF_ALL, "actor_learning_rate": 1e-6, "critic_learning_rate": 9e-6, "rollout_batch_size": 1024,
    "n_samples_per_prompt": 1, "generate_max_len": 1024, "prompt_max_len": 1024, "temperature": 1.0, "top_p": 1.0,
    "init_kl_coef": 0.01, "kl_estimator": "k1", "gamma": 1.0, "lambd": 1.0, "eps_clip": 0.2, "value_clip": 0.5,
    "reward_clip_range": [-10, 10], "apply_chat_template": False,
}  # fmt: skip
_OPENRLHF: dict[str, dict[str, Any]] = {
    "sft": {**_OPENRLHF_ALL, "learning_rate": 5e-6, "max_epochs": 2, "max_len": 2048},
    "reward": {**_OPENRLHF_ALL, "learning_rate": 9e-6, "max_len": 512},
    "dpo": {**_OPENRLHF_ALL, "learning_rate": 1e-5, "beta": 0.1, "max_len": 512},
    "kto": {**_OPENRLHF_ALL, "learning_rate": 1e-5, "beta": 0.01, "max_len": 2048, "desirable_loss_weight": 1.0,
            "undesirable_loss_weight": 1.0},
    **dict.fromkeys(("ppo", "reinforce++", "reinforce++-baseline", "rloo", "gspo"), _OPENRLHF_RL),
    **{verb: {**_OPENRLHF_RL, "algorithm.average": "token"} for verb in ("grpo", "dr-grpo")},
}  # fmt: skip
"""By verb. A name with a point in it is our key, of what no setting says there."""
_LLAMAFACTORY_ALL: dict[str, Any] = {**_TRAINER, "learning_rate": 5e-5, "cutoff_len": 2048}
_LLAMAFACTORY: dict[str, dict[str, Any]] = {
    "sft": _LLAMAFACTORY_ALL,
    "reward": _LLAMAFACTORY_ALL,
    "dpo": {**_LLAMAFACTORY_ALL, "pref_beta": 0.1, "pref_loss": "sigmoid"},
    "kto": {**_LLAMAFACTORY_ALL, "pref_beta": 0.1, "kto_chosen_weight": 1.0, "kto_rejected_weight": 1.0},
    "ppo": {
        **_LLAMAFACTORY_ALL, "ppo_epochs": 4, "ppo_target": 6.0, "ppo_score_norm": False, "ppo_whiten_rewards": False,
        "max_new_tokens": 1024, "temperature": 0.95, "top_p": 0.7, "top_k": 50, "lam": 0.95, "gamma": 1.0,
        "cliprange": 0.2, "cliprange_value": 0.2, "algorithm.beta": 0.2, "algorithm.kl_in": "reward",
    },
}  # fmt: skip
_OF = {"trl": _TRL, "openrlhf": _OPENRLHF, "llamafactory": _LLAMAFACTORY}
_OTHER_RATES = {"orpo": {"learning_rate": 1e-6}, "tpo": {"learning_rate": 5e-7, "beta": 0.01}}
"""Of TRL's trainers that are the verb dpo here, what they have otherwise."""


def peer_defaults(settings: dict[str, Any], verb: str) -> dict[str, Any]:
    """Names of the file's toolkit with the values that hold there because the file gives none, nor a value of another
    name for the same thing."""
    toolkit = toolkit_of(settings)
    found = dict(_OF[toolkit].get(verb, {}))
    if toolkit == "trl":
        for word in {"tpo", *script_words(settings)} if "tpo_alpha" in settings else script_words(settings):
            found |= _OTHER_RATES.get(word, {})
        if settings.get("use_vllm") and verb not in ("rloo", "a2po", *ABOVE):
            found |= _CORRECTED
    given = [name for name, value in settings.items() if value is not None]
    said = {key for name in given for key in PEERS.get(name, ((), ""))[0]}
    return {
        name: value for name, value in found.items()
        if name not in given and said.isdisjoint(PEERS.get(name, ((), ""))[0])
    }  # fmt: skip
