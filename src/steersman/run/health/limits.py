"""The limits from which the health watch speaks: the recipe section `health`."""

from __future__ import annotations

from pydantic import Field

from steersman.config.sections import Section


class HealthConfig(Section):
    """When the health watch speaks."""

    kl_per_token: float = Field(default=0.5, gt=0, description="KL running away: nats per response token")
    kl_per_response: float = Field(
        default=50.0, gt=0, description="the same in nats per response, where lengths are unknown"
    )
    entropy_fraction: float = Field(
        default=0.2, ge=0, le=1, description="entropy collapse: below this fraction of its start"
    )
    entropy_floor: float = Field(default=0.02, ge=0, description="entropy collapse: below this, nats per token")
    distinct2_fraction: float = Field(
        default=0.75, ge=0, le=1, description="repetition: distinct-2 below this fraction of its start"
    )
    distinct2_floor: float = Field(
        default=0.5, ge=0, le=1, description="repetition: distinct-2 per response below this"
    )
    repeated_rise: float = Field(
        default=0.2, ge=0, le=1, description="repetition: share of words repeated at once, above its start by this"
    )
    unique_fraction: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="one answer to everything: share of different responses, fraction of its start",
    )
    diversity_fraction: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="answers alike: distinct-2 over all answers together below this fraction of its start",
    )
    phrase_rise: float = Field(
        default=0.4, ge=0, le=1, description="one phrase: share of answers that hold it, above its start by this"
    )
    perplexity_factor: float = Field(
        default=2.0, gt=1, description="answers strange to the starting model: their perplexity, times its start"
    )
    still_steps: int = Field(default=10, gt=0, description="steps after which a policy that has not moved is named")
    still_kl: float = Field(default=1e-3, ge=0, description="not moved: KL to the reference up to this")
    still_margin: float = Field(
        default=0.02, ge=0, description="not moved: change of the preference margin up to this"
    )
    expect_eos: bool = Field(default=True, description="false: responses are meant to fill the length limit")
    ratio_gap: float = Field(
        default=0.05, gt=0, description="rollout and training log-probabilities differ by this, nats"
    )
    critic_window: int = Field(
        default=10, gt=0, description="iterations of explained variance below 0 before it is named"
    )
    reward_window: int = Field(default=8, ge=3, description="iterations in each mean when rewards are compared")
    reward_sigma: float = Field(
        default=4.0, gt=0, description="reward hacking: by how many standard errors they part"
    )
    reward_ignore: list[str] = Field(
        default=["total", "kl", "penalty"], description="reward/<name> that are no reward of their own"
    )
    chosen_fall: float = Field(
        default=0.1, gt=0, description="chosen likelihood falls: by this share of its negative log-likelihood"
    )
    repeat_every: int = Field(default=20, gt=0, description="iterations before a finding that lasts is said again")
