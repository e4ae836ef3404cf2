"""PPO of the people study by TRL 1.12, run by the Python of an environment that has it.

    PYTHON tools/results/chat/ppo_trl.py MODEL REWARD_MODEL PROMPTS SEED BETA FOLDER

The settings of `people.py`'s PPO, with as many answers an iteration, each to a prompt of its own. The policy is kept
in `FOLDER/step-N` at each look. Activations are made again in the backward pass, since 16 GB are too much beside
other work.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tasks import PEOPLE
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Keep(TrainerCallback):
    """Saves the policy at each look."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.trainer = folder, None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % PEOPLE["look_every"] == 0:
            assert self.trainer is not None
            self.trainer.save_model(str(self.folder / f"step-{state.global_step}"))


def main() -> None:
    model, reward, prompts, seed, beta, out = sys.argv[1:]
    folder, table = Path(out), Path(prompts).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in table.split("\n") if line]
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    asked = [
        {"input_ids": tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)}
        for row in rows
    ]
    answers = PEOPLE["prompts"] * PEOPLE["samples"]
    config = PPOConfig(
        output_dir=str(folder / "trl"), learning_rate=PEOPLE["lr"], seed=int(seed), weight_decay=0.0, bf16=False,
        use_cpu=True, gradient_checkpointing=True, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True, dataloader_pin_memory=False, max_grad_norm=1.0, lr_scheduler_type="constant_with_warmup",
        warmup_steps=PEOPLE["warmup"], per_device_train_batch_size=answers, gradient_accumulation_steps=1,
        num_mini_batches=PEOPLE["minibatches"], num_ppo_epochs=1, total_episodes=answers * PEOPLE["iterations"],
        local_rollout_forward_batch_size=answers // 4, response_length=PEOPLE["new_tokens"],
        temperature=PEOPLE["temperature"], kl_coef=float(beta), num_sample_generations=0, stop_token="eos",
    )  # fmt: skip
    policies = [AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2)]
    scalars = [
        AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32, num_labels=1)
        for _ in range(2)
    ]
    for trained in (policies[0], scalars[1]):
        trained.gradient_checkpointing_enable({"use_reentrant": False})
    keep, data = Keep(folder), Dataset.from_list(asked)
    keep.trainer = trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policies[0], ref_model=policies[1], reward_model=scalars[0],
        value_model=scalars[1], train_dataset=data, eval_dataset=data.select(range(answers)),
        data_collator=DataCollatorWithPadding(tokenizer), callbacks=[keep],
    )  # fmt: skip
    trainer.train()
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main()
