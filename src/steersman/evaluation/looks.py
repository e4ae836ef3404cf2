"""All that the section `evaluation` asks for, at every look."""

from __future__ import annotations

from steersman.evaluation.answers import JudgedAnswers
from steersman.evaluation.harness import Harness
from steersman.model import Policy
from steersman.plan.memory import SamplingLoad
from steersman.recipe.evaluation import EvaluationSection
from steersman.train.session import Session
from steersman.types import Stats

PREFIX = "evaluation/"


class Evaluation:
    """Measures a policy as the section says; without one, nothing. What is asked for is checked before training
    begins, and is measured of the weights of the session's step."""

    def __init__(self, policy: Policy, config: EvaluationSection | None, session: Session) -> None:
        self.session = session
        self.answers: JudgedAnswers | None = None
        self.harness: Harness | None = None
        if config is not None and config.metrics:
            self.answers = JudgedAnswers(policy, config)
        if config is not None and config.harness is not None:
            self.harness = Harness(policy, config.harness, session.config.micro_tokens)

    def look(self) -> Stats:
        """`evaluation/NAME` of each metric, `evaluation/TASK/MEASURE` of each task; answers go to
        evaluation.jsonl."""
        stats: Stats = {}
        if self.answers is not None:
            stats, rows = self.answers.look()
            self.session.log.evaluation(self.session.step, rows)
        if self.harness is not None:
            stats = {**stats, **self.harness.look()}
        return {PREFIX + name: value for name, value in stats.items()}

    def larger(self, sampled: SamplingLoad | None) -> SamplingLoad | None:
        """Of what a look samples here, and what is sampled elsewhere, the one with more tokens."""
        own = None if self.answers is None else self.answers.sampled()
        found = [load for load in (own, sampled) if load is not None]
        return max(found, key=lambda load: load.sequences * (load.longest + load.new_tokens), default=None)

    def of_saved(self, *, again: bool) -> Stats:
        """The numbers of the weights that a run ends with: the newest look's, or, where these may be an earlier
        step's, measured `again`."""
        if again:
            return self.look()
        rows = [{k: v for k, v in row.items() if k.startswith(PREFIX)} for row in self.session.metrics()]
        return next((row for row in reversed(rows) if row), {})
