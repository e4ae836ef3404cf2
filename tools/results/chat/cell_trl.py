"""One cell of the chat-model study by TRL, run by the Python of an environment that has it.

    PYTHONPATH=src PYTHON tools/results/chat/cell_trl.py TASK METHOD SEED MODEL ROWS FOLDER

Its own trainers; what is set to other than TRL's default is what the recipe in study.py has too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tasks import LOSSES, TASKS, last_number
from transformers import AutoModelForCausalLM, AutoTokenizer


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def common(folder: Path, seed: int, lr: float) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trl"), "learning_rate": lr, "seed": seed, "weight_decay": 0.0, "bf16": False,
        "use_cpu": True, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "dataloader_pin_memory": False, "max_grad_norm": 1.0, "gradient_accumulation_steps": 1,
    }  # fmt: skip


def grpo(task: str, settings: dict[str, Any], rows: list[dict[str, Any]], **given: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    iterations, prompts, samples = settings["iterations"], settings["prompts"], settings["samples"]
    plain, parts = given.pop("plain"), settings["trl_parts"]
    plain |= {"per_device_train_batch_size": prompts * samples // parts, "gradient_accumulation_steps": parts}
    config = GRPOConfig(
        **plain, num_generations=samples, num_iterations=1,
        max_completion_length=settings["new_tokens"], temperature=settings["temperature"], beta=settings["beta"],
        epsilon=settings["clip"], loss_type="grpo", scale_rewards="group", max_steps=iterations, top_k=0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": user(row["prompt"]), "row": json.dumps(row)} for row in rows])

    def reward(completions: list[list[dict[str, str]]], row: list[str], **rest: Any) -> list[float]:
        texts, columns = [c[0]["content"] for c in completions], [json.loads(r) for r in row]
        if task == "sums":
            return last_number(texts, [r["answer"] for r in columns])
        if task == "gsm8k":
            from steersman.reward.rules import math_answer

            return math_answer(texts, texts, answer=[r["answer"] for r in columns])
        from steersman.metrics import metric
        from steersman.metrics.core import MetricInput

        names = ("instruction_id_list", "kwargs")
        return [float(x) for x in metric("ifeval").rows(
            MetricInput(texts, columns={name: [r[name] for r in columns] for name in names})
        )]  # fmt: skip

    return GRPOTrainer(args=config, reward_funcs=reward, train_dataset=data, **given)


def offline(method: str, settings: dict[str, Any], rows: list[dict[str, Any]], **given: Any) -> Any:
    import trl
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.kto import KTOConfig, KTOTrainer

    plain = given.pop("plain") | {
        "num_train_epochs": 1, "lr_scheduler_type": "linear", "warmup_steps": settings["warmup"],
        "per_device_train_batch_size": settings["batch"], "max_length": settings["max_length"],
    }  # fmt: skip
    loss = LOSSES[method]
    if method == "sft":
        data = [{"prompt": user(r["prompt"]), "completion": assistant(r["chosen"])} for r in rows]
        return trl.SFTTrainer(args=trl.SFTConfig(**plain), train_dataset=Dataset.from_list(data), **given)
    if method == "kto":
        plain["per_device_train_batch_size"] *= 2
        data = [
            {"prompt": user(r["prompt"]), "completion": assistant(r[side]), "label": side == "chosen"}
            for r in rows for side in ("chosen", "rejected")
        ]  # fmt: skip
        config = KTOConfig(**plain, beta=loss["beta"])
        reference = AutoModelForCausalLM.from_pretrained(given["model"].name_or_path, dtype=torch.float32)
        return KTOTrainer(args=config, train_dataset=Dataset.from_list(data), ref_model=reference, **given)
    pairs = [(user(r["prompt"]), assistant(r["chosen"]), assistant(r["rejected"])) for r in rows]
    data = Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs])
    if method == "dpo":
        return trl.DPOTrainer(args=trl.DPOConfig(**plain, beta=loss["beta"]), train_dataset=data, **given)
    config = CPOConfig(**plain, loss_type="simpo", cpo_alpha=0.0, beta=loss["beta"], simpo_gamma=loss["gamma"])
    return CPOTrainer(args=config, train_dataset=data, **given)


def main() -> None:
    task, method, seed, model, table, out = sys.argv[1:]
    folder, settings = Path(out), TASKS[task]
    rows = [json.loads(line) for line in Path(table).read_text(encoding="utf-8").split("\n") if line]
    side = "left" if method == "grpo" else "right"
    given = {
        "plain": common(folder, int(seed), settings["lr"]),
        "model": AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        "processing_class": AutoTokenizer.from_pretrained(model, padding_side=side),
    }
    build = grpo(task, settings, rows, **given) if method == "grpo" else offline(method, settings, rows, **given)
    build.train()
    build.save_model(str(folder / "model"))
    (folder / "log.json").write_text(json.dumps(build.state.log_history))


if __name__ == "__main__":
    main()
