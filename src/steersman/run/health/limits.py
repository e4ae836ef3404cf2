"""The limits from which the health watch speaks: the recipe section `health`."""

from __future__ import annotations

from pydantic import Field

from steersman.config.sections import Section


class HealthConfig(Section):
    """When the health watch speaks."""

    kl_per_token: float = Field(
        default=0.5,
        gt=0,
        description="kl_runaway: warn when KL to the reference is above this, in nats per response token",
    )
    kl_per_response: float = Field(
        default=50.0, gt=0, description="kl_runaway: the same in nats per response, where lengths are unknown"
    )
    entropy_fraction: float = Field(
        default=0.2, ge=0, le=1, description="entropy_collapse: warn when entropy is below this fraction of its start"
    )
    entropy_floor: float = Field(
        default=0.02, ge=0, description="entropy_collapse: warn when entropy is below this, in nats per token"
    )
    distinct2_fraction: float = Field(
        default=0.75,
        ge=0,
        le=1,
        description="repetition: warn when distinct-2 per response (share of different word pairs) is below this "
        "fraction of its start",
    )
    distinct2_floor: float = Field(
        default=0.5, ge=0, le=1, description="repetition: warn when distinct-2 per response is below this"
    )
    repeated_rise: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="repetition: warn when the share of words that repeat one of the four before them rises by "
        "more than this",
    )
    unique_fraction: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="same_answer: warn when the share of distinct responses is below this fraction of its start",
    )
    diversity_fraction: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="answers_alike: warn when distinct-2 over all answers together is below this fraction of its "
        "start",
    )
    phrase_rise: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="same_phrase: warn when the share of answers with the most common phrase of five words rises "
        "by more than this",
    )
    perplexity_factor: float = Field(
        default=2.0,
        gt=1,
        description="strange_answers: warn when the perplexity of answers under the starting model is above this "
        "many times its first value",
    )
    still_steps: int = Field(
        default=10, gt=0, description="nothing_moved: warn when after this many steps the policy is where it began"
    )
    still_kl: float = Field(
        default=1e-3,
        ge=0,
        description="nothing_moved: KL to the reference up to this counts as no change, where no margin of pairs "
        "is measured",
    )
    still_margin: float = Field(
        default=0.02,
        ge=0,
        description="nothing_moved: with pairs, a change of the preference margin (or KL) up to this counts as none",
    )
    expect_eos: bool = Field(
        default=True,
        description="all_cut, eos_never: note when no response ends by itself; false: they are meant to fill the "
        "length limit",
    )
    ratio_gap: float = Field(
        default=0.05,
        gt=0,
        description="ratio_gap: warn when log-probabilities of the sampler and of training differ by more than "
        "this, in nats",
    )
    critic_window: int = Field(
        default=10,
        gt=0,
        description="bad_critic: warn when explained variance was below 0 in most of the last so many iterations",
    )
    reward_window: int = Field(
        default=8, ge=3, description="reward_hacking: iterations in each of the means that are compared"
    )
    reward_sigma: float = Field(
        default=4.0,
        gt=0,
        description="reward_hacking: warn when the total reward rises and another one falls, both by more than "
        "this many standard errors",
    )
    reward_ignore: list[str] = Field(
        default=["total", "kl", "penalty"],
        description="reward_hacking: names under reward/ that are not compared with the total",
    )
    chosen_fall: float = Field(
        default=0.1,
        gt=0,
        description="chosen_falls: warn when log-probabilities of chosen (or liked) answers fall by more than this "
        "share of their first value",
    )
    repeat_every: int = Field(
        default=20, gt=0, description="iterations after which a warning that still holds is given again"
    )
