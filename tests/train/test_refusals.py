"""Bad input as a recipe and the command line see it: refused by name, nothing lost (invariant 12)."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
import yaml
from forked import Python
from letter_models import letters, save_mini, write_jsonl
from reward_kit import settings as reward_settings
from train_kit import merge, prompts_file, recipe, rewards_file, rows, weights

from steersman import cli
from steersman.config.load import load_recipe
from steersman.model import shard
from steersman.types import SteersmanError
from steersman.verbs import reward_model, rl, sft
from steersman.verbs.on_policy_recipes import RECIPES
from steersman.verbs.reward_recipe import RewardModelRecipe


def refused(verb: str, base: dict, tmp_path, words: list[str], **changes) -> str:
    """Loads and runs the recipe as the command line does; returns the error, which holds all the words."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(merge(base, {k.replace("__", "."): v for k, v in changes.items()})))
    with pytest.raises(SteersmanError) as caught:
        rl.run(load_recipe(RECIPES[verb], path, []))
    text = str(caught.value)
    assert all(word in text for word in words), text
    return text


@pytest.mark.parametrize(
    ("verb", "changes", "words"),
    [
        ("ppo", {"model__path": "./not-here"}, ["not-here", "no such model folder"]),
        ("ppo", {"optimizer__lr": -0.1}, ["optimizer.lr", "-0.1"]),
        ("ppo", {"optimizer__learning_rate": 0.1}, ["optimizer.learning_rate"]),
        ("ppo", {"algorithm__clip_lo": 0.1}, ["algorithm.clip_lo", "clip_low"]),
        ("ppo", {"algorithm__minibatches": 3}, ["8 samples", "algorithm.minibatches = 3"]),
        ("grpo", {"rollout__samples": 1}, ["GRPO", "rollout.samples"]),
        ("grpo", {"critic": {"init": "policy"}}, ["GRPO", "critic"]),
        ("trpo", {"rollout__top_p": 0.9}, ["TRPO", "top_p"]),
        ("trpo", {"critic__init": "shared"}, ["critic.init", "TRPO"]),
        ("ppo", {"critic__init": "shared", "critic__warmup": 1}, ["critic.warmup"]),
        ("ppo", {"critic__warmup": 2}, ["critic.warmup", "iterations"]),
        ("ppo", {"algorithm__kl_in": "loss"}, ["kl_estimator", "k1"]),
        ("ppo", {"reference": "none"}, ["reference", "beta"]),
        ("ppo", {"model__scratch": {"model_type": "llama"}}, ["model.scratch", "sft"]),
        ("remax", {"reward__whiten": True}, ["reward.whiten", "ReMax"]),
        ("ppo", {"reward__parts": {}}, ["reward.parts"]),
        ("ppo", {"reward__parts": {"x": {"builtin": "vader_sentimant"}}}, ["vader_sentiment"]),
        (
            "ppo",
            {"rollout__prompts": 40, "algorithm__minibatches": 1},
            ["have 12", "40 prompts", "--rollout.prompts 12"],
        ),
        ("ppo", {"rollout__prompts": 40, "algorithm__minibatches": 5}, ["--rollout.prompts 10,"]),
        (
            "grpo",
            {"rollout__prompts": 32, "algorithm__minibatches": 64},
            ["--rollout.prompts 12 --algorithm.minibatches 1"],
        ),
        ("ppo", {"rollout__min_new_tokens": 9}, ["min_new_tokens"]),
        ("ppo", {"rollout__temperature": 0}, ["rollout.temperature", "likeliest token", "top_k: 1"]),
        ("ppo", {"rollout__max_new_tokens": 60}, ["prompts.jsonl", "the prompt has 7 tokens, at most 4 fit"]),
        ("ppo", {"data__path": "nothing.jsonl"}, ["nothing.jsonl"]),
        ("ppo", {"data__columns": {"prompt": "question"}}, ["question"]),
        ("ppo", {"critic__init": "./no-critic"}, ["no-critic"]),
    ],
)
def test_a_recipe_that_can_not_work_is_refused_by_name(verb, changes, words, base, tmp_path):
    refused(verb, base, tmp_path, words, **changes)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_faulty_rank_is_the_only_problem_and_a_choice_below_a_name_is_told_in_words():
    asked = ["--model.path", "x", "--data.path", "y", "--reward.parts", "{a: {builtin: length}}"]
    with pytest.raises(SteersmanError) as told:
        load_recipe(RECIPES["grpo"], None, [*asked, "--model.lora", "{r: 0}"])
    assert str(told.value).endswith("model.lora.r: 0 was given; allowed: whole number >= 1")
    with pytest.raises(SteersmanError, match=r"environment: 'turns' was given; allowed: one of turn, episode$"):
        load_recipe(RECIPES["grpo"], None, [*asked[:-1], "{a: {environment: turns}}"])


