"""A reliability diagram: predicted probabilities beside what was observed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from steersman.run.report.charts import figure_class


def calibration_png(
    path: Path,
    predicted: Sequence[float],
    observed: Sequence[float],
    count: Sequence[int],
    *,
    low: float,
    error: float,
) -> Path:
    """Observed share over predicted probability, one dot for each bin, its area the number of examples in it."""
    figure = figure_class()(figsize=(4.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([low, 1], [low, 1], color="#9aa0a8", lw=1, ls="--", label="calibrated")
    axes.plot(predicted, observed, color="#2b5f8f", lw=1.4, zorder=2)
    most = max(count, default=1)
    axes.scatter(predicted, observed, s=[20 + 180 * n / most for n in count], color="#2b5f8f", alpha=0.75, zorder=3)
    for i, (x, y, n) in enumerate(zip(predicted, observed, count, strict=True)):
        beside = (0, -15 if i % 2 else 10)  # neighbours may lie on each other
        axes.annotate(f"{n}", (x, y), textcoords="offset points", xytext=beside, ha="center", fontsize=7)
    axes.set_xlim(low - 0.02, 1.02)
    axes.set_ylim(min([low, *observed]) - 0.05, 1.05)
    axes.set_xlabel("predicted probability")
    axes.set_ylabel("observed share")
    axes.set_title(f"expected calibration error {error:.3f}", fontsize=10)
    axes.grid(color="#e4e1da", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    return path
