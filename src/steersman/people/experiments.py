"""Experiments with people: who sees which model, and what may be said of the difference after any judgement."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from steersman.config.sections import Section
from steersman.people.outcomes import WIN, Outcome
from steersman.statistics.sequential import Look, Running, arm_difference, refuted, user_scores

LOOK_EVERY = 20
"""Bounds are narrowed each time that a 20th more values are there; what is decided is followed at every value."""
SPLIT = 0.001
"""How unlikely a split of users has to be before the assignment is doubted."""
State = Literal["better", "worse", "no gain", "undecided", "open", "hurt", "safe"]
"""Of what decides: better, worse, no gain (the margin is out of reach), undecided (all units used up), open.
Of a guard: hurt, safe, open."""


class Measured(Section):
    """The range of a metric and which end of it is good."""

    better: Literal["higher", "lower"] = Field(
        default="higher", description="values of the metric that are good: higher or lower ones"
    )
    least: float = Field(
        default=0.0, description="smallest possible value of the metric; smaller ones are clipped to it"
    )
    most: float = Field(
        default=1.0, description="largest possible value of the metric; larger ones are clipped to it"
    )

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.least >= self.most:
            raise ValueError(f"least ({self.least:g}) must be below most ({self.most:g})")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        return self.least, self.most


class Guard(Measured):
    """A metric that the treatment may not worsen by more than `allowed`."""

    allowed: float = Field(default=0.0, ge=0, description="by how much it may be worse, in its own unit")


class Experiment(Measured):
    """One model against another: how users are split, what is measured, and when it ends."""

    control: str = Field(default="control", description="name of the model that stands")
    treatment: str = Field(default="treatment", description="name of the model that may take its place")
    share: float = Field(default=0.5, gt=0, lt=1, description="share of users who see the treatment")
    salt: str = Field(
        default="",
        description="secret text that makes this experiment's assignment of users its own; keep it from users",
    )
    metric: str = Field(default=WIN, description="what decides: win, thumb, retained, or a metric of the rows")
    alpha: float = Field(
        default=0.05, gt=0, lt=0.5, description="probability of reporting a difference where there is none"
    )
    margin: float = Field(
        default=0.02, ge=0, description="smallest gain that matters; the test ends once it is out of reach"
    )
    unit: Literal["user", "judgement"] = Field(
        default="user",
        description="what is independent of each other. user: users; judgement: every judgement (only for blind "
        "pairs with random sides, and the question whether there is any difference)",
    )
    per_user: int = Field(default=1, ge=1, description="judgements that make one user's score; choose it beforehand")
    most_units: int | None = Field(default=None, ge=1, description="end undecided after so many users or judgements")
    guards: dict[str, Guard] = Field(default_factory=dict, description="metric: what the treatment may not worsen")

    @model_validator(mode="after")
    def _fits(self) -> Experiment:
        if self.control == self.treatment:
            raise ValueError(f"control and treatment are both {self.control!r}; an experiment compares two models")
        if self.unit == "judgement" and self.metric != WIN:
            raise ValueError("unit: judgement needs metric: win; between users the users are what is independent")
        return self

    def arm(self, user: str) -> str:
        """The model that a user sees: the same at every visit, and to be told only by who knows the salt."""
        return self.treatment if is_assigned(user, self.salt, self.share) else self.control


def is_assigned(user: str, salt: str, share: float) -> bool:
    """Whether a user is among the `share` that a salted hash draws."""
    digest = hashlib.sha256(f"{salt}\0{user}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


@dataclass(frozen=True, slots=True)
class Verdict:
    """What may be said of one metric; `look` is of the share won, or of treatment minus control in its own unit.

    `null` is where there is no difference, `decided_at` the number of values at which the state was first reached (0
    where it is open). A treatment with no gain may be known to be worse later: then the state is `worse`, from there
    on. `unused` counts outcomes that belong to no score.
    """

    metric: str
    state: State
    look: Look
    null: float
    decided_at: int
    unused: int

    def __str__(self) -> str:
        what = "share won" if self.metric == WIN else f"{self.metric}, treatment minus control,"
        told = f"{self.look} after {self.look.n:,}" if self.look.n else "has no value yet"
        return f"{what} {told}: {self.state}"


@dataclass(frozen=True, slots=True)
class Report:
    """All verdicts of an experiment, what to do, and what is doubtful about its rows."""

    decision: Literal["treatment", "control", "wait"]
    reason: str
    primary: Verdict
    guards: list[Verdict]
    others: list[Verdict]
    warnings: list[str]


def report(experiment: Experiment, rows: Iterable[Outcome]) -> Report:
    """The verdict on outcomes in the order of their times; may be asked for after each of them.

    The treatment is taken where it is better and no guard is hurt. The control stays where the treatment is worse,
    can not gain the margin, hurts a guard, or `most_units` are used up undecided.
    """
    by_metric: dict[str, list[Outcome]] = defaultdict(list)
    for row in rows:
        by_metric[row.metric].append(row)
    warnings = _split(experiment, by_metric) + _bounded(experiment, by_metric)
    primary = _primary(experiment, by_metric.pop(experiment.metric, []))
    guards = [_guard(experiment, name, guard, by_metric.pop(name, [])) for name, guard in experiment.guards.items()]
    others = [_other(experiment, name, found) for name, found in sorted(by_metric.items())]
    for verdict in (primary, *guards, *others):
        if verdict.look.low > verdict.look.high:
            warnings.append(
                f"{verdict.metric}: early and late values contradict each other, so its mean is not one number: "
                "users or models changed within the experiment; begin a new one"
            )
    hurt = [g.metric for g in guards if g.state == "hurt"]
    if hurt:
        return Report("control", f"{', '.join(hurt)}: worse than allowed", primary, guards, others, warnings)
    decision = {"better": "treatment", "open": "wait"}.get(primary.state, "control")
    return Report(decision, str(primary), primary, guards, others, warnings)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, slots=True)
class _Values:
    """Values in [0, 1] with mean 1/2 where there is no difference, and how they are read: factor * x + shift."""

    x: NDArray[np.float64]
    factor: float
    shift: float
    unused: int


def _values(experiment: Experiment, rows: Sequence[Outcome], bounds: tuple[float, float]) -> _Values:
    """The values of a metric whose own ones lie within `bounds`, or count as the nearer of these."""
    if rows and rows[0].treated is None:
        if experiment.unit == "judgement":
            return _Values(np.array([r.value for r in rows]), 1.0, 0.0, 0)
        _, scores = user_scores([r.user for r in rows], [r.value for r in rows], experiment.per_user)
        return _Values(scores, 1.0, 0.0, len(rows) - experiment.per_user * len(scores))
    crossed = _crossed(rows)
    kept = [r for r in rows if r.user not in crossed]
    least, most = bounds
    scaled = [min(max((r.value - least) / (most - least), 0.0), 1.0) for r in kept]
    places, scores = user_scores([r.user for r in kept], scaled, experiment.per_user)
    z, r = arm_difference(scores, np.array([kept[i].treated for i in places], bool), experiment.share)
    return _Values(z, 2 * r * (most - least), -r * (most - least), len(rows) - experiment.per_user * len(scores))


def _crossed(rows: Iterable[Outcome]) -> set[str]:
    """Users who were seen in both arms."""
    arms: dict[str, set[bool]] = defaultdict(set)
    for row in rows:
        if row.treated is not None:
            arms[row.user].add(row.treated)
    return {user for user, seen in arms.items() if len(seen) > 1}


def _gains(experiment: Experiment, values: _Values, gain: float, better: str) -> tuple[int, int]:
    """After how many values the treatment's gain is first known to be above `gain`, and below it; 0: it is not."""
    sign = 1 if better == "higher" else -1
    above, below = refuted(values.x, 0.5 + sign * gain / values.factor, experiment.alpha)
    return (above, below) if better == "higher" else (below, above)


