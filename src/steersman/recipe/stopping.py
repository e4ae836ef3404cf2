"""When a run may end before its time, as recipes say it."""

from __future__ import annotations

from pydantic import Field

from steersman.config.sections import Section


class StopConfig(Section):
    """Ends a run early, and takes up the weights of its best look at held-out prompts."""

    judge: str = Field(
        description="reward whose mean on held-out prompts decides. On-policy: a part of the reward, best of "
        "weight 0, so that it is not trained on; in loops: a name under `watch`"
    )
    patience: int = Field(default=2, ge=1, description="the run ends after this many evaluations without a new best")
    max_kl: float | None = Field(
        default=None,
        gt=0,
        description="budget of KL to the reference on held-out prompts, in nats per response: an evaluation beyond "
        "it ends the run and is never the best",
    )
