"""Other toolkits' names of settings: each is answered with a key that the verb at hand has."""

from __future__ import annotations

import pytest

from steersman.config.load import load_recipe
from steersman.config.peer_names import FREE, PEERS, peer_hint
from steersman.config.sections import walk_keys
from steersman.types import SteersmanError
from steersman.verb_table import VERBS, import_object

LEARNING = (
    "sft", "reward", "ppo", "grpo", "sapo", "vespo", "a2po", "dpo", "kto", "best-of-n", "online-dpo", "generate",
)  # fmt: skip


def keys_of(verb: str) -> set[str]:
    return {key for key, _ in walk_keys(import_object(VERBS[verb].recipe))}


CASES = [
    ("sft", "learning_rate", "optimizer.lr"),
    ("grpo", "learning_rate", "optimizer.lr"),
    ("sft", "num_train_epochs", "train.epochs"),
    ("grpo", "num_train_epochs", "iterations"),
    ("dpo", "per_device_train_batch_size", "train.batch_size"),
    ("grpo", "per_device_train_batch_size", "rollout.prompts"),
    ("sft", "gradient_accumulation_steps", "train.batch_size"),
    ("grpo", "beta", "algorithm.beta"),
    ("kto", "beta", "loss.beta"),
    ("dpo", "beta", "loss.settings.beta"),
    ("sft", "max_length", "data.max_length"),
    ("grpo", "num_generations", "rollout.samples"),
    ("grpo", "max_completion_length", "rollout.max_new_tokens"),
    ("sft", "output_dir", "run.dir"),
    ("sft", "model_name_or_path", "model.path"),
    ("sft", "dataset_name", "data.path"),
    ("sft", "bf16", "model.dtype"),
    ("sft", "use_peft", "model.lora"),
    ("sft", "lora_r", "model.lora.r"),
    ("sft", "warmup_ratio", "optimizer.warmup"),
    ("sft", "save_steps", "run.save_every"),
    ("sft", "logging_steps", "run.eval_every"),
    ("sft", "seed", "run.seed"),
    ("sft", "gradient_clipping", "optimizer.max_grad_norm"),
    ("dpo", "label_smoothing", "loss.settings.label_smoothing"),
    ("dpo", "rpo_alpha", "loss.nll"),
    ("dpo", "sync_ref_model", "moving_reference"),
    ("kto", "ref_model_sync_steps", "moving_reference.every"),
    ("ppo", "cliprange_value", "critic.value_clip"),
    ("ppo", "whiten_rewards", "reward.whiten"),
    ("grpo", "num_epochs", "iterations"),
    ("grpo", "top_entropy_quantile", "algorithm.top_entropy"),
    ("ppo", "off_policy_mask_threshold", "algorithm.off_policy_threshold"),
    ("vespo", "vespo_lambda_neg", "algorithm.lambda_negative"),
    ("a2po", "num_value_samples", "algorithm.value_samples"),
]


@pytest.mark.parametrize(("verb", "name", "ours"), CASES)
def test_a_peers_name_is_answered_with_the_verbs_own_key(verb, name, ours, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{name}: 1\n")
    for path, words in ((None, [f"--{name}", "1"]), (None, [f"--{name}"]), (recipe, [])):
        with pytest.raises(SteersmanError, match=rf"{name}: unknown key; here it is {ours}( |\n|$)"):
            load_recipe(import_object(VERBS[verb].recipe), path, words)


@pytest.mark.parametrize("verb", LEARNING)
def test_every_key_that_is_pointed_to_exists_in_the_verbs_recipe(verb):
    known = keys_of(verb)
    for name in PEERS:
        hint = peer_hint(name, known)
        if hint is not None:
            ours = hint.removeprefix("here it is ").split(" ")[0]
            assert FREE.get(ours, ours) in known


def test_every_entry_is_of_use_to_some_verb():
    known = [keys_of(verb) for verb in LEARNING]
    unused = [(n, k) for n, (keys, _) in PEERS.items() for k in keys if not any(FREE.get(k, k) in v for v in known)]
    assert unused == []
