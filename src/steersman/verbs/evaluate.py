"""`steersman evaluate`: metrics with confidence intervals over a file of completions, or over a model's answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator
from rich.table import Table

from steersman.atomic import check_places, write_atomic
from steersman.config.sections import Section, key_names
from steersman.data import read_rows
from steersman.data.encoding import check_encoding
from steersman.data.needed import whole_rows
from steersman.data.rows import BadRows
from steersman.distributed.parallel import ParallelConfig
from steersman.distributed.ranks import ranks
from steersman.evaluation import judge, needs_of_all
from steersman.guards.terminal import printable, say
from steersman.metrics import Corpus, Metric, metric
from steersman.recipe.evaluation import MetricSection, named_metrics
from steersman.run.console import new_console
from steersman.run.run_config import ManyRunConfig
from steersman.types import Needs, Prompt, Sample, SteersmanError
from steersman.verbs.generate import GenerateRecipe, responses


class EvaluateRecipe(Section):
    """Metrics over the completions of `file`, or over what a model answers (`generate`)."""

    file: str | None = Field(default=None, description="rows with completions: jsonl, json, csv, tsv, parquet")
    encoding: str | None = Field(
        default=None, description="encoding of `file`, such as gb18030, big5, utf-16 or cp1252; null: UTF-8"
    )
    completion: str = Field(default="completion", description="the column of the texts to judge")
    prompt: str = Field(default="prompt", description="the column of the prompts, for metrics that read sources")
    generate: GenerateRecipe | None = Field(default=None, description="answers of a model in the place of a file")
    metrics: dict[str, MetricSection] = Field(
        default_factory=dict, description="name: {metric, args, columns}; or a list of metrics' names"
    )
    as_json: bool = Field(default=False, description="print JSON instead of a table")
    out: str | None = Field(default=None, description="JSON file to write")

    _names = field_validator("metrics", mode="before")(named_metrics)

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        return None if value is None else check_encoding(value)

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return key_names(generate=GenerateRecipe.unread_keys())

    @property
    def run(self) -> ManyRunConfig:
        """Where the answers are sampled, on `generate.run.devices` ranks."""
        return ManyRunConfig() if self.generate is None else self.generate.run

    @property
    def parallel(self) -> ParallelConfig:
        """How those ranks share the work."""
        return ParallelConfig() if self.generate is None else self.generate.parallel

    @model_validator(mode="after")
    def _one_source(self) -> EvaluateRecipe:
        if (self.file is None) == (self.generate is None):
            raise ValueError("give either a file of completions or the section generate")
        if self.encoding is not None and self.file is None:
            raise ValueError("encoding is of the file of completions, and none is given; see generate.data.encoding")
        if not self.metrics:
            raise ValueError("give metrics, such as --metrics '[rougeL, chrf]'; docs/metrics.md lists them")
        return self


def run(recipe: EvaluateRecipe) -> dict[str, Any]:
    """Judges, and prints the table; returns name -> value, low, high, count, implementation.

    Answers are sampled by all ranks, and judged by rank 0. A model's answers are kept as `generate.out`, or beside
    `out` with the ending .completions.jsonl.
    """
    made: dict[str, Metric] = {}

    def make() -> None:
        made.update({name: metric(part.metric or name, part.args) for name, part in recipe.metrics.items()})
        check_places(recipe.out, _answers_file(recipe))

    ranks().from_main(make, "the metrics")
    needs = needs_of_all(made, recipe.metrics)
    samples = _from_file(recipe, needs) if recipe.generate is None else _answers(recipe, recipe.generate, needs)
    return ranks().from_main(lambda: _judged(recipe, made, samples), "the metrics")


def _judged(recipe: EvaluateRecipe, made: dict[str, Metric], samples: list[Sample]) -> dict[str, Any]:
    if not samples:
        raise SteersmanError(f"{recipe.file or 'generate'}: there is no completion to judge")
    values = {name: judge(one, name, samples, recipe.metrics[name].columns) for name, one in made.items()}
    empty = [row for row, sample in enumerate(samples) if not sample.text.strip()]
    summary = {
        "completions": len(samples),
        "completions_file": recipe.file or _answers_file(recipe),
        "empty": empty,
        "metrics": {name: _entry(made[name], corpus) for name, corpus in values.items()},
    }
    text = json.dumps(summary, ensure_ascii=False, indent=1)
    if recipe.out is not None:
        write_atomic(Path(recipe.out), text + "\n")
    if recipe.as_json:
        print(text)
    else:
        _show(made, values, len(samples), empty)
    return summary


def _answers(recipe: EvaluateRecipe, generate: GenerateRecipe, needs: Needs) -> list[Sample]:
    """A model's answers, kept where `_answers_file` says."""
    kept = _answers_file(recipe)
    if kept is None and ranks().main:
        say("the answers are not kept; --generate.out FILE.jsonl keeps them")
    return [_sample(r.prompt, r.text) for r in responses(generate, kept, needs, "generate.")]


def _answers_file(recipe: EvaluateRecipe) -> str | None:
    """Where a model's answers go: `generate.out`, or a file beside `out`."""
    if recipe.generate is None:
        return None
    beside = None if recipe.out is None else str(Path(recipe.out).with_suffix(".completions.jsonl"))
    return recipe.generate.out or beside


def _from_file(recipe: EvaluateRecipe, needs: Needs) -> list[Sample]:
    assert recipe.file is not None
    samples = []
    rows = list(read_rows(recipe.file, encoding=recipe.encoding, encoding_key="encoding"))
    whole_rows(rows, needs, BadRows(key=None))
    for row in rows:
        text = row.data.get(recipe.completion)
        if not isinstance(text, str):
            have = ", ".join(row.data)
            raise SteersmanError(
                f"{row.where()}: there is no text in the column '{recipe.completion}'; the row has {have}. "
                f"Name the column with --completion"
            )
        prompt = row.data.get(recipe.prompt)
        samples.append(_sample(Prompt([], prompt if isinstance(prompt, str) else "", row.data), text))
    return samples


def _sample(prompt: Prompt, text: str) -> Sample:
    """A text as metrics read it, who need neither its tokens nor how it ended."""
    return Sample(prompt, [], [], "eos", text)


def _entry(one: Metric, corpus: Corpus) -> dict[str, Any]:
    low, high = (None if math.isnan(x) else x for x in (corpus.low, corpus.high))
    return {
        "value": corpus.value,
        "low": low,
        "high": high,
        "better": one.better,
        "implementation": one.implementation,
    }


def _show(made: dict[str, Metric], values: dict[str, Corpus], count: int, empty: list[int]) -> None:
    console = new_console()
    table = Table("metric", "value", "95% interval", "better", "computed by")
    for name, corpus in values.items():
        interval = "-" if math.isnan(corpus.low) else f"{_number(corpus.low)} to {_number(corpus.high)}"
        how = printable(made[name].implementation)
        table.add_row(printable(name), _number(corpus.value), interval, made[name].better, how)
    console.print(table)
    rows = f"; rows {', '.join(map(str, empty[:10]))}{', ...' if len(empty) > 10 else ''}" if empty else ""
    console.print(f"{count} completions, {len(empty)} of them empty{rows}")


def _number(x: float) -> str:
    return f"{x:.4f}" if abs(x) < 10 else f"{x:.2f}"