def test_a_refused_run_leaves_its_folder_free(base, tmp_path):
    refused("ppo", base, tmp_path, ["no such model folder"], model__path="./not-here")
    refused("ppo", base, tmp_path, ["there is no sink 'tb'"], run__sinks=["tb"])
    assert not (tmp_path / "run").exists(), "made for this run, which is none"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    refused("ppo", base, tmp_path, ["no such model folder"], model__path="./not-here")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "notes.txt"]
    rl.run(recipe("ppo", base))
    refused("ppo", base, tmp_path, ["another run", "--resume"])
    assert len(rows(tmp_path / "run")) == 3


def test_an_unknown_key_is_told_its_nearest_neighbour_by_the_command_line(base, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(base))
    assert cli.main(["ppo", str(path), "--rollout.max_new_token", "4"]) == 2
    told = capsys.readouterr().err
    assert "rollout.max_new_token" in told
    assert "max_new_tokens" in told.replace("rollout.max_new_token:", "")
    assert "Traceback" not in told
    assert cli.main(["ppo", str(path), "--model.path", str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize(
    ("function", "words"),
    [("nan", ["score", "nan"]), ("short", ["score", "7 values for 8"]), ("broken", ["score", "ZeroDivisionError"])],
)
def test_a_reward_that_fails_is_named(function, words, base, tmp_path):
    path = f"{rewards_file(tmp_path)}:{function}"
    wanted = [w.replace("7 values for 8", "values for") for w in words]
    refused("ppo", base, tmp_path, wanted, reward__parts={"score": {"function": path}})


def test_a_reward_that_fails_later_leaves_the_checkpoints_intact(base, tmp_path):
    path = f"{rewards_file(tmp_path)}:broken_later"
    changed = merge(base, {"reward.parts": {"score": {"function": path}}, "iterations": 9, "run.eval_every": 100})
    refused("ppo", changed, tmp_path, ["score", "ZeroDivisionError"])
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3]
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept[-1] == "step-00000003"
    mended = merge(base, {"iterations": 4, "run.eval_every": 100})
    assert rl.run(recipe("ppo", mended), resume=True)["finished"]
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3, 4]


def test_a_run_that_blows_up_names_the_step_and_the_last_good_checkpoint(base, tmp_path):
    # the first update throws the weights out of float32, so the next minibatch's loss is not finite
    text = refused("ppo", base, tmp_path, ["stopped at step 1"], optimizer__lr=1e30, optimizer__warmup=0)
    assert "no checkpoint" in text or "checkpoint" in text
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_constant_reward_is_said(base, tmp_path, capsys):
    path = f"{rewards_file(tmp_path)}:constant"
    rl.run(recipe("rloo", merge(base, {"reward.parts": {"score": {"function": path}}})))
    assert "nothing to learn from" in capsys.readouterr().out


