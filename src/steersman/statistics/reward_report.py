"""How good a reward model is on held-out data, beside what a rule or another rater would reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from steersman.data.examples import Example
from steersman.data.split import prompt_key
from steersman.statistics.estimates import (
    Array,
    Calibration,
    Estimate,
    auc,
    bootstrap,
    calibration,
    kendall,
    known,
    mean,
    pearson,
    rmse,
    sigmoid,
    spearman,
    wilson,
)


@dataclass(slots=True)
class Report:
    """Numbers by name, most with their 95% interval; `subsets` holds the first number of each subset."""

    kind: str
    numbers: dict[str, Estimate] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    raters: dict[str, float] = field(default_factory=dict)
    length: dict[str, float] = field(default_factory=dict)
    subsets: dict[str, Estimate] = field(default_factory=dict)
    calibration: Calibration | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON holds it; what is not finite becomes None."""
        return known(asdict(self))

    def lines(self) -> list[str]:
        """Sentences for the console."""
        out = [f"{name}: {x}, n = {x.n:,}" for name, x in self.numbers.items()]
        out += [f"baseline, {name}: {x:.3f}" for name, x in self.baselines.items()]
        out += [f"raters, {name}: {x:.3f}" for name, x in self.raters.items()]
        out += [f"length, {name}: {x:.3f}" for name, x in self.length.items()]
        if self.calibration is not None:
            out.append(f"expected calibration error: {self.calibration.ece:.3f} (calibration.png)")
        return out + [f"subset {name}: {x}, n = {x.n:,}" for name, x in self.subsets.items()]

    def summary(self) -> dict[str, float]:
        """The headline numbers, flat."""
        flat = {f"held_out/{name}{part}": getattr(x, attribute)
                for name, x in self.numbers.items()
                for part, attribute in (("", "value"), ("_low", "low"), ("_high", "high"))}  # fmt: skip
        flat |= {f"held_out/baseline/{name}": x for name, x in self.baselines.items()}
        flat |= {f"held_out/raters/{name}": x for name, x in self.raters.items()}
        if self.calibration is not None:
            flat["held_out/calibration_error"] = self.calibration.ece
        return {name: x for name, x in flat.items() if math.isfinite(x)}


def keys(examples: Sequence[Example]) -> Array:
    """A number for each example that is the same for the same prompt."""
    return np.unique([prompt_key(e) for e in examples], return_inverse=True)[1]


def subsets(examples: Sequence[Example], column: str | None) -> list[str]:
    """Which subset each example belongs to; empty where none are asked for."""
    if column is None:
        return []
    return [str(e.row.data.get(column, Path(e.row.file).stem if column == "file" else "")) for e in examples]


def by_subset(subset: Sequence[str], estimate: Callable[[Array], Estimate]) -> dict[str, Estimate]:
    """`estimate` of the rows of each subset, in the order of the names."""
    names = np.array(subset)
    return {str(name): estimate(names == name) for name in sorted(set(subset))}


def pair_report(
    lead: Array,
    target: Array,
    *,
    lengths: Array,
    scores: Array,
    votes: Sequence[Sequence[float]] = (),
    prompts: Array | None = None,
    subset: Sequence[str] = (),
    draws: int = 1000,
) -> Report:
    """Pairs: `lead` [N] is the first answer's score less the second's, `target` [N] the share of raters for it.

    Accuracy counts the pairs on which raters are not evenly split; a lead of 0 is half right. Wilson's interval
    takes pairs to be independent; where a prompt has several, `accuracy_by_prompt` resamples prompts. Calibration
    compares sigma(|lead|) with the share of raters on the predicted side, ties included.
    """
    decided = target != 0.5
    hit = np.where(lead == 0, 0.5, (lead > 0) == (target > 0.5)).astype(float)
    report = Report("preference")
    report.numbers["accuracy"] = wilson(float(hit[decided].sum()), int(decided.sum()))
    if prompts is not None and len(np.unique(prompts[decided])) < decided.sum():
        arrays = [hit[decided]]
        report.numbers["accuracy_by_prompt"] = bootstrap(mean, arrays, clusters=prompts[decided], draws=draws)
    sided = np.where(lead == 0, 0.5, np.where(lead > 0, target, 1 - target))
    if not np.isin(target, (0.0, 1.0)).all():
        report.numbers["agreement_with_a_rater"] = bootstrap(mean, [sided], clusters=prompts, draws=draws)
    gap = lengths[:, 0] - lengths[:, 1]
    longer = np.where(gap == 0, 0.5, (gap > 0) == (target > 0.5))[decided]
    report.baselines = {"longer_wins": mean(longer), "shorter_wins": 1 - mean(longer)}
    report.raters = rater_agreement(votes, target)
    report.length = {
        "spearman_of_score": spearman(scores.ravel(), lengths.ravel()),
        "spearman_of_lead_within_pairs": spearman(lead, gap),
    }
    report.calibration = calibration(sigmoid(np.abs(lead)), sided, low=0.5)
    report.subsets = by_subset(
        subset, lambda rows: wilson(float(hit[rows & decided].sum()), int((rows & decided).sum()))
    )
    return report


