"""Answers to prompts, judged by metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from steersman.data import DataConfig, Query, encode_prompts, layout
from steersman.data.load import prompts
from steersman.data.needed import whole_rows
from steersman.data.rows import BadRows
from steersman.distributed.ranks import ranks
from steersman.guards.terminal import say
from steersman.metrics import Corpus, Metric, metric
from steersman.model import Policy, context_length, whole_weights
from steersman.plan.memory import SamplingLoad
from steersman.recipe.evaluation import EvaluationSection, MetricSection
from steersman.recipe.sections import RolloutConfig
from steersman.reward.metrics import inputs, needs_of
from steersman.run.progress import ProgressLine
from steersman.setup.generators import open_generator, sample_on_all_ranks
from steersman.train.looks import answer_row
from steersman.types import Need, Needs, Sample, Stats, SteersmanError

SECTION = "evaluation.metrics"


class JudgedAnswers:
    """The same prompts, answered by the likeliest tokens at every look, and the metrics of all answers together.

    Raises SteersmanError where there is no prompt, a metric is unknown, or the data lack a column that it needs; a
    row that lacks a value there is a bad row of `evaluation.data`.
    """

    def __init__(self, policy: Policy, config: EvaluationSection) -> None:
        assert config.data is not None
        self.policy, self.config, data = policy, config, config.data
        self.rollout = RolloutConfig(max_new_tokens=config.max_new_tokens, stop=config.stop)
        loaded = prompts(data)
        found = [*loaded.train, *loaded.held_out]
        self.metrics: dict[str, Metric] = {}
        places = ranks().from_main(lambda: self._try_metrics(found, data), "the metrics")
        self.prompts, _, _ = encode_prompts(
            [found[place] for place in places], layout(policy, data), data, context_length(policy.model),
            config.max_new_tokens,
        )  # fmt: skip
        if not self.prompts:
            raise SteersmanError(f"evaluation.data: {data.path} has no prompt to answer")
        self.engine = open_generator(self.rollout, policy)

    def sampled(self) -> SamplingLoad:
        """What a look samples, for the forecast of memory."""
        longest, count = max(len(p.ids) for p in self.prompts), len(self.prompts)
        return SamplingLoad(self.policy, count, longest, self.config.max_new_tokens, self.engine.limits(count))

    def look(self) -> tuple[Stats, list[dict[str, Any]]]:
        """Metrics by name, and the answers as rows."""
        with whole_weights(self.policy):
            samples = sample_on_all_ranks(
                self.engine, self.prompts, self.rollout.sampling().as_greedy(), seed=0,
                progress=ProgressLine("answers to evaluate"),
            )  # fmt: skip
        stats = ranks().from_main(lambda: self._judged(samples), "the metrics")
        return stats, [answer_row(sample) for sample in samples]

    def _try_metrics(self, found: list[Query], data: DataConfig) -> list[int]:
        """Makes the metrics, and gives the places of the prompts whose rows have what they need."""
        for name, part in self.config.metrics.items():
            self.metrics[name] = metric(part.metric or name, part.args)
        bad = BadRows(data.on_bad_row, "evaluation.data.on_bad_row")
        try:
            places = whole_rows([query.row for query in found], needs_of_all(self.metrics, self.config.metrics), bad)
        except SteersmanError as error:
            raise SteersmanError(f"{SECTION}: {error}") from error
        if bad.counts:
            say(f"evaluation.data: {bad.sentence}")
        return places

    def _judged(self, samples: list[Sample]) -> Stats:
        return {
            name: judge(one, name, samples, self.config.metrics[name].columns, SECTION).value
            for name, one in self.metrics.items()
        }


def needs_of_all(metrics: Mapping[str, Metric], sections: Mapping[str, MetricSection]) -> Needs:
    """What all of the metrics need of rows; errors and faults name the entry of the recipe's section."""

    def needs(rows: Sequence[Mapping[str, Any]]) -> list[Need]:
        return [n for name, one in metrics.items() for n in needs_of(one, name, rows, sections[name].columns)]

    return needs


def judge(one: Metric, name: str, samples: list[Sample], columns: dict[str, str], section: str = "metrics") -> Corpus:
    """The metric over all samples, with the rows' columns; errors say which entry of the recipe's section it is."""
    try:
        return one.corpus([s.text for s in samples], **inputs(one, name, samples, columns))
    except SteersmanError as error:
        counted = " (rows count from 0)" if re.search(r"\brow \d", str(error)) else ""
        raise SteersmanError(f"{section}.{name}: {error}{counted}") from error
