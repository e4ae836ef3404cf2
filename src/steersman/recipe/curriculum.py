"""How prompts are drawn by their difficulty, as recipes say it."""

from __future__ import annotations

from pydantic import Field

from steersman.config.sections import Section


class CurriculumConfig(Section):
    """Draws prompts that are sometimes solved more often than those that always or never are."""

    right_from: float = Field(default=1.0, description="an answer is right from this score on")
    uniform: float = Field(
        default=0.25, gt=0, le=1, description="share of the prompts drawn without regard to difficulty"
    )
    forget: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="weight of a prompt's earlier answers beside its newest ones; 0: the newest alone count",
    )
    corrected: bool = Field(
        default=True,
        description="importance weights 1 / (N q) for prompts drawn with probability q, so that the expected "
        "gradient is that of uniform draws",
    )