def rater_agreement(votes: Sequence[Sequence[float]], target: Array) -> dict[str, float]:
    """How far raters agree, which no model of theirs can be expected to pass.

    `two_raters`: 1 less the mean distance of two raters' votes on a pair (a tie lies half way). `ceiling`: the mean
    agreement with a rater of one who always knows the majority. `one_against_the_rest`: how often a rater who
    chose is on the side of the others' majority.
    """
    if not np.isin(target, (0.0, 1.0)).all():
        found = {"ceiling": mean(np.maximum(target, 1 - target))}
    else:
        found = {}
    several = [v for v in votes if len(v) > 1]
    if not several:
        return found
    together = [1 - abs(a - b) for v in several for a, b in combinations(v, 2)]
    sides = []
    for v in several:
        for i, own in enumerate(v):
            rest = sum(v[:i]) + sum(v[i + 1 :]) - (len(v) - 1) / 2
            if own != 0.5 and rest != 0:
                sides.append(float((own > 0.5) == (rest > 0)))
    return found | {"two_raters": mean(np.array(together)), "one_against_the_rest": mean(np.array(sides))}


def ranking_report(
    scores: Sequence[Sequence[float]],
    ranks: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[int]],
    *,
    subset: Sequence[str] = (),
    draws: int = 1000,
) -> Report:
    """Rankings: their pairs as `pair_report` sees them, the best answer found, and Kendall's tau of each ranking.

    `best_found` is the share of rankings whose highest score is a best answer's; where several answers have the
    highest score, a ranking counts by the share of best ones among them, as if one of them were drawn.
    """
    rows = [(k, i, j) if r[i] < r[j] else (k, j, i)
            for k, r in enumerate(ranks) for i, j in combinations(range(len(r)), 2) if r[i] != r[j]]  # fmt: skip
    owner = np.array([k for k, _, _ in rows])
    score = np.array([[scores[k][i], scores[k][j]] for k, i, j in rows])
    length = np.array([[lengths[k][i], lengths[k][j]] for k, i, j in rows], dtype=float)
    report = pair_report(
        score[:, 0] - score[:, 1], np.ones(len(rows)), lengths=length, scores=score, prompts=owner,
        subset=[subset[int(k)] for k in owner] if subset else (), draws=draws,
    )  # fmt: skip
    report.kind = "ranking"
    best = [mean(np.array(r)[np.array(s) == max(s)] == min(r)) for s, r in zip(scores, ranks, strict=True)]
    tau = np.array([kendall(np.array(s), -np.array(r)) for s, r in zip(scores, ranks, strict=True)])
    report.numbers["best_found"] = wilson(sum(best), len(best))
    report.numbers["kendall"] = bootstrap(mean, [tau[np.isfinite(tau)]], draws=draws)
    return report


def rating_report(
    said: Array,
    truth: Array,
    names: Sequence[str],
    *,
    usual: Array,
    lengths: Array,
    prompts: Array,
    subset: Sequence[str] = (),
    draws: int = 1000,
) -> Report:
    """Ratings: error and correlations of each attribute, `said` and `truth` [N, A] in the data's units.

    NaN in `truth` is a missing rating; `usual` [A] is the mean over the training data, the trivial prediction.
    """
    report = Report("rating")
    for a, name in enumerate(names):
        there = np.isfinite(truth[:, a])
        x, y, cluster = said[there, a], truth[there, a], prompts[there]
        for what, statistic in (("rmse", rmse), ("pearson", pearson), ("spearman", spearman)):
            report.numbers[f"{name}/{what}"] = bootstrap(statistic, [x, y], clusters=cluster, draws=draws)
        report.baselines[f"{name}/rmse_of_the_mean"] = rmse(np.full_like(y, usual[a]), y)
        report.baselines[f"{name}/spearman_of_length"] = spearman(lengths[there], y)
        report.length[f"{name}/spearman_of_prediction"] = spearman(lengths[there], x)

    def first(rows: Array) -> Estimate:
        there = rows & np.isfinite(truth[:, 0])
        arrays = [said[there, 0], truth[there, 0]]
        return bootstrap(spearman, arrays, clusters=prompts[there], draws=min(draws, 300))

    report.subsets = by_subset(subset, first)
    return report


def binary_report(
    logit: Array,
    label: Array,
    *,
    base: float,
    lengths: Array,
    clusters: Array,
    subset: Sequence[str] = (),
    draws: int = 1000,
) -> Report:
    """Labels in [0, 1]: accuracy at 1/2, area under the curve, cross-entropy in nats, calibration.

    `base` is the training data's share of positives: always saying the more frequent class, and always saying
    `base`, are the trivial predictions. `clusters` [N] are the rows that hang together.
    """
    p = sigmoid(logit)
    hit = ((p > 0.5) == (label > 0.5)).astype(float)
    report = Report("feedback")
    report.numbers = {
        "accuracy": wilson(float(hit.sum()), len(hit)),
        "auc": bootstrap(auc, [logit, label], clusters=clusters, draws=draws),
        "cross_entropy": bootstrap(
            lambda q, y: mean(cross_entropy(q, y)), [p, label], clusters=clusters, draws=draws
        ),
    }
    usual = np.full_like(p, base)
    report.baselines = {
        "more_frequent_class": mean((label > 0.5) == (base > 0.5)),
        "auc_of_length": auc(lengths, label),
        "cross_entropy_of_the_share": mean(cross_entropy(usual, label)),
    }
    if subset:  # whoever knows the subset alone is right this often
        shares = [label[np.array(subset) == name] > 0.5 for name in set(subset)]
        report.baselines["more_frequent_class_of_each_subset"] = sum(max(x.sum(), (~x).sum()) for x in shares) / len(
            label
        )
    report.length = {"spearman_of_score": spearman(lengths, logit)}
    report.calibration = calibration(p, label)
    report.subsets = by_subset(subset, lambda rows: wilson(float(hit[rows].sum()), int(rows.sum())))
    return report


def cross_entropy(p: Array, label: Array) -> Array:
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return -(label * np.log(p) + (1 - label) * np.log(1 - p))
