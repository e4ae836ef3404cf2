"""`import-recipe` of shell scripts, whose own variables are read as text; and what a file leaves out."""

from __future__ import annotations

import pytest
import yaml

from steersman import cli
from steersman.config.load import load_recipe
from steersman.verbs.import_recipe import guess_verb, read_settings, translate_settings
from steersman.verbs.peers.settings import VERBS
from steersman.verbs.peers.shell import read_commands

ARRAYS = """#!/bin/bash
SCRIPT_DIR="$(dirname "$0")"
WORK_DIR=$(cd "$SCRIPT_DIR/../.." && pwd)
set -x

MODEL_PATH="org/model"
SAVE_PATH="${WORK_DIR}/out"

CKPT_ARGS=(
   --pretrain ${MODEL_PATH}
   # --reward_pretrain ${REWARD_MODEL}
   --save_path ${SAVE_PATH}
   --load_checkpoint

   --save_steps 10  # often
)
OPTIMIZER_ARGS=(
   --advantage_estimator reinforce_baseline
   --actor_learning_rate 5e-7
   --init_kl_coef 1e-5
   --use_kl_loss
   --kl_estimator k2
)
ROLLOUT_ARGS=(--prompt_data "org/the data" --input_key question --rollout_batch_size 128 --n_samples_per_prompt 8)
ROLLOUT_ARGS+=(--train_batch_size 1024)

ray job submit --address="http://127.0.0.1:8265" \\
   -- python3 -m openrlhf.cli.train_ppo_ray \\
   ${CKPT_ARGS[@]} \\
   "${ROLLOUT_ARGS[@]}" \\
   ${OPTIMIZER_ARGS[@]}
"""


def settings_of(text: str, tmp_path) -> dict:
    file = tmp_path / "run.sh"
    file.write_text(text)
    return read_settings(file)


def test_settings_in_arrays_are_those_of_the_line(tmp_path):
    settings = settings_of(ARRAYS, tmp_path)
    assert settings == {
        "command": "openrlhf.cli.train_ppo_ray", "address": "http://127.0.0.1:8265", "pretrain": "org/model",
        "save_path": "${WORK_DIR}/out", "load_checkpoint": True, "save_steps": 10, "prompt_data": "org/the data",
        "input_key": "question", "rollout_batch_size": 128, "n_samples_per_prompt": 8, "train_batch_size": 1024,
        "advantage_estimator": "reinforce_baseline", "actor_learning_rate": 5e-7, "init_kl_coef": 1e-5,
        "use_kl_loss": True, "kl_estimator": "k2",
    }  # fmt: skip
    assert guess_verb(settings) == "reinforce++-baseline"
    out = tmp_path / "ours.yaml"
    assert cli.main(["import-recipe", str(tmp_path / "run.sh"), "--out", str(out)]) == 0
    recipe = load_recipe(VERBS["reinforce++-baseline"], out)
    assert (recipe.optimizer.lr, recipe.rollout.prompts, recipe.rollout.samples) == (5e-7, 128, 8)
    assert recipe.data.columns == {"prompt": "question"}
    text = out.read_text()
    assert "# save_path: is a variable of the shell, whose value is not in the file: ${WORK_DIR}/out" in text