def test_a_reward_model_with_two_outputs_is_refused(base, tmp_path, mini):
    from transformers import AutoModelForSequenceClassification

    two = tmp_path / "two"
    AutoModelForSequenceClassification.from_pretrained(mini, num_labels=2).save_pretrained(two)
    letters().save_pretrained(two)
    refused("ppo", base, tmp_path, ["two", "num_labels is 2"], reward__parts={"judge": {"model": str(two)}})
    refused("ppo", base, tmp_path, ["two", "num_labels is 2"], critic__init=str(two))


def test_a_language_model_is_no_reward_model(base, tmp_path, mini):
    refused("ppo", base, tmp_path, ["judge", "zeros"], reward__parts={"judge": {"model": str(mini)}})


def test_models_that_read_other_ids_are_refused(base, tmp_path, mini):
    other = save_mini(tmp_path / "other")
    letters(vocabulary=["<unk>", "<s>", "</s>", *(chr(i) for i in range(65, 97))]).save_pretrained(other)
    refused("ppo", base, tmp_path, ["reference", "other", "tokenizer"], reference=str(other))
    refused("ppo", base, tmp_path, ["critic.init", "other", "tokenizer"], critic__init=str(other))
    letters(vocabulary=["<unk>", "<s>", "</s>", *(chr(i) for i in range(65, 125))]).save_pretrained(other)
    refused("ppo", base, tmp_path, ["other", "vocabulary"], model__path=str(other))


def test_a_tokenizer_without_end_is_refused(base, tmp_path):
    folder = save_mini(tmp_path / "endless")
    letters(eos=None).save_pretrained(folder)
    refused("ppo", base, tmp_path, ["endless", "end-of-sequence"], model__path=str(folder))


def test_a_prompt_longer_than_the_context_is_refused_before_the_start(base, tmp_path):
    path = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "hm"}] * 5 + [{"prompt": "a" * 70}])
    refused("ppo", base, tmp_path, ["long.jsonl", "6"], data__path=str(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["bad.jsonl"]),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "compl', ["bad.jsonl", "2"]),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', ["bad.jsonl", "2", "completion"]),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n', ["bad.jsonl", "2"]),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": 3}\n', ["bad.jsonl", "2", "completion"]),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n', ["bad.jsonl", "1"]),
    ],
)
def test_bad_rows_stop_the_run_by_file_and_row(text, words, tmp_path, mini):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(text)
    settings = {"model": {"path": str(mini)}, "data": {"path": str(bad)}, "run": {"dir": str(tmp_path / "run")}}
    verb = (reward_model, reward_model.RewardModelRecipe) if "chosen" in text else (sft, sft.SFTRecipe)
    with pytest.raises(SteersmanError) as caught:
        verb[0].run(verb[1].model_validate(settings))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_rate_so_high_that_sft_explodes_is_named(tmp_path, mini):
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "bcd"}] * 8)
    settings = {
        "model": {"path": str(mini)}, "data": {"path": str(data)}, "train": {"batch_size": 2, "epochs": 20},
        "optimizer": {"lr": 1e30, "max_grad_norm": 1e30}, "run": {"dir": str(tmp_path / "run"), "save_every": 1},
    }  # fmt: skip
    with pytest.raises(SteersmanError, match="stopped at step"):
        sft.run(sft.SFTRecipe.model_validate(settings))
    for row in rows(tmp_path / "run"):
        assert all(not isinstance(v, float) or math.isfinite(v) for v in row.values())


