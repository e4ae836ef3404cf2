"""steersman's side of the learning comparison: `python benchmarks/learning_ours.py` with the words of `Job`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from learning_task import NEW, Job

from steersman.data import Batches, encode_prompts, layout, prompts
from steersman.model import Policy
from steersman.rollout import Engine
from steersman.run.device import resolve_device
from steersman.train.experience import tokens_of
from steersman.train.on_policy import OnPolicy
from steersman.train.roles import build_roles
from steersman.types import Prompt, Sample
from steersman.verbs.on_policy_recipes import RECIPES

NO_CLIP = 1e9


def recipe(job: Job) -> Any:
    """The recipe that computes what TRL's settings in learning_trl.py ask for."""
    s = job.settings
    optimizer = {"lr": s["lr"], "max_grad_norm": s.get("max_grad_norm", NO_CLIP)}
    values: dict[str, Any] = {
        "model": {"path": str(job.task / "start")},
        "data": {"path": str(job.prompts)},
        "rollout": {
            "prompts": s["prompts"], "samples": s["samples"], "max_new_tokens": NEW, "temperature": s["temperature"],
        },
        "algorithm": {
            "beta": s["beta"], "clip_low": s["clip"], "clip_high": s["clip"], "epochs": s["epochs"],
            "minibatches": s["minibatches"],
        },
        "optimizer": optimizer,
        "iterations": job.iterations,
        "run": {"seed": job.seed, "device": "cpu", "threads": 1},
    }  # fmt: skip
    if job.method == "ppo":
        values["algorithm"] |= {"gamma": s["gamma"], "lam": s["lam"]}
        values["reward"] = {"parts": {"judge": {"model": str(job.task / "judge")}}}
        values["critic"] = {
            "init": str(job.task / "critic"), "value_clip": s["value_clip"], "optimizer": optimizer,
        }  # fmt: skip
    else:
        values["reward"] = {"parts": {"mood": {"function": f"{job.task / 'rewards.py'}:mood"}}}
    return RECIPES[job.method].model_validate(values)


class Given:
    """In the engine's place: the responses that were given, with the policy's own log-probabilities."""

    def __init__(self, job: Job, policy: Policy) -> None:
        self.job, self.policy, self.iteration = job, policy, 0

    def generate(self, prompts: Sequence[Prompt], sampling: Any, **settings: Any) -> list[Sample]:
        samples = [
            Sample(prompt, ids, [0.0] * len(ids), "length", self.policy.tokenizer.decode(ids), index)
            for prompt in prompts
            for index, ids in enumerate(self.job.responses(self.iteration, prompt.ids))
        ]
        with torch.no_grad():
            logp = self.policy.logp(tokens_of(samples), temperature=sampling.temperature).logp
        for sample, row in zip(samples, logp.tolist(), strict=True):
            sample.logp = row[: len(sample.ids)]
        self.iteration += 1
        return samples


def in_double(roles: Any) -> None:
    """All models and scores in float64."""
    torch.set_default_dtype(torch.float64)
    shaping = roles.shaping
    roles.shaping = lambda scores, *rest, **more: shaping(scores.double(), *rest, **more)
    judges = [part.model for _, part in roles.reward.parts.values() if hasattr(part, "model")]
    for model in (roles.policy, roles.reference, roles.learner.critic, *judges):
        if model is not None:
            model.double()


def main() -> None:
    job = Job()
    torch.set_num_threads(1)
    chosen = recipe(job)
    roles = build_roles(chosen, resolve_device("cpu"))
    # no end token, so that every response has the same length
    engine: Any = Engine(roles.policy.model, roles.policy.tokenizer, eos_token_id=[])
    if job.given is not None:
        in_double(roles)
        engine = Given(job, roles.policy)
    roles.engine = engine
    train, _, _ = encode_prompts(
        prompts(chosen.data).train, layout(roles.policy, chosen.data), chosen.data, None, NEW
    )
    state = OnPolicy(chosen, roles, train, Batches(len(train), chosen.rollout.prompts, job.seed, drop_last=True))
    job.step(0, roles.policy.model)
    for done in range(1, job.iterations + 1):
        job.scores.append(state.iteration().stats["reward/total"])
        job.step(done, roles.policy.model)
    job.finish()


if __name__ == "__main__":
    main()