LINES = {
    # what the shell puts in is in
    "A='--lora_r 4 --seed 2'\ntrl sft $A --use_peft": {"lora_r": 4, "seed": 2, "use_peft": True},
    "A=(--lora_r 4)\nB=(\"${A[@]}\" --seed 2)\ntrl sft --use_peft \"${B[@]}\"":
        {"use_peft": True, "lora_r": 4, "seed": 2},
    "OUT=runs/a\nNAME=$OUT/b\nexport SEED=3 LR=1e-5\ntrl sft --output_dir ${NAME}_x --seed $SEED --learning_rate=$LR":
        {"output_dir": "runs/a/b_x", "seed": 3, "learning_rate": 1e-5},
    "A=\ntrl sft --lora_r 4 $A --seed 2": {"lora_r": 4, "seed": 2},
    "A=1\nA=2\nA+=5\ntrl sft --lora_r 4 --seed $A": {"lora_r": 4, "seed": 25},
    "A=(x 'y z')\ntrl sft --seed 1 --dataset_name \"${A[1]}\"": {"seed": 1, "dataset_name": "y z"},
    "A=(--seed 2)\r\ntrl sft --lora_r 4 \\\r\n  ${A[@]}\r\n": {"lora_r": 4, "seed": 2},
    "P='a b'\ntrl sft --seed 1 --output_dir \"$P\" --dataset_name '$P'":
        {"seed": 1, "output_dir": "a b", "dataset_name": "$P"},
    "CMD=\"trl sft --lora_r 4 --seed 2\"\neval $CMD": {"lora_r": 4, "seed": 2},
    "read -r -d '' A <<EOF\ntrl sft --seed $S \\\n --lora_r 4\nEOF\nsrun bash -c \"$A\"": {"seed": "$S", "lora_r": 4},
    "B=8\nread -r -d '' A <<EOF\nopenrlhf.cli.train_sft --train_batch_size $B\nEOF\n"
    "if [[ ${1} != slurm ]]; then\n  torchrun --nproc_per_node 4 -m $A\nfi":
        {"nproc_per_node": 4, "train_batch_size": 8},
    "cat > ds.json <<EOF\n{\"don't\": \"--a --b --c\"}\nEOF\ntrl sft --seed 2 --lora_r 4": {"seed": 2, "lora_r": 4},
    # what it would not, or what the text does not say, is named
    "trl sft --learning_rate 5e-7 \"${ARGS[@]}\" --seed 2":
        {"learning_rate": 5e-7, "${ARGS[@]}": "${ARGS[@]}", "seed": 2},
    "trl sft --bf16 ${ARGS[@]}": {"bf16": True, "${ARGS[@]}": "${ARGS[@]}"},
    "trl sft --learning_rate 5e-7 $EXTRA --seed 2": {"learning_rate": 5e-7, "$EXTRA": "$EXTRA", "seed": 2},
    "trl sft --bf16 $EXTRA --seed 2": {"bf16": "$EXTRA", "seed": 2},
    "trl sft $EXTRA --seed 2": {"$EXTRA": "$EXTRA", "seed": 2},
    "trl sft --seed 2 --use_peft \"$@\"": {"seed": 2, "use_peft": True, "$@": "$@"},
    "torchrun $DISTRIBUTED sft.py --seed 2": {"$DISTRIBUTED": "$DISTRIBUTED", "seed": 2},
    "llamafactory-cli train a.yaml --seed 2": {"a.yaml": "a.yaml", "seed": 2},
    "A=(--lora_r 4)\nif [ $B ]; then\n  A+=(--use_dora)\nfi\ntrl sft \"${A[@]}\" --seed 2":
        {"lora_r": 4, "${A[@]}": "${A[@]}", "seed": 2},
    "A=1\nif [ $B ]; then A=2; fi\ntrl sft --seed $A --lora_r 4": {"seed": "$A", "lora_r": 4},
    "A=1\n[ $B ] && A=2\ntrl sft --seed $A --lora_r 4": {"seed": "$A", "lora_r": 4},
    "A=1\nf() {\n  A=2\n}\nf\ntrl sft --seed $A --lora_r 4": {"seed": "$A", "lora_r": 4},
    "S=1\nfor S in 1 2 3; do\n  trl sft --seed $S --lora_r 4\ndone": {"seed": "$S", "lora_r": 4},
    "N=`nproc`\ntrl sft --seed $N --lora_r $(echo 4)": {"seed": "$N", "lora_r": "$(echo 4)"},
    "N=${N:-8}\ntrl sft --seed $N --lora_r 4": {"seed": "${N:-8}", "lora_r": 4},
    "A=1 trl sft --seed $A --lora_r 4": {"seed": "$A", "lora_r": 4},
    "declare -A M=([a]=1)\ntrl sft --seed ${M[a]} --lora_r 4": {"seed": "${M[a]}", "lora_r": 4},
    "trl sft --seed 2 --eos_token $'\\n'": {"seed": 2, "eos_token": "$'\\n'"},
}  # fmt: skip


@pytest.mark.parametrize("text", LINES)
def test_each_way_to_write_settings_is_read_or_named(text, tmp_path):
    settings = settings_of(text, tmp_path)
    settings.pop("command", None)
    assert settings == LINES[text]
    _, left = translate_settings({"command": "sft", **settings}, "sft")
    assert {name for name, value in settings.items() if str(value).startswith("$")} <= set(left)


def test_words_that_stand_for_settings_are_named_in_the_recipe(tmp_path, capsys):
    file = tmp_path / "run.sh"
    file.write_text('source common.sh\ntrl sft --learning_rate 5e-7 "${ARGS[@]}" "$@"\n')
    assert cli.main(["import-recipe", str(file)]) == 0
    told = capsys.readouterr().out
    assert yaml.safe_load(told)["optimizer"]["lr"] == 5e-7
    assert "# '${ARGS[@]}': stands for words that are not in the file; write settings" in told
    assert "# '$@': stands for words that are not in the file" in told


