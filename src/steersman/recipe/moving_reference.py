"""A reference that follows the policy, as recipes say it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from steersman.config.sections import Section

OF_KIND = {"ema": ("decay",), "bema": ("after", "ema_power", "bias_power", "lag", "multiplier")}
"""The keys that one kind alone reads."""


class MovingReference(Section):
    """A reference that is a copy of the policy at the start, and follows it while it learns."""

    kind: Literal["ema", "bema"] = Field(
        default="ema",
        description="ema: an exponential moving average of the policy's weights (TR-DPO's soft update), or with "
        "decay 0 the policy's weights themselves (its hard update); bema: a moving average that is corrected for its "
        "lag",
    )
    every: int = Field(
        default_factory=lambda known: 400 if known.get("kind") == "bema" else 512,
        ge=1,
        description="the policy's updates from one update of the reference to the next (TR-DPO's tau); if not given "
        "512 for ema, 400 for bema",
    )
    decay: float = Field(
        default=0.4,
        ge=0,
        lt=1,
        description="ema: the share of itself that the reference keeps at its update, 1 - TR-DPO's alpha; 0: it "
        "becomes the policy",
    )
    after: int = Field(
        default=0,
        ge=0,
        description="bema: the policy's updates before the average begins, from the weights of then (BEMA's tau)",
    )
    ema_power: float = Field(
        default=0.5,
        ge=0,
        description="bema: the average takes (lag + multiplier t)^-ema_power of the policy at its update t (BEMA's "
        "kappa)",
    )
    bias_power: float = Field(
        default=0.2,
        ge=0,
        description="bema: (lag + multiplier t)^-bias_power of the way from the first weights to the policy is added "
        "to the average (BEMA's eta); the larger the power, the nearer to the average alone",
    )
    lag: float = Field(default=10.0, ge=1, description="bema: how old the average is at update 0 (BEMA's rho)")
    multiplier: float = Field(default=1.0, ge=0, description="bema: how fast it ages, per update (BEMA's gamma)")

    @model_validator(mode="after")
    def _read_by_its_kind(self) -> MovingReference:
        fields = type(self).model_fields
        for kind, keys in OF_KIND.items():
            idle = [key for key in keys if kind != self.kind and getattr(self, key) != fields[key].default]
            if idle:
                raise ValueError(
                    f"{idle[0]} is of kind {kind}, and kind is {self.kind}; remove it, or give kind {kind}"
                )
        return self

    @property
    def first(self) -> int:
        """The policy's update after which the reference moves for the first time."""
        return self.every + (self.after if self.kind == "bema" else 0)

    @property
    def is_hard(self) -> bool:
        """Whether the reference becomes the policy itself."""
        return self.kind == "ema" and self.decay == 0

    def describe(self) -> str:
        """One line: how it follows."""
        begun = f" from update {self.after} on" if self.kind == "bema" and self.after else ""
        how = {
            "ema": f"takes {1 - self.decay:.3g} of the policy and keeps {self.decay:g} of itself",
            "bema": "becomes the policy's bias-corrected moving average",
        }[self.kind]
        how = "becomes the policy" if self.is_hard else how
        return f"follows the policy: {how}, every {self.every:,} updates{begun}"
