"""Judging a cell: its model answers the held-out prompts, and metrics say how well and how naturally."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steersman.atomic import write_atomic
from steersman.data import DataConfig, encode_prompts, layout, prompts
from steersman.distributed.micro import micro_batches
from steersman.grue.cells import Cell, data_folder, generation, reward_parts, start_model
from steersman.grue.recipe import ZERO, GrueRecipe
from steersman.grue.task import Row, Task
from steersman.jsonl import jsonl_text, read_jsonl
from steersman.metrics import Metric, metric
from steersman.metrics.core import Corpus, bootstrap
from steersman.model import Policy, context_length
from steersman.ops.masked import masked_sum
from steersman.recipe.sections import RolloutConfig
from steersman.reward import RewardConfig, WeightedSum, build_reward
from steersman.run.device import resolve_device, set_threads
from steersman.run.run_config import RunConfig
from steersman.run.seed import SamplingStream
from steersman.setup.generators import open_generator
from steersman.setup.models import policy_from
from steersman.train.experience import tokens_of
from steersman.types import Sample, SteersmanError


def judge(cell: Cell, recipe: GrueRecipe) -> dict[str, Any]:
    """Samples one answer to each held-out prompt and writes held_out.jsonl and evaluation.json into the cell.

    `preference` are the task's metrics, `text_statistics` what the text is like; each is [value, low, high] with the
    bootstrap interval over prompts, or null with a reason in `missing`. `reward` is what was optimised, weighted
    and summed, and its parts.
    """
    began = time.monotonic()
    samples, reward = answers(cell, recipe)
    rows, texts = [s.prompt.row for s in samples], [s.text.strip() for s in samples]
    scores = reward.score(samples)
    missing: dict[str, str] = {}
    found = {
        "reward": {"total": _mean(scores.total)} | {k: _mean(v) for k, v in scores.parts.items()},
        "preference": {
            name: _value(name, lambda m=m, spec=spec: corpus_value(m, spec, texts, rows), missing)
            for name, (m, spec) in metrics_of(cell.task).items()
        },
        "natural": text_statistics(cell, recipe, samples, texts, missing),
    }
    lines = [
        {"prompt": row["prompt"], "references": row["references"], "text": text, "finish": s.finish,
         "reward": float(scores.total[i])}
        for i, (s, row, text) in enumerate(zip(samples, rows, texts, strict=True))
    ]  # fmt: skip
    write_atomic(cell.folder / "held_out.jsonl", jsonl_text(lines))
    result = {
        **{k: v for k, v in cell.stamp.items() if k in ("task", "method", "seed", "verb")},
        **found, "missing": missing, "prompts": len(samples), "seconds": round(time.monotonic() - began, 2),
    }  # fmt: skip
    write_atomic(cell.result, json.dumps(result, indent=1))
    return result


def answers(cell: Cell, recipe: GrueRecipe) -> tuple[list[Sample], WeightedSum]:
    """One answer to each held-out prompt, by the cell's model as it was saved, and the reward that judges it."""
    set_threads(recipe.run.threads or None)
    run = RunConfig(seed=cell.seed, device=recipe.run.device, micro_tokens=recipe.run.micro_tokens)
    path = recipe.model.path if cell.method == ZERO else str(cell.folder / "model")
    policy = _policy(recipe, path, run)
    config = DataConfig(
        path=str(data_folder(recipe, cell.task) / "held-out.jsonl"),
        wrap_in_chat=False,
        on_too_long="truncate",
        held_out=0,
    )
    rollout = RolloutConfig(**generation(recipe, cell.task))
    asked, _, _ = encode_prompts(
        prompts(config).train, layout(policy, config), config, context_length(policy.model), rollout.max_new_tokens
    )
    sampling = rollout.sampling().as_greedy() if recipe.evaluation.greedy else rollout.sampling()
    samples = open_generator(rollout, policy).generate(asked, sampling, n=1, seed=(cell.seed, SamplingStream.GRUE))
    parts = RewardConfig.model_validate({"parts": reward_parts(recipe, cell.task)})
    return samples, build_reward(parts, policy.tokenizer, resolve_device(recipe.run.device))


def metrics_of(task: Task) -> dict[str, tuple[Metric, Mapping[str, Any]]]:
    """The task's metrics with what the task says about each."""
    return {name: (metric(spec["metric"], spec.get("args", {})), spec) for name, spec in task.metrics.items()}