def test_a_recipe_without_settings_is_refused(tmp_path, capsys):
    file, out = tmp_path / "run.sh", tmp_path / "ours.yaml"
    file.write_text('ray job submit --address=x -- python -m openrlhf.cli.train_ppo_ray "${ARGS[@]}"\n')
    assert cli.main(["import-recipe", str(file), "--out", str(out)]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "nothing in it has a counterpart in a recipe of steersman ppo" in told
    assert "${ARGS[@]}: stands for words" in told
    assert not out.exists()


@pytest.mark.parametrize("text", ["A=(--x 1\ntrl sft --a 1", 'trl sft --a "b', "trl sft --a 'b", "trl sft --a ${b"])
def test_what_is_not_closed_is_refused(text, tmp_path, capsys):
    file = tmp_path / "run.sh"
    file.write_text(text)
    assert cli.main(["import-recipe", str(file)]) == 2
    assert "is not closed" in capsys.readouterr().err


def test_nothing_of_the_script_is_run_and_the_environment_is_not_asked(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    monkeypatch.setenv("SEED", "7")
    settings = settings_of(
        f"A=$(touch {ran})\nB=`touch {ran}`\ntouch {ran}\ntrl sft --seed $SEED --x $A $B", tmp_path
    )
    assert settings["seed"] == "$SEED"
    assert not ran.exists()


def test_words_are_those_of_the_shell():
    text = r"""a "b c"'d' e\ f "g\"h\n" ; i && j | k 2>&1 > l # m
n # o
( p ) & q"""
    assert [[word.text for word in words] for words in read_commands(text)] == [
        ["a", "b cd", "e f", 'g"h\\n'], ["i"], ["j"], ["k"], ["n"], ["p"], ["q"],
    ]  # fmt: skip


DEFAULTS = [
    # the verb, the file's settings, keys that its toolkit's defaults give
    ("grpo", {"num_generations": 8}, {"algorithm.beta": 0.0, "algorithm.average": "token", "optimizer.lr": 1e-6,
                                      "optimizer.schedule": "linear", "rollout.max_new_tokens": 512}),
    ("grpo", {"use_vllm": True, "learning_rate": 1e-5}, {"rollout.correction.kind": "sequence_masked",
                                                         "rollout.correction.cap": 3.0, "algorithm.beta": 0.0}),
    ("dpo", {"rpo_alpha": 1.0}, {"optimizer.lr": 1e-6, "optimizer.warmup": 0, "train.epochs": 3.0,
                                 "train.batch_size": 8, "data.max_length": 1024}),
    ("dpo", {"command": "orpo.py", "lr": 2e-5, "warmup_ratio": 0.1, "max_steps": 5}, {"data.max_length": 1024}),
    ("kto", {"beta": 0.2}, {"loss.desirable_weight": 1.0, "loss.undesirable_weight": 1.0}),
    ("sft", {"learning_rate": 1e-5, "lr_scheduler_type": "polynomial"}, {"train.epochs": 3.0}),
    ("ppo", {"pretrain": "m"}, {"optimizer.lr": 1e-6, "critic.optimizer.lr": 9e-6, "algorithm.beta": 0.01,
                                "algorithm.lam": 1.0, "algorithm.epochs": 1, "critic.value_clip": 0.5,
                                "optimizer.beta2": 0.95, "rollout.prompts": 1024, "algorithm.minibatches": 8,
                                "data.wrap_in_chat": False, "reward.clip": 10}),
    ("grpo", {"pretrain": "m", "n_samples_per_prompt": 4, "kl_estimator": "k3", "init_kl_coef": 0.1},
     {"algorithm.average": "token", "algorithm.minibatches": 32}),
    ("ppo", {"stage": "ppo", "temperature": 0.7}, {"algorithm.beta": 0.2, "algorithm.kl_target": 6.0,
                                                   "rollout.top_p": 0.7, "rollout.top_k": 50}),
    ("dpo", {"stage": "dpo", "pref_loss": "orpo"}, {"optimizer.lr": 5e-5, "loss.settings.weight": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "settings", "keys"), DEFAULTS)
def test_what_the_file_leaves_out_is_what_its_toolkit_takes_and_is_told(verb, settings, keys, tmp_path):
    file, out = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert cli.main(["import-recipe", str(file), "--verb", verb, "--out", str(out)]) == 0
    text = out.read_text()
    recipe = load_recipe(VERBS[verb], out, ["--model.path", "m", "--data.path", "d"]).model_dump()
    told = next((line for line in text.splitlines() if line.startswith("# not in the file, so the defaults of")), "")
    for key, value in keys.items():
        spot = recipe
        for part in key.split("."):
            spot = spot[part]
        assert spot == value, key
        held = key == "algorithm.epochs"  # ours is the same
        assert held or f" {key}" in told.replace(",", ""), (key, told)


def test_what_the_file_says_is_never_a_default(tmp_path, capsys):
    given = {
        "lr": 3e-5, "warmup_ratio": 0.2, "lr_scheduler_type": "cosine", "max_steps": 7, "beta": 0.3,
        "train_batch_size": 4, "max_seq_length": 77,
    }  # fmt: skip
    file = tmp_path / "theirs.yaml"
    file.write_text(yaml.safe_dump(given))
    assert cli.main(["import-recipe", str(file), "--verb", "dpo"]) == 0
    told = capsys.readouterr().out
    assert "the defaults of" not in told
    assert yaml.safe_load(told)["optimizer"] == {"lr": 3e-5, "warmup": 0.2, "schedule": "cosine"}


def test_of_what_neither_gives_our_value_is_told(tmp_path, capsys):
    file = tmp_path / "theirs.yaml"
    file.write_text("num_generations: 8\n")
    assert cli.main(["import-recipe", str(file), "--verb", "grpo"]) == 0
    told = capsys.readouterr().out
    assert "# not in the file, so our values hold: iterations 100\n" in told
