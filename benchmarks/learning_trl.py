"""TRL's side of the learning comparison, run by the Python of an environment that has it, with the words of `Job`.

Its own trainers; a callback keeps the weights. What is set to other than TRL's default is what steersman's recipe in
learning_ours.py has too.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from typing import Any

import torch
from datasets import Dataset
from learning_task import NEW, Job, read_rows, reward_function
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
    set_seed,
)

PLAIN = {
    "lr_scheduler_type": "constant", "weight_decay": 0.0, "bf16": False, "use_cpu": True, "report_to": "none",
    "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False,
}  # fmt: skip


class Keeper(TrainerCallback):
    """Keeps weights and scores; an iteration of the job is `steps` of the trainer's steps."""

    def __init__(self, job: Job, model: Any, steps: int) -> None:
        self.job, self.model, self.steps, self.seen = job, model, steps, 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if "objective/scores" in logs:
            self.job.scores.append(logs["objective/scores"])

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.seen += 1
        if self.seen % self.steps == 0:
            self.job.step(self.seen // self.steps, self.model)


def common(job: Job) -> dict[str, Any]:
    out = tempfile.mkdtemp(prefix="learning-trl-")
    return {**PLAIN, "output_dir": out, "learning_rate": job.settings["lr"], "seed": job.seed, "logging_steps": 1}


def load(job: Job, kind: str) -> Any:
    cls = AutoModelForCausalLM if kind == "start" else AutoModelForSequenceClassification
    return cls.from_pretrained(job.task / kind, dtype=torch.float32 if job.given is None else torch.float64)


def ppo(job: Job, model: Any, tokenizer: Any) -> Any:
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    s = job.settings
    ids = [tokenizer(row["prompt"])["input_ids"] for row in read_rows(job.prompts)]
    data = Dataset.from_dict({"input_ids": ids})
    config = PPOConfig(
        **common(job), per_device_train_batch_size=s["prompts"], gradient_accumulation_steps=1,
        num_mini_batches=s["minibatches"], num_ppo_epochs=s["epochs"], total_episodes=s["prompts"] * job.iterations,
        local_rollout_forward_batch_size=s["prompts"], response_length=NEW, temperature=s["temperature"],
        kl_coef=s["beta"], kl_estimator="k1", cliprange=s["clip"], cliprange_value=s["value_clip"], vf_coef=1.0,
        gamma=s["gamma"], lam=s["lam"], whiten_rewards=False, missing_eos_penalty=None, num_sample_generations=0,
    )  # fmt: skip
    if job.given is not None:
        ppo_trainer.batch_generation = given_to_ppo(job)
    return PPOTrainer(
        args=config, processing_class=tokenizer, model=model, ref_model=load(job, "start"),
        reward_model=load(job, "judge"), value_model=load(job, "critic"), train_dataset=data,
        eval_dataset=data.select(range(s["prompts"])), data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[Keeper(job, model, 1)],
    )  # fmt: skip


def given_to_ppo(job: Job) -> Any:
    """What stands in for TRL's sampling: the responses that were given, and the model's logits of them."""
    turn = iter(range(job.iterations))

    def sampled(model: Any, queries: torch.Tensor, rows: int, pad: int, config: Any) -> Any:
        from trl.experimental.ppo.ppo_trainer import forward

        iteration = next(turn)
        known = [[i for i in row if i != pad] for row in queries.tolist()]
        responses = torch.tensor([job.responses(iteration, ids)[0] for ids in known])
        whole = torch.cat([queries, responses], 1)
        with torch.no_grad():
            logits = forward(model, whole, pad).logits[:, queries.shape[1] - 1 : -1]
        return whole, logits / config.temperature

    return sampled


def grpo(job: Job, model: Any, tokenizer: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    s, mood = job.settings, reward_function(job.task)

    def scored(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        scores = mood(prompts, completions)
        job.scores.append(sum(scores) / len(scores))
        return scores

    config = GRPOConfig(
        **common(job), per_device_train_batch_size=s["prompts"] * s["samples"] // s["minibatches"],
        gradient_accumulation_steps=1, steps_per_generation=s["minibatches"], num_iterations=s["epochs"],
        num_generations=s["samples"], max_completion_length=NEW, temperature=s["temperature"], top_p=1.0, top_k=0,
        beta=s["beta"], epsilon=s["clip"], loss_type="grpo", scale_rewards="group",
        importance_sampling_level="token", mask_truncated_completions=False, max_grad_norm=s["max_grad_norm"],
        use_bias_correction_kl=False,  # TRL's default multiplies the KL term by the ratio; arXiv 2402.03300 does not
        max_steps=job.iterations * s["epochs"] * s["minibatches"],
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, args=config, reward_funcs=scored, train_dataset=Dataset.from_list(read_rows(job.prompts)),
        processing_class=tokenizer, callbacks=[Keeper(job, model, s["epochs"] * s["minibatches"])],
    )  # fmt: skip
    if job.given is not None:
        trainer._generate_single_turn = given_to_grpo(job)
    return trainer


def given_to_grpo(job: Job) -> Any:
    turn = iter(range(job.iterations))

    def sampled(prompt_ids: list[list[int]], *rest: Any, **more: Any) -> Any:
        iteration, used = next(turn), Counter()
        out = []
        for ids in prompt_ids:
            out.append(job.responses(iteration, ids)[used[tuple(ids)]])
            used[tuple(ids)] += 1
        return out, None

    return sampled


def main() -> None:
    job = Job()
    torch.set_num_threads(1)
    set_seed(job.seed)
    tokenizer = AutoTokenizer.from_pretrained(job.task / "start", padding_side="left")
    model = load(job, "start")
    job.step(0, model)
    trainer = (ppo if job.method == "ppo" else grpo)(job, model, tokenizer)
    trainer.train()
    import trl

    job.finish(trl=trl.__version__)


if __name__ == "__main__":
    main()