@pytest.mark.slow
def test_a_disk_that_fills_while_saving_loses_nothing(base, tmp_path):
    """A limit on file size stands for the full disk: the first checkpoints fit, the model that follows does not."""
    first = merge(base, {"iterations": 2})
    rl.run(recipe("rloo", first))
    kept = {p: p.read_bytes() for p in (tmp_path / "run" / "checkpoints").rglob("*") if p.is_file()}
    model = weights(tmp_path / "run" / "model")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(merge(base, {"iterations": 4})))
    code = (
        "import resource, sys; from steersman.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (12000, 12000)); sys.exit(main(sys.argv[1:]))"
    )
    done = Python("-c", code, "rloo", str(path), "--resume")
    _, error = done.communicate(timeout=200)
    assert done.returncode == 2, error[-2000:]
    assert "full" in error
    assert "Traceback" not in error
    assert {p: p.read_bytes() for p in kept} == kept
    assert all((model[k] == w).all() for k, w in weights(tmp_path / "run" / "model").items())
    assert rl.run(load_recipe(RECIPES["rloo"], path, []), resume=True)["finished"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4


def test_two_runs_at_once_can_not_share_a_folder(base, tmp_path):
    from steersman.run.files.folder import RunFolder

    asked = recipe("ppo", base)
    with RunFolder(tmp_path / "run", asked), pytest.raises(SteersmanError, match=f"process {os.getpid()}"):
        rl.run(asked, resume=True)


def test_the_kit_makes_the_prompts_it_says(tmp_path):
    assert len(prompts_file(tmp_path, 30).read_text().splitlines()) == 30


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("grpo", {"optimizer.kind": "muon"}, r"optimizer\.kind muon looks at whole matrices"),
        ("ppo", {"critic": {"optimizer": {"kind": "adafactor"}}}, r"critic\.optimizer\.kind adafactor"),
        ("grpo", {"model.dtype": "bfloat16"}, r"optimizer\.rounding master keeps more of bfloat16 weights"),
        ("grpo", {"model.quantise": "nf4", "model.lora": {}}, r"model\.quantise nf4.*can not lie in pieces"),
        ("ppo", {"share": "base", "model.lora": {}}, "share: none, where every model lies in pieces"),
        ("trpo", {}, "needs second derivatives"),
        ("grpo", {"parallel.replicas": 3}, "parallel.replicas is 3, which does not divide the 4 devices"),
    ],
)
def test_what_can_not_lie_in_pieces_is_refused_before_any_rank_starts(name, changes, said, base):
    laid = {"parallel.mode": "fsdp", "run.devices": 4}
    with pytest.raises(ValueError, match=said):
        RECIPES[name].model_validate(merge(base, {**laid, **changes}))


OF_TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0"}
OF_SRUN = {
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu1", "SLURM_STEP_TASKS_PER_NODE": "2",
}  # fmt: skip


@pytest.mark.parametrize("launcher", [OF_TORCHRUN, OF_SRUN])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout.ahead": 1, "reward.parts": {"judge": {"model": "its folder"}}}, "rank 0 computes rewards ahead"),
        ({"model.lora": {}}, "adapters of a policy that lies in pieces"),
        ({"environment": {"path": "worlds.py:Echo"}}, "on several devices it samples single answers"),
        ({"parallel.replicas": 3}, "does not divide the 2 devices"),
    ],
)
def test_what_several_devices_refuse_is_refused_where_a_launcher_started_the_ranks(
    launcher, changes, said, base, monkeypatch
):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    asked = {"parallel.mode": "fsdp", "rollout.engine": "process", **changes}
    with pytest.raises(ValueError, match=said):
        RECIPES["grpo"].model_validate(merge(base, asked))


def test_gating_is_refused_where_its_network_would_be_cut(tmp_path):
    asked = reward_settings(tmp_path, tmp_path / "model", "gating")
    with pytest.raises(ValueError, match="stage gating trains a small network"):
        RewardModelRecipe.model_validate(merge(asked, {"parallel.mode": "zero3"}))


def test_weights_that_fsdp_can_not_train_are_refused_by_name():
    two = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16()])
    with pytest.raises(SteersmanError, match="bfloat16 and float32 would be trained side by side"):
        shard._require_trainable(two, [])
    shard._require_trainable(two, [two[0]])
    two.scale = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(SteersmanError, match="a single number"):
        shard._require_trainable(two, [two[0]])