def _verdict(experiment: Experiment, name: str, values: _Values, places: Sequence[tuple[State, int]]) -> Verdict:
    """The state that is reached first, the earlier of `places` where two are reached at once, and the bounds now.

    A state is reached at a value and not at a look, so that it stays whatever comes after it.
    """
    reached: list[tuple[int, State]] = [(place, state) for state, place in places if place] or [(0, "open")]
    decided, said = min(reached, key=lambda one: one[0])
    running, taken, n = Running(experiment.alpha), 0, len(values.x)
    for upto in sorted({*_looks(n), *((decided,) if decided else ()), n}):
        running.add(values.x[taken:upto])
        taken = upto
        running.look()
    null = values.factor / 2 + values.shift
    return Verdict(name, said, running.look().scaled(values.factor, values.shift), null, decided, values.unused)


def _looks(n: int) -> Iterator[int]:
    """Places up to n at which bounds are narrowed: the same ones whatever n is."""
    upto = 1
    while upto <= n:
        yield upto
        upto += max(1, upto // LOOK_EVERY)


def _primary(experiment: Experiment, rows: Sequence[Outcome]) -> Verdict:
    values = _values(experiment, rows, experiment.bounds)
    better, worse = _gains(experiment, values, 0.0, experiment.better)
    _, no_gain = _gains(experiment, values, experiment.margin, experiment.better)
    most = experiment.most_units or 0
    used_up = most if most <= len(values.x) else 0
    places: list[tuple[State, int]] = [
        ("better", better), ("worse", worse), ("no gain", no_gain), ("undecided", used_up)
    ]  # fmt: skip
    told = _verdict(experiment, experiment.metric, values, places)
    return replace(told, state="worse", decided_at=worse) if told.state == "no gain" and worse else told


def _guard(experiment: Experiment, name: str, guard: Guard, rows: Sequence[Outcome]) -> Verdict:
    values = _values(experiment, rows, guard.bounds)
    safe, hurt = _gains(experiment, values, -guard.allowed, guard.better)
    return _verdict(experiment, name, values, [("hurt", hurt), ("safe", safe)])


def _other(experiment: Experiment, name: str, rows: Sequence[Outcome]) -> Verdict:
    """A metric that is only watched; its range is that of the values seen, so its bounds are a description."""
    seen = [r.value for r in rows]
    return _verdict(experiment, name, _values(experiment, rows, (min([0.0, *seen]), max([1.0, *seen]))), [])


def _bounded(experiment: Experiment, by_metric: dict[str, list[Outcome]]) -> list[str]:
    """What was cut to the bounds of its metric, and guards that nobody measured."""
    warnings = []
    for name, one in {experiment.metric: experiment, **experiment.guards}.items():
        rows = by_metric.get(name, [])
        out = sum(not one.least <= row.value <= one.most for row in rows)
        if out:
            warnings.append(
                f"{name}: {out:,} of {len(rows):,} values are outside {one.least:g} to {one.most:g} and count as the "
                "nearer of these; set its `least` and `most` to the smallest and largest value that it can have"
            )
        if not rows and name in experiment.guards:
            warnings.append(f"{name}: this guard was never measured, so it guards nothing")
    return warnings


def _split(experiment: Experiment, by_metric: dict[str, list[Outcome]]) -> list[str]:
    """Whether as many users are in the treatment as the assignment promises, and none in both arms."""
    rows = [r for found in by_metric.values() for r in found if r.treated is not None]
    crossed, warnings = _crossed(rows), []
    if crossed:
        warnings.append(f"{len(crossed):,} users were seen in both arms and are left out; assign by user, stably")
    arms = {r.user: float(bool(r.treated)) for r in rows if r.user not in crossed}
    seen = Running(SPLIT, null=experiment.share)
    seen.add(arms.values())
    look = seen.look()
    if look.e_value >= 1 / SPLIT:
        warnings.append(
            f"{look.mean:.1%} of {look.n:,} users are in the treatment where {experiment.share:.1%} were to be: "
            "something loses users of one arm, and no verdict below can be trusted"
        )
    return warnings
