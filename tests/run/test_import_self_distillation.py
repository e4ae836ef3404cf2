"""`import-recipe` of TRL's SDFT: the teacher is the student's own model, by their defaults, in our keys."""

from __future__ import annotations

import pytest
import yaml

from steersman import cli
from steersman.config.load import load_recipe
from steersman.distill.recipe import DistillRecipe
from steersman.verbs.import_recipe import guess_verb, read_settings, translate_settings

PLAIN = {
    "teacher.path": "start", "teacher.prompt": "{prompt}\n\n{privileged_context}", "loss.name": "jsd",
    "loss.mix": 0.5, "loss.average": "sequence", "rollout.samples": 8,
}  # fmt: skip
MEANINGS = [
    ({}, {}, set()),
    ({"teacher_model_kind": "ema", "teacher_update_rate": 0.01, "teacher_sync_steps": 2},
     {"teacher.path": "ema", "teacher.decay": 0.99, "teacher.every": 2}, set()),
    ({"teacher_model_kind": "ema"}, {"teacher.path": "ema", "teacher.decay": 0.95}, set()),
    ({"teacher_model_kind": "ema", "teacher_update_rate": 1.0, "teacher_sync_steps": 50},
     {"teacher.path": "ema", "teacher.decay": 0.0, "teacher.every": 50}, set()),
    ({"teacher_model_kind": "live", "teacher_update_rate": 0.1}, {"teacher.path": "live"}, {"teacher_update_rate"}),
    ({"distillation_alpha": 1.0}, {"loss.name": "reverse_kl", "loss.mix": None}, set()),
    ({"distillation_alpha": 0, "distillation_mode": "full_logits"}, {"loss.name": "forward_kl", "loss.mix": None},
     set()),
    ({"distillation_alpha": 0.2}, {"loss.mix": 0.2}, set()),
    ({"distillation_mode": "topk_logits", "distillation_topk": 100, "distillation_is_clip": 2.0,
      "distillation_add_tail": True}, {},
     {"distillation_mode", "distillation_topk", "distillation_is_clip", "distillation_add_tail"}),
    ({"num_loss_tokens_to_skip": 3, "teacher_prompt_template": "{privileged_context} {prompt}"},
     {"loss.skip_first": 3, "teacher.prompt": "{privileged_context} {prompt}"}, set()),
    ({"temperature": 0.7, "max_completion_length": 128, "max_prompt_length": 64, "learning_rate": 2e-5},
     {"rollout.temperature": 0.7, "loss.temperature": 0.7, "rollout.max_new_tokens": 128,
      "data.max_prompt_tokens": 64, "optimizer.lr": 2e-5}, set()),
    ({"num_processes": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_generations": 4},
     {"run.devices": 2, "train.batch_size": 8, "rollout.samples": 4}, set()),
    ({"num_processes": 1, "per_device_train_batch_size": 4}, {"run.devices": 1}, {"per_device_train_batch_size"}),
    ({"generate_from_teacher": True, "steps_per_generation": 2}, {},
     {"generate_from_teacher", "steps_per_generation"}),
    ({"teacher_model_kind": "other", "distillation_alpha": 3},
     {"teacher.path": None, "loss.name": None, "loss.mix": None}, {"teacher_model_kind", "distillation_alpha"}),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "keys", "left"), MEANINGS)
def test_what_is_written_means_the_same_and_loads(settings, keys, left, tmp_path):
    found, why = translate_settings(settings, "distill")
    assert found == {k: v for k, v in {**PLAIN, **keys}.items() if v is not None}
    assert set(why) == left
    file, out = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    file.write_text(yaml.safe_dump({**settings, "model_name_or_path": "m", "dataset_name": "d"}))
    assert cli.main(["import-recipe", str(file), "--verb", "distill", "--out", str(out)]) == 0
    load_recipe(DistillRecipe, out, [] if "teacher.path" in found else ["--teacher.path", "start"])


@pytest.mark.parametrize("text", ["python trl/experimental/sdft/sdft.py --learning_rate 1e-5",
                                  "python train.py --teacher_prompt_template x --num_generations 4"])  # fmt: skip
def test_the_file_says_that_it_is_this(text, tmp_path):
    file = tmp_path / "run.sh"
    file.write_text(text)
    assert guess_verb(read_settings(file)) == "distill"
