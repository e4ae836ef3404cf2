"""TRL's side of a benchmark, run by the Python of an environment that has it.

    python benchmarks/trl_side.py SCENARIO FOLDER THREADS DEVICE DTYPE PROMPTS SAMPLES

Its trainers run by themselves; a callback at the end of each step waits for the next turn. Gradient checkpointing,
TRL's default, is off unless the scenario's name ends in `-checkpointed`: it saves memory and costs a second forward.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from common import SETTINGS, Turns, peak_mib, sizes

turns = Turns()

import torch  # noqa: E402
from datasets import Dataset, load_dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    TrainerCallback,
)


class TurnTaker(TrainerCallback):
    """Work between two turns is `steps` steps."""

    def __init__(self, steps: int, tokens: int) -> None:
        self.steps, self.tokens, self.seen = steps, tokens, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        turns.ready()
        turns.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen += 1
        if self.seen % self.steps == 0:
            turns.done(tokens=self.tokens)
            turns.wait()


def common_settings(device: str, dtype: str, checkpointed: bool) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(prefix="bench-trl-"),
        "learning_rate": SETTINGS["lr"],
        "max_grad_norm": SETTINGS["max_grad_norm"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "bf16": False,
        "use_cpu": device == "cpu",
        "gradient_checkpointing": checkpointed,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1_000_000,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }


def load(folder: Path, kind: str, device: str, dtype: str, adapters: str = "") -> Any:
    cls = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
    return cls.from_pretrained(folder / kind, dtype=getattr(torch, dtype), **base(adapters, dtype)).to(device)


def base(adapters: str, dtype: str) -> dict[str, Any]:
    """How the base is loaded: in 4 bits where the scenario's name ends in `-qlora`."""
    if adapters != "qlora":
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )  # fmt: skip
    return {"quantization_config": config}


def lora(adapters: str) -> Any:
    """LoRA of rank 16 on all linear layers, where the scenario's name ends in `-lora` or `-qlora`."""
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if adapters else None


def ppo(folder: Path, device: str, dtype: str, settings: dict[str, Any], rows: int, samples: int) -> Any:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    new, _ = sizes(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    data = load_dataset(
        "json", data_files=str(folder / "prompts.jsonl"), split="train", cache_dir=settings["output_dir"]
    )
    data = data.map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=["prompt"])
    if samples > 1:
        data = data.select([row for row in range(rows) for _ in range(samples)])
    batch = rows * samples
    config = PPOConfig(
        **settings, per_device_train_batch_size=batch, gradient_accumulation_steps=1, num_mini_batches=1,
        num_ppo_epochs=1, total_episodes=batch * 1000, local_rollout_forward_batch_size=batch, response_length=new,
        temperature=1.0, kl_coef=SETTINGS["beta"], cliprange=SETTINGS["clip"], num_sample_generations=0,
    )  # fmt: skip
    return PPOTrainer(
        args=config, processing_class=tokenizer, model=load(folder, "policy", device, dtype),
        ref_model=load(folder, "policy", device, dtype), reward_model=load(folder, "scalar", device, dtype),
        value_model=load(folder, "scalar", device, dtype), train_dataset=data, eval_dataset=data.select(range(batch)),
        data_collator=DataCollatorWithPadding(tokenizer), callbacks=[TurnTaker(1, batch * new)],
    )  # fmt: skip


def grpo(
    folder: Path, device: str, dtype: str, settings: dict[str, Any], rows: int, samples: int, *, adapters: str
) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    new, _ = sizes(folder)
    space: dict[str, Any] = {}
    exec((folder / "rewards.py").read_text(), space)
    data = load_dataset(
        "json", data_files=str(folder / "prompts.jsonl"), split="train", cache_dir=settings["output_dir"]
    )
    config = GRPOConfig(
        **settings, per_device_train_batch_size=rows * samples, gradient_accumulation_steps=1, num_iterations=1,
        num_generations=samples, max_completion_length=new, temperature=1.0, beta=SETTINGS["beta"],
        epsilon=SETTINGS["clip"], loss_type="grpo", max_steps=1000,
        model_init_kwargs={"dtype": dtype, **base(adapters, dtype)},
    )  # fmt: skip
    return GRPOTrainer(
        model=str(folder / "policy"), args=config, reward_funcs=space["even"], train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder / "policy", padding_side="left"),
        callbacks=[TurnTaker(1, rows * samples * new)], peft_config=lora(adapters),
    )  # fmt: skip


def offline(
    name: str, folder: Path, device: str, dtype: str, settings: dict[str, Any], steps: int, *, adapters: str
) -> Any:
    import trl

    _, batch = sizes(folder)
    file = "sft.jsonl" if name == "sft" else "pairs.jsonl"
    data: Dataset = load_dataset(
        "json", data_files=str(folder / file), split="train", cache_dir=settings["output_dir"]
    )
    data = data.select(range(steps * batch))
    settings |= {"per_device_train_batch_size": batch, "num_train_epochs": 1000, "max_length": None}
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    model = load(folder, "scalar" if name == "reward" else "policy", device, dtype, adapters)
    given: dict[str, Any] = {
        "model": model, "train_dataset": data, "processing_class": tokenizer, "callbacks": [TurnTaker(steps, 0)],
    }  # fmt: skip
    if name == "reward":
        return trl.RewardTrainer(args=trl.RewardConfig(**settings), **given)
    if name == "sft":
        return trl.SFTTrainer(args=trl.SFTConfig(**settings), peft_config=lora(adapters), **given)
    return trl.DPOTrainer(
        args=trl.DPOConfig(**settings, beta=SETTINGS["dpo_beta"]), peft_config=lora(adapters),
        ref_model=None if adapters else load(folder, "policy", device, dtype), **given,
    )  # fmt: skip


def main() -> None:
    name, folder, threads, device, dtype, rows, samples = sys.argv[1:]
    name, checkpointed = name.removesuffix("-checkpointed"), name.endswith("-checkpointed")
    name, _, adapters = name.partition("-")
    torch.set_num_threads(int(threads))
    turns.imported = peak_mib()
    settings = common_settings(device, dtype, checkpointed)
    if name == "ppo":
        trainer = ppo(Path(folder), device, dtype, settings, int(rows), int(samples))
    elif name == "grpo":
        trainer = grpo(Path(folder), device, dtype, settings, int(rows), int(samples), adapters=adapters)
    else:
        trainer = offline(name, Path(folder), device, dtype, settings, int(rows), adapters=adapters)
    trainer.train()


if __name__ == "__main__":
    main()
