"""Ratings with style held equal: how much of a model's lead is length and formatting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steersman.ops.style import FEATURES, style_counts
from steersman.statistics.estimates import Estimate
from steersman.statistics.intervals import resamples
from steersman.statistics.ratings import (
    AT,
    FAINT,
    PRIOR,
    SCALE,
    Array,
    Battle,
    Rating,
    around,
    fought_rows,
    intervals,
    maximum,
    of_one_mind,
    prior_battles,
    prior_slopes,
    prior_value,
)


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
    battles: Sequence[Battle], *, anchor: str, features: Sequence[str] = FEATURES, draws: int = 200, seed: int = 0
) -> ControlledRatings:
    """P(i beats j) = 1 / (1 + exp(-(theta_i - theta_j + beta . (x_i - x_j)))), fitted by maximum likelihood.

    Best first. Anchor, ties, the prior of theta and intervals are as in `ratings`, which it is with no features; beta
    has a normal prior of standard deviation 3 nats. Battles have the style of FEATURES, in this order; `features` are
    those of them that are held equal. Features that never differ have no effect, and no interval.

    Source: arXiv 2403.04132, section 3 (Bradley-Terry with bootstrap), with style as further columns of the logistic
    regression.
    """
    players = sorted({name for b in battles for name in (b.first, b.second)} | {anchor})
    place = {name: i for i, name in enumerate(players)}
    columns = [FEATURES.index(name) for name in features]
    design = np.zeros((len(battles), len(players) + len(features)))
    for row, b in enumerate(battles):
        design[row, place[b.first]] += 1
        design[row, place[b.second]] -= 1
        design[row, len(players) :] = [b.style[i] for i in columns]
    size = np.sqrt((design[:, len(players) :] ** 2).mean(0))  # the same whichever answer stands first
    design[:, len(players) :] /= np.where(size > 0, size, 1)
    share, groups = np.array([b.share for b in battles]), np.array([b.group for b in battles])

    def fit(design: Array, share: Array, weight: Array | float = 1.0, prior: float = PRIOR) -> Array:
        found = _fit(design, share, len(players), weight, prior)
        theta = AT + SCALE * (found[: len(players)] - found[place[anchor]])
        return np.concatenate([theta, SCALE * found[len(players) :]])

    drawn = [fit(design[rows], share[rows]) for rows in resamples(groups, draws, seed)]
    point = fit(design, share)
    bounds = intervals(drawn, len(point))
    fought, zero = fought_rows(battles, place), place[anchor]
    same = of_one_mind(fought, groups, len(players))
    if drawn and same.any():
        more = prior_battles(fought, groups, same)
        of_more = np.zeros((len(more.rows), design.shape[1]))  # battles in no style
        each = np.arange(len(more.rows))
        of_more[each, more.rows[:, 0].astype(int)], of_more[each, more.rows[:, 1].astype(int)] = 1, -1
        rows, shares, prior = np.concatenate([design, of_more]), np.append(share, more.rows[:, 2]), FAINT * PRIOR
        wide = intervals([fit(rows, shares, w, prior) for w in more.weights(groups, draws, seed)], len(point))
        same = np.append(same, np.zeros(len(features), bool))
        bounds = [around(point[i], wide[i]) if same[i] or same[zero] else x for i, x in enumerate(bounds)]
    bounds[zero] = AT, AT
    for i in np.flatnonzero(size == 0) + len(players):
        bounds[i] = -math.inf, math.inf  # a feature that never differs tells nothing of its effect
    told = [Rating(name, float(point[i]), *bounds[i], int((design[:, i] != 0).sum())) for name, i in place.items()]
    effects = {
        name: Estimate(float(point[i]), *bounds[i], len(battles)) for i, name in enumerate(features, len(players))
    }
    return ControlledRatings(sorted(told, key=lambda r: -r.rating), effects)


def _fit(design: Array, share: Array, players: int, weight: Array | float, prior: float) -> Array:
    """argmax over x = (theta, beta) of sum_r w [s log p + (1 - s) log(1 - p)] + `prior_value`(theta) - |beta|^2 / 18
    with p = sigmoid(design x)."""
    weight = np.broadcast_to(weight, len(share))

    def value(x: Array) -> float:
        z = design @ x
        fought = (weight * (share * -np.logaddexp(0, -z) + (1 - share) * -np.logaddexp(0, z))).sum()
        return float(fought - (x[players:] ** 2).sum() / 18) + prior_value(x[:players], prior)

    def slopes(x: Array) -> tuple[Array, Array]:
        p, (gradient, curve) = 1 / (1 + np.exp(-(design @ x))), prior_slopes(x[:players], prior)
        beta = x[players:]
        gradient, curve = np.concatenate([gradient, -beta / 9]), np.concatenate([curve, np.full(len(beta), 1 / 9)])
        hessian = (design * (weight * p * (1 - p))[:, None]).T @ design + np.diag(curve)
        return design.T @ (weight * (share - p)) + gradient, hessian

    return maximum(value, slopes, design.shape[1])
