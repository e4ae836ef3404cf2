"""A metric as a reward: texts against the references, sources and columns of their data rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from steersman.distributed.ranks import ranks
from steersman.metrics import Metric
from steersman.reward.core import Scores, columns_of
from steersman.types import Need, Sample, SteersmanError

_log = logging.getLogger("steersman.reward")
_OTHER_NAMES = {"references": ("references", "reference")}


class MetricReward:
    """The metric's score of every response; references and columns come from the prompts' data rows.

    `columns` says which column of the data fills what the metric needs; without it the column of the same name
    does (`reference` for references too), and the prompts themselves for sources. `empty` is the score of an
    empty response; without it the metric's own value counts, and a log line says so the first time.

    Raises SteersmanError naming the reward when the metric scores whole sets only, a column is missing, or the
    metric refuses a sample.
    """

    model = None
    reads_ids = False

    def __init__(
        self, metric: Metric, name: str, columns: Mapping[str, str] | None = None, empty: float | None = None
    ):
        self.metric, self.name, self.columns, self.empty = metric, name, dict(columns or {}), empty
        self.told_empty = False
        if not metric.per_sample:
            hint = "; give it `args: {corpus_file: FILE.jsonl}`" if metric.name == "cider" else ""
            raise SteersmanError(
                f"reward '{name}': the metric {metric.name} is defined on a whole set of texts and can not be a "
                f"reward as it is{hint}"
            )
        for key in self.columns:
            if key not in metric.needs:
                needed = ", ".join(metric.needs) or "no column"
                raise SteersmanError(
                    f"reward '{name}': columns: the metric {metric.name} has no '{key}'; it needs {needed}"
                )

    def needs(self, rows: Sequence[Mapping[str, Any]]) -> list[Need]:
        return needs_of(self.metric, self.name, rows, self.columns)

    def describe(self) -> str:
        return f"metric {self.metric.name}: {self.metric.implementation}"

    def score(self, samples: Sequence[Sample]) -> Scores:
        return ranks().from_main(lambda: self._score(samples), f"reward '{self.name}'")

    def _score(self, samples: Sequence[Sample]) -> Scores:
        empty = [i for i, s in enumerate(samples) if not s.text.strip()]
        if empty and self.empty is None and not self.told_empty:
            self.told_empty = True
            _log.warning(
                "reward '%s': sample %d is empty; %s scores it by its own rule (set `empty` to choose)",
                self.name, empty[0], self.metric.name,
            )  # fmt: skip
        left = set(empty) if self.empty is not None else set()
        judged = [i for i in range(len(samples)) if i not in left]
        total = torch.full((len(samples),), self.empty or 0.0)
        if judged:
            total[judged] = torch.tensor(self._judge([samples[i] for i in judged]))
        return Scores(total, {self.name: total})

    def _judge(self, samples: Sequence[Sample]) -> list[float]:
        given = inputs(self.metric, self.name, samples, self.columns)
        try:
            return self.metric.score([s.text for s in samples], **given)
        except SteersmanError as error:
            without = " and counted without empty responses" if self.empty is not None else ""
            first = samples[0].prompt.text[:60]
            raise SteersmanError(
                f"reward '{self.name}': {error} (rows counted from 0{without}; prompt of row 0: {first!r})"
            ) from error


def needs_of(metric: Metric, name: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[Need]:
    """The columns that the metric needs of every row; `name` is who asks. Raises SteersmanError as `inputs` does."""
    filled = _filled(metric, name, columns_of(rows), columns)
    who = f"'{name}' (metric {metric.name})"
    return [Need(column, who, partial(metric.wrong_with, need)) for need, column in filled.items() if column]


def inputs(metric: Metric, name: str, samples: Sequence[Sample], columns: Mapping[str, str]) -> dict[str, list[Any]]:
    """What the metric needs beside the texts, out of the samples' data rows; `name` is who asks.

    Raises SteersmanError when the data have no such column.
    """
    filled = _filled(metric, name, columns_of(s.prompt.row for s in samples), columns)
    return {
        need: [s.prompt.text if column is None else s.prompt.row.get(column) for s in samples]
        for need, column in filled.items()
    }


def _filled(metric: Metric, name: str, have: Sequence[str], columns: Mapping[str, str]) -> dict[str, str | None]:
    """What the metric needs -> the column of the data that fills it, None where the prompt does."""
    out: dict[str, str | None] = {}
    for need in metric.needs:
        if need == "sources" and need not in columns:
            out[need] = None
            continue
        wanted = (columns[need],) if need in columns else _OTHER_NAMES.get(need, (need,))
        column = next((c for c in wanted if c in have), None)
        if column is None:
            raise SteersmanError(
                f"'{name}': the metric {metric.name} needs {need}, and the data have no column '{wanted[0]}'; they "
                f"have: {', '.join(have) or 'none'}. Point to one: "
                f"`{name}: {{metric: {metric.name}, columns: {{{need}: NAME}}}}`"
            )
        out[need] = column
    return out
