"""`steersman generate`: responses of a model to prompts, to read or to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from rich.console import Console

from steersman.data import DataConfig, Query, Row, encode_prompts, layout, prompts
from steersman.run.config import Section
from steersman.run.device import resolve_device, set_threads
from steersman.run.folder import write_atomic
from steersman.run.terminal import printable
from steersman.train.models import context_length, policy_from
from steersman.train.roles import sampler
from steersman.train.sections import ModelConfig, RolloutConfig, RunConfig
from steersman.types import Sample


class GenerateRecipe(Section):
    """Sample responses from a model; prompts come from `prompts` or from `data`."""

    model: ModelConfig
    prompts: list[str] = Field(default_factory=list, description="prompts as text")
    data: DataConfig | None = None
    rollout: RolloutConfig = RolloutConfig(held_out=0)
    greedy: bool = Field(default=False, description="the likeliest token each time")
    out: str | None = Field(default=None, description="JSONL file to write; null prints the responses")
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _has_prompts(self) -> GenerateRecipe:
        if bool(self.prompts) == (self.data is not None):
            raise ValueError("give either prompts, such as --prompts '[\"Once upon a time\"]', or the section data")
        return self


def run(recipe: GenerateRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Samples, and prints the responses or writes them as JSONL rows of prompt, completion, finish and logp."""
    samples = sampled(recipe)
    if recipe.out is None:
        _show(samples)
    else:
        write_atomic(Path(recipe.out), "".join(json.dumps(_row(s), ensure_ascii=False) + "\n" for s in samples))
    return {"samples": len(samples), "out": recipe.out}


def sampled(recipe: GenerateRecipe) -> list[Sample]:
    """The responses that the recipe asks for."""
    set_threads(recipe.run.threads or None)
    device, rollout = resolve_device(recipe.run.device), recipe.rollout
    policy = policy_from(recipe.model, recipe.run, device, trainable=False)
    config = recipe.data or DataConfig(path="--prompts")
    rows = (
        prompts(config).train
        if recipe.data
        else [Query(p, Row({}, "prompts", i + 1)) for i, p in enumerate(recipe.prompts)]
    )
    laid = layout(policy, config)
    asked, _, _ = encode_prompts(rows, laid, config, context_length(policy.model), rollout.max_new_tokens)
    engine = sampler(policy, rollout)
    sampling = rollout.sampling().as_greedy() if recipe.greedy else rollout.sampling()
    return engine.generate(asked, sampling, n=rollout.samples, seed=recipe.run.seed)


def _row(sample: Sample) -> dict[str, Any]:
    return {
        "prompt": sample.prompt.text,
        "completion": sample.text,
        "finish": sample.finish,
        "logp": round(sum(sample.logp), 4),
        "tokens": len(sample.ids),
    }


def _show(samples: list[Sample]) -> None:
    console = Console()
    for sample in samples:
        console.print(printable(sample.prompt.text), style="dim", end="", markup=False, highlight=False)
        console.print(printable(sample.text), markup=False, highlight=False)
        console.print()
