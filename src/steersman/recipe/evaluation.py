"""The recipe's section `evaluation`: what is measured of a policy at every look, beside the loss."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from steersman.config.recipe_text import load_yaml
from steersman.config.sections import Section
from steersman.data import DataConfig


class MetricSection(Section):
    """One metric of the table."""

    metric: str | None = Field(default=None, description="the metric's name, if the entry's own name is another")
    args: dict[str, Any] = Field(default_factory=dict, description="the metric's settings")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="input of the metric: the column that fills it, such as {references: summary}",
    )


def named_metrics(value: Any) -> Any:
    """A list of metrics' names as the section's entries; what is a section already stays."""
    listed = load_yaml(value) if isinstance(value, str) else value  # a list comes as text from the command
    listed = [listed] if isinstance(listed, str) else listed
    return {str(name): {} for name in listed} if isinstance(listed, list) else value


class HarnessSection(Section):
    """Tasks of lm-evaluation-harness (EleutherAI), from files that are here."""

    tasks: list[str] = Field(min_length=1, description="names of tasks, groups or tags")
    include: str | None = Field(default=None, description="folder with task files (YAML) of your own")
    limit: int | None = Field(default=None, ge=1, description="only the first so many rows of each task")
    shots: int | None = Field(
        default=None, ge=0, description="examples before each question; null: as many as the task says"
    )
    chat_template: bool = Field(default=False, description="ask through the model's chat template")


class EvaluationSection(Section):
    """What is measured of the policy at every look: metrics of its answers, tasks of lm-evaluation-harness."""

    data: DataConfig | None = Field(default=None, description="rows whose prompts are answered at every evaluation")
    metrics: dict[str, MetricSection] = Field(
        default_factory=dict, description="name: {metric, args, columns}; or a list of metrics' names"
    )
    max_new_tokens: int = Field(default=128, ge=1, description="longest answer, in tokens; the likeliest token each")
    stop: list[str] = Field(default_factory=list, description="strings that end an answer")
    harness: HarnessSection | None = Field(default=None, description="tasks of lm-evaluation-harness")

    _names = field_validator("metrics", mode="before")(named_metrics)

    @model_validator(mode="after")
    def _answers_are_judged(self) -> EvaluationSection:
        if (self.data is None) != (not self.metrics):
            given, other = ("metrics", "data") if self.metrics else ("data", "metrics")
            raise ValueError(f"evaluation.{given} needs evaluation.{other}: prompts are answered and then judged")
        return self
