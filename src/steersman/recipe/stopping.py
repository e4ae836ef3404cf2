"""When a run may end before its time, as recipes say it."""

from __future__ import annotations

from pydantic import Field

from steersman.config.sections import Section


class StopConfig(Section):
    """Ends a run early, and takes up the weights of its best look at held-out prompts."""

    judge: str = Field(
        description="whose held-out mean decides: a part of the reward, one of weight 0 that is not trained on; "
        "in loops a name under `watch`"
    )
    patience: int = Field(default=2, ge=1, description="looks without a new best after which the run ends")
    max_kl: float | None = Field(
        default=None,
        gt=0,
        description="budget of KL to the reference on held-out prompts, nats per response: a look beyond it ends the "
        "run and is never the best",
    )
