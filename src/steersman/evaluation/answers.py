"""Answers to prompts, judged by metrics."""

from __future__ import annotations

import re
from typing import Any

from steersman.data import encode_prompts, layout
from steersman.data.load import prompts
from steersman.distributed.ranks import ranks
from steersman.metrics import Corpus, Metric, metric
from steersman.model import Policy, context_length, whole_weights
from steersman.plan.memory import SamplingLoad
from steersman.recipe.evaluation import EvaluationSection
from steersman.recipe.sections import RolloutConfig
from steersman.reward.metrics import inputs
from steersman.run.progress import ProgressLine
from steersman.setup.generators import open_generator, sample_on_all_ranks
from steersman.train.looks import answer_row
from steersman.types import Sample, Stats, SteersmanError

SECTION = "evaluation.metrics"


class JudgedAnswers:
    """The same prompts, answered by the likeliest tokens at every look, and the metrics of all answers together.

    Raises SteersmanError where there is no prompt, a metric is unknown, or the data lack a column that it needs.
    """

    def __init__(self, policy: Policy, config: EvaluationSection) -> None:
        assert config.data is not None
        self.policy, self.config, data = policy, config, config.data
        self.rollout = RolloutConfig(max_new_tokens=config.max_new_tokens, stop=config.stop)
        found = prompts(data)
        self.prompts, _, _ = encode_prompts(
            [*found.train, *found.held_out], layout(policy, data), data, context_length(policy.model),
            config.max_new_tokens,
        )  # fmt: skip
        if not self.prompts:
            raise SteersmanError(f"evaluation.data: {data.path} has no prompt to answer")
        self.metrics: dict[str, Metric] = {}
        self.engine = open_generator(self.rollout, policy)
        ranks().from_main(self._try_metrics, "the metrics")

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

    def _try_metrics(self) -> None:
        for name, part in self.config.metrics.items():
            self.metrics[name] = metric(part.metric or name, part.args)
        unsaid = [Sample(prompt, [], [], "eos") for prompt in self.prompts]
        for name, one in self.metrics.items():
            try:
                inputs(one, name, unsaid, self.config.metrics[name].columns)
            except SteersmanError as error:
                raise SteersmanError(f"{SECTION}: {error}") from error

    def _judged(self, samples: list[Sample]) -> Stats:
        return {
            name: judge(one, name, samples, self.config.metrics[name].columns, SECTION).value
            for name, one in self.metrics.items()
        }


def judge(one: Metric, name: str, samples: list[Sample], columns: dict[str, str], section: str = "metrics") -> Corpus:
    """The metric over all samples, with the rows' columns; errors say which entry of the recipe's section it is."""
    try:
        return one.corpus([s.text for s in samples], **inputs(one, name, samples, columns))
    except SteersmanError as error:
        counted = " (rows count from 0)" if re.search(r"\brow \d", str(error)) else ""
        raise SteersmanError(f"{section}.{name}: {error}{counted}") from error
