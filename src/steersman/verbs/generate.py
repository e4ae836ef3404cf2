"""`steersman generate`: responses of a model to prompts, to read or to train on."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from rich.console import Console

from steersman.atomic import check_places, write_atomic
from steersman.config.sections import Section, key_names
from steersman.data import DataConfig, Query, Row, encode_prompts, keys_of_other_kinds, layout, prompts, wraps
from steersman.distributed.parallel import WithoutZeroConfig
from steersman.distributed.ranks import ranks
from steersman.guards.terminal import printable, say
from steersman.model import whole_weights
from steersman.recipe.sections import LEARNED_ONLY, TRAINED_ONLY, ModelConfig, RolloutConfig
from steersman.run.run_config import KEPT_ONLY, ManyRunConfig, device_of
from steersman.setup.generators import open_generator, sample_on_all_ranks
from steersman.setup.models import context_length, policy_from
from steersman.types import Sample


class GenerateRecipe(Section):
    """Sample responses from a model; prompts come from `prompts` or from `data`."""

    model: ModelConfig
    prompts: list[str] = Field(default_factory=list, description="prompts as text")
    data: DataConfig | None = None
    wrap_in_chat: bool | None = Field(
        default=None,
        description="put `prompts` into the chat template as a user's turn; null: where the model has a template of "
        "its own (rows of `data`: data.wrap_in_chat)",
    )
    rollout: RolloutConfig = RolloutConfig(held_out=0)
    greedy: bool = Field(default=False, description="the likeliest token each time")
    out: str | None = Field(default=None, description="JSONL file to write; null prints the responses")
    run: ManyRunConfig = ManyRunConfig()
    parallel: WithoutZeroConfig = WithoutZeroConfig()

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return keys_of_other_kinds("query") | key_names(
            model=TRAINED_ONLY,
            run=KEPT_ONLY,
            rollout=("prompts", "held_out", *LEARNED_ONLY),
            data=("max_length", "shuffle", "mix"),
        )

    @model_validator(mode="after")
    def _has_prompts(self) -> GenerateRecipe:
        if bool(self.prompts) == (self.data is not None):
            raise ValueError("give either prompts, such as --prompts '[\"Once upon a time\"]', or the section data")
        if self.data is not None and self.wrap_in_chat is not None:
            raise ValueError("wrap_in_chat is about prompts; for rows of data set data.wrap_in_chat")
        return self


def run(recipe: GenerateRecipe) -> dict[str, Any]:
    """Samples, and prints the responses or writes them as JSONL rows of prompt, completion, finish and logp.

    A row keeps the other columns of its prompt's data row, so that metrics can read them.
    """
    ranks().from_main(lambda: check_places(recipe.out), "the file of responses")
    samples = sampled(recipe)
    if recipe.out is None:
        _show(samples)
    else:
        out = Path(recipe.out)
        ranks().from_main(lambda: write_samples(samples, out), "the responses")
        if ranks().main:
            say(f"{len(samples)} responses written to {out}")
    return {"samples": len(samples), "out": recipe.out}


def sampled(recipe: GenerateRecipe) -> list[Sample]:
    """The responses that the recipe asks for."""
    device, rollout = device_of(recipe.run), recipe.rollout
    policy = policy_from(recipe.model, recipe.run, device, trainable=False)
    config = recipe.data or DataConfig(path="--prompts", wrap_in_chat=recipe.wrap_in_chat)
    if config.wrap_in_chat is None and wraps(policy.tokenizer, config):
        off = "data.wrap_in_chat" if recipe.data else "wrap_in_chat"
        say(f"plain-text prompts become a user's turn in the model's chat template (off: --{off} false)")
    rows = (
        prompts(config).train
        if recipe.data
        else [Query(p, Row({}, "prompts", i + 1)) for i, p in enumerate(recipe.prompts)]
    )
    laid = layout(policy, config)
    asked, _, _ = encode_prompts(rows, laid, config, context_length(policy.model), rollout.max_new_tokens)
    sampling = rollout.sampling().as_greedy() if recipe.greedy else rollout.sampling()
    with closing(open_generator(rollout, policy)) as engine, whole_weights(policy):
        samples = sample_on_all_ranks(engine, asked, sampling, n=rollout.samples, seed=recipe.run.seed)
    for prompt in asked:
        prompt.row = {**prompt.row, "prompt": rows[prompt.index].prompt}
    return samples


def write_samples(samples: list[Sample], path: Path) -> None:
    """The samples as JSONL rows, each with its data row's columns."""
    write_atomic(path, "".join(json.dumps(_row(s), ensure_ascii=False, default=str) + "\n" for s in samples))


def _row(sample: Sample) -> dict[str, Any]:
    return {
        **sample.prompt.row,
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
