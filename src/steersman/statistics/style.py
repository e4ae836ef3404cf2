"""Ratings with style held equal: how much of a model's lead is length and formatting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steersman.ops.style import FEATURES, style_counts
from steersman.statistics.estimates import Estimate, resamples
from steersman.statistics.ratings import SCALE, Rating, intervals

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StyledBattle:
    """A battle with the difference of style between its answers; `group` is resampled as one (a user, a prompt)."""

    first: str
    second: str
    share: float
    style: tuple[float, ...]
    group: int = 0


def style(first: str, second: str) -> tuple[float, ...]:
    """(a - b) / (a + b) of the answers' words, headers, list items and bold spans; 0 where neither has any.

    Source: the normalised differences of Chatbot Arena's style control (LMSYS, "Does style matter?", August 2024).
    """
    counts = np.array([style_counts(text) for text in (first, second)], float)
    total = counts.sum(0)
    return tuple(np.divide(counts[0] - counts[1], total, out=np.zeros(len(total)), where=total > 0).tolist())


@dataclass(frozen=True, slots=True)
class ControlledRatings:
    """Ratings as if all answers had the same style, and what each feature is worth, in Elo points per root mean
    square of its difference."""

    ratings: list[Rating]
    effects: dict[str, Estimate]


def controlled_ratings(
    battles: Sequence[StyledBattle], *, anchor: str, features: Sequence[str] = FEATURES, at: float = 1000.0,
    prior: float = 0.5, draws: int = 200, seed: int = 0,
) -> ControlledRatings:  # fmt: skip
    """P(i beats j) = 1 / (1 + exp(-(theta_i - theta_j + beta . (x_i - x_j)))), fitted by maximum likelihood.

    Best first, `anchor` fixed at `at` points. A tie is half a battle won; `prior` as in `ratings`, and beta has a
    normal prior of standard deviation 3 nats. Features that never differ have no effect. Intervals are as in
    `ratings`. With no features it is `ratings`.

    Source: arXiv 2403.04132, section 3 (Bradley-Terry with bootstrap), with style as further columns of the logistic
    regression.
    """
    players = sorted({name for b in battles for name in (b.first, b.second)} | {anchor})
    place = {name: i for i, name in enumerate(players)}
    design = np.zeros((len(battles), len(players) + len(features)))
    for row, b in enumerate(battles):
        design[row, place[b.first]] += 1
        design[row, place[b.second]] -= 1
        design[row, len(players) :] = b.style[: len(features)]
    size = np.sqrt((design[:, len(players) :] ** 2).mean(0))  # the same whichever answer stands first
    design[:, len(players) :] /= np.where(size > 0, size, 1)
    share, groups = np.array([b.share for b in battles]), np.array([b.group for b in battles])

    def fit(rows: NDArray[np.int64]) -> Array:
        found = _logistic(design[rows], share[rows], len(players), prior)
        theta = at + SCALE * (found[: len(players)] - found[place[anchor]])
        return np.concatenate([theta, SCALE * found[len(players) :]])

    drawn = [fit(rows) for rows in resamples(groups, draws, seed)]
    point = fit(np.arange(len(battles)))
    bounds = intervals(drawn, len(point))
    bounds[place[anchor]] = at, at
    told = [Rating(name, float(point[i]), *bounds[i], int((design[:, i] != 0).sum())) for name, i in place.items()]
    effects = {
        name: Estimate(float(point[i]), *bounds[i], len(battles)) for i, name in enumerate(features, len(players))
    }
    return ControlledRatings(sorted(told, key=lambda r: -r.rating), effects)


def _logistic(design: Array, share: Array, players: int, prior: float, steps: int = 60) -> Array:
    """The maximum of sum_r [s log p + (1 - s) log(1 - p)] + prior sum_i [log sig(theta_i) + log sig(-theta_i)]
    - |beta|^2 / 18 with p = sig(design x), by Newton's method with halved steps."""
    x = np.zeros(design.shape[1])
    is_player = np.arange(len(x)) < players

    def value(x: Array) -> float:
        z, theta = design @ x, x[:players]
        fought = (share * -np.logaddexp(0, -z) + (1 - share) * -np.logaddexp(0, z)).sum()
        return float(
            fought - prior * (np.logaddexp(0, -theta) + np.logaddexp(0, theta)).sum() - (x[players:] ** 2).sum() / 18
        )

    for _ in range(steps):
        p, own = 1 / (1 + np.exp(-(design @ x))), 1 / (1 + np.exp(-x))
        gradient = design.T @ (share - p) + np.where(is_player, prior * (1 - 2 * own), -x / 9)
        curve = np.where(is_player, 2 * prior * own * (1 - own), 1 / 9)
        hessian = (design * (p * (1 - p))[:, None]).T @ design + np.diag(curve)
        step, size = np.linalg.solve(hessian, gradient), 1.0
        while size > 1e-6 and value(x + size * step) < value(x):
            size /= 2
        x = x + size * step
        if np.abs(step).max() < 1e-9:
            break
    return x
