"""`import-recipe` of TRL's SDFT and SDPO: the teacher is the student's own model, by their defaults, in our keys."""

from __future__ import annotations

import pytest
import yaml

from steersman import cli
from steersman.config.load import load_recipe
from steersman.distill.recipe import DistillRecipe
from steersman.verbs.import_recipe import guess_verb, read_settings, translate_settings

PLAIN = {
    "teacher.path": "start", "teacher.prompt": "{prompt}\n\n{privileged_context}", "loss.name": "jsd",
    "loss.mix": 0.5, "loss.average": "sequence", "loss.top_k": 100, "loss.tail": False, "rollout.samples": 8,
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
    ({"distillation_alpha": 0, "distillation_mode": "full_logits"},
     {"loss.name": "forward_kl", "loss.mix": None, "loss.top_k": None, "loss.tail": None}, set()),
    ({"distillation_alpha": 0.2}, {"loss.mix": 0.2}, set()),
    ({"distillation_mode": "topk_logits", "distillation_topk": 20, "distillation_is_clip": 2.0,
      "distillation_add_tail": True}, {"loss.top_k": 20, "loss.tail": None}, {"distillation_is_clip"}),
    ({"distillation_mode": "sampled_token", "distillation_topk": 20, "distillation_alpha": 1.0},
     {"loss.name": "reverse_kl", "loss.mix": None, "loss.top_k": None, "loss.tail": None},
     {"distillation_mode", "distillation_topk"}),
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


SDPO = {
    "teacher.path": "ema", "teacher.decay": 0.95, "teacher.feedback.success": 1.0, "loss.name": "reverse_kl",
    "loss.average": "sequence", "rollout.samples": 8,
}  # fmt: skip
OF_SDPO = [
    ({}, {}, set()),
    ({"teacher_model_kind": "base", "success_reward_threshold": 0.5, "dont_reprompt_on_self_success": False,
      "remove_thinking_from_demonstration": True},
     {"teacher.path": "start", "teacher.decay": None, "teacher.feedback.success": 0.5, "teacher.feedback.own": True,
      "teacher.feedback.thinking": False}, set()),
    ({"include_environment_feedback": True, "environment_feedback_only_without_solution": True},
     {"teacher.feedback.column": "privileged_context", "teacher.feedback.beside_solution": False}, set()),
    ({"dont_reprompt_on_self_success": True, "include_environment_feedback": False}, {}, set()),
    ({"reprompt_template": "{prompt}{solution}", "solution_template": "So: {successful_previous_attempt}",
      "feedback_template": "But: {feedback_raw}"},
     {"teacher.prompt": "{prompt}{solution}", "teacher.feedback.solution": "So: {answer}",
      "teacher.feedback.text": "But: {text}"}, set()),
    ({"distillation_mode": "topk_logits", "distillation_topk": 100, "distillation_add_tail": True,
      "distillation_alpha": 0.5}, {"loss.name": "jsd", "loss.mix": 0.5, "loss.top_k": 100}, set()),
    ({"distillation_mode": "topk_logits", "distillation_topk": 100}, {"loss.top_k": 100, "loss.tail": False}, set()),
    ({"distillation_mode": "sampled_token", "distillation_weight": 1.0, "distillation_is_clip": 2.0}, {},
     {"distillation_mode", "distillation_is_clip"}),
    ({"distillation_weight": 0.5, "loss_type": "dapo", "epsilon": 0.2, "num_iterations": 2, "max_reprompt_len": 512},
     {}, {"distillation_weight", "loss_type", "epsilon", "num_iterations", "max_reprompt_len"}),
    ({"temperature": 0.9, "learning_rate": 1e-5, "per_device_train_batch_size": 16, "num_processes": 1,
      "num_generations": 4},
     {"rollout.temperature": 0.9, "loss.temperature": 0.9, "optimizer.lr": 1e-5, "train.batch_size": 4,
      "rollout.samples": 4, "run.devices": 1}, set()),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "keys", "left"), OF_SDPO)
def test_what_sdpo_s_teacher_is_shown_means_the_same_and_loads(settings, keys, left, tmp_path):
    settings = {"success_reward_threshold": 1.0, **settings}
    found, why = translate_settings(settings, "distill")
    assert found == {k: v for k, v in {**SDPO, **keys}.items() if v is not None}
    assert set(why) == left
    file, out = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    file.write_text(yaml.safe_dump({**settings, "model_name_or_path": "m", "dataset_name": "d"}))
    assert cli.main(["import-recipe", str(file), "--out", str(out)]) == 0
    assert "reward.parts: not in the file" in out.read_text()
    recipe = load_recipe(DistillRecipe, out, ["--reward.parts", "{r: {builtin: length}}"])
    assert recipe.reward_weight == 0


def test_sdpo_without_solutions_has_feedback_alone():
    settings = {"use_successful_as_teacher": False, "include_environment_feedback": True}
    found, why = translate_settings(settings, "distill")
    assert found["teacher.feedback.success"] is None
    assert found["teacher.feedback.column"] == "privileged_context"
    assert not why


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
                                  "python examples/sdpo_math/sdpo_math.py --num_generations 8",
                                  "python train.py --success_reward_threshold 1 --num_generations 4",
                                  "python train.py --teacher_prompt_template x --num_generations 4"])  # fmt: skip
def test_the_file_says_that_it_is_this(text, tmp_path):
    file = tmp_path / "run.sh"
    file.write_text(text)
    assert guess_verb(read_settings(file)) == "distill"