def corpus_value(made: Metric, spec: Mapping[str, Any], texts: Sequence[str], rows: Sequence[Row]) -> Corpus:
    """The metric over a set of texts, with what it needs from their rows."""
    return made.corpus(list(texts), **metric_inputs(made, spec, rows))


def metric_inputs(made: Metric, spec: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """What a metric needs beside the texts: columns of the rows; sources are the prompts.

    Raises SteersmanError for a row without it, or with a value that the metric can not read.
    """
    out = {}
    for need in made.needs:
        column = spec.get("columns", {}).get(need, "prompt" if need == "sources" else need)
        values = [row.get(column) for row in rows]
        for row, value in zip(rows, values, strict=True):
            if value is None or value in ([], ""):
                raise SteersmanError(
                    f"metric '{made.name}' needs {need}, and a row has no {column}: {row['prompt'][:60]!r}"
                )
            if wrong := made.wrong_with(need, value):
                raise SteersmanError(
                    f"metric '{made.name}': {wrong} (column {column} of the row {row['prompt'][:60]!r})"
                )
        out[need] = values
    return out


def text_statistics(
    cell: Cell, recipe: GrueRecipe, samples: Sequence[Sample], texts: Sequence[str], missing: dict[str, str]
) -> dict[str, Any]:
    """What the texts are like, whatever their task: perplexity under the start model, variety, length.

    Distinct, entropy and MSTTR depend on how many texts there are; the cells of one task all have as many.
    """
    named = {
        "distinct1": metric("distinct", {"n": 1}),
        "distinct2": metric("distinct", {"n": 2}),
        "entropy2": metric("entropy", {"n": 2}),
        "msttr": metric("msttr", {"segment": recipe.evaluation.msttr_segment}),
        "repetition": metric("repetition"),
        "length": metric("length"),
    }
    out = {"perplexity": _value("perplexity", lambda: perplexity(cell, recipe, samples), missing)}
    out |= {name: _value(name, lambda m=m: m.corpus(list(texts)), missing) for name, m in named.items()}
    empty = np.array([[float(not text), 1.0] for text in texts])
    out["empty"] = _value("empty", lambda: bootstrap(empty, lambda s: s[:, 0] / s[:, 1], "empty"), missing)
    return out


@torch.no_grad()
def perplexity(cell: Cell, recipe: GrueRecipe, samples: Sequence[Sample]) -> Corpus:
    """exp of the mean negative log-probability per answer token, its end included, given the prompt, under the model
    that training started from (with fresh weights: the supervised one of the same seed), at temperature 1."""
    run = RunConfig(seed=cell.seed, device=recipe.run.device, micro_tokens=recipe.run.micro_tokens)
    model = _policy(recipe, start_model(recipe, cell.task, cell.seed), run)
    lengths = torch.tensor([len(s.prompt.ids) + len(s.ids) for s in samples])
    sums = np.zeros((len(samples), 2))
    for index in micro_batches(lengths, recipe.run.micro_tokens):
        tokens = tokens_of([samples[i] for i in index.tolist()]).untruncated().to(model.device)
        nats = -masked_sum(model.logp(tokens).logp, tokens.mask, dim=-1)
        sums[index.numpy(), 0] = nats.double().cpu().numpy()
        sums[index.numpy(), 1] = tokens.response_length.cpu().numpy()
    return bootstrap(sums, lambda s: np.exp(s[:, 0] / s[:, 1]), "perplexity")


def _policy(recipe: GrueRecipe, path: str, run: RunConfig) -> Policy:
    config = recipe.model.model_copy(update={"path": path, "scratch": None, "lora": None})
    return policy_from(config, run, resolve_device(run.device), trainable=False)


def _value(name: str, make: Any, missing: dict[str, str]) -> list[float | None] | None:
    """[value, low, high]; None, and the reason in `missing`, where a cell's texts have none (all empty, too few)."""
    try:
        found: Corpus = make()
    except SteersmanError as error:
        missing[name] = str(error)
        return None
    return [v if math.isfinite(v) else None for v in list(asdict(found).values())[:3]]


def _mean(values: torch.Tensor) -> float:
    return float(values.double().mean())


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """The rows of a cell's held_out.jsonl."""
    return read_jsonl(folder / "held_out.jsonl")
