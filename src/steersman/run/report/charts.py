"""Line charts for the report: SVG whose colours are left to the page, so that they suit light and dark.

matplotlib is imported where a chart is drawn: every run imports this room, and few draw.
"""

from __future__ import annotations

import gc
import io
import itertools
import re
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH = 374.4
"""Of a chart, in points; its text has 9 of them."""

MOST = 1e5
"""How far apart the numbers of an axis may be that is logarithmic for the sake of lines far apart."""

SERIES = 8
"""Lines that one chart can show in colours that are told apart."""

DASHES: list[Any] = [
    "-",
    (0, (5, 2)),
    (0, (2, 2)),
    (0, (6, 2, 1.5, 2)),
    (0, (9, 3)),
    (0, (1, 1)),
    (0, (3, 5)),
    (0, (8, 2, 2, 2)),
]
"""How each line is dashed, in the order of the colours."""

# Colours that stand for the page's own: replaced by CSS variables once the picture is text.
_INK, _RULE = "#010203", "#010204"
_LINES = [f"#0102{16 + i:02x}" for i in range(SERIES)]
_STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK, "xtick.color": _RULE, "ytick.color": _RULE, "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": _RULE, "grid.linewidth": 0.6, "ytick.major.size": 0,
    "axes.formatter.useoffset": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """One series: its name and its points (step, value), all finite."""

    name: str
    steps: list[float]
    values: list[float]


@cache
def figure_class() -> type[Figure]:
    """matplotlib's figure.

    When it is imported it reads patterns with a parser whose caught errors hold themselves, and with them every
    function that was running, those of a run with its models too. So they are collected, once.
    """
    from matplotlib.figure import Figure

    gc.collect()
    return Figure


def line_chart(title: str, lines: Sequence[Line], *, log: bool = False, label: str = "") -> str:
    """The chart as an `<svg>` element; long noisy series are drawn pale with their running mean above them.

    `label` names the vertical axis; lines that coincide show through each other by their dashes. With `log` the axis
    is logarithmic wherever the numbers are far enough apart. Without, it is so only where one line would lie flat
    beside another, and not for a line so far below the others that room for it would flatten those.
    """
    import matplotlib as mpl
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    style: Any = _STYLE | {"svg.hashsalt": title}
    with mpl.rc_context(style):
        figure = figure_class()(figsize=(WIDTH / 72, 2.5))
        axes = figure.add_axes((0.18, 0.18, 0.76, 0.73))  # half of the last step's number is to the right of it
        axes.xaxis.set_label_coords(0.5, -0.15)
        for color, dash, line in zip(_LINES, DASHES, lines, strict=False):
            smooth = running_mean(line.values)
            noisy = smooth is not line.values
            marker = "o" if len(line.values) <= 20 else None
            axes.plot(line.steps, line.values, color=color, lw=0.8 if noisy else 1.6, alpha=0.35 if noisy else 1,
                      marker=marker, ms=3, ls=dash)  # fmt: skip
            if noisy:
                axes.plot(line.steps, smooth, color=color, lw=1.8, ls=dash)
        values = [v for line in lines for v in line.values]
        low, high = min(values), max(values)
        # within a decade a linear axis has more numbers
        by_decades = 0 < 10 * low < high and (log or (high < MOST * low and _far_apart(lines)))
        if by_decades:
            axes.set_yscale("log")
            subs = (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)
            axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
            axes.yaxis.set_minor_locator(NullLocator())
        elif _one_number(low, high):
            around = 0.05 * max(abs(low), abs(high)) or 0.05
            axes.set_ylim(low - around, high + around)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("step")
        axes.margins(x=0.01)
        _number(axes.xaxis, together=True)
        _name(axes, textwrap.wrap(label or title, 26), _number(axes.yaxis, together=not by_decades))
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(out.getvalue(), title)


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """The numbers of an axis, with the fewest decimals that tell them apart; powers of ten for tiny and huge ones."""
    largest = max(map(abs, ticks), default=0.0)
    gap = min((abs(b - a) for a, b in itertools.pairwise(ticks)), default=largest)
    form = ",.{}f" if largest == 0 or 1e-3 <= largest < 1e6 else ".{}e"
    texts: list[str] = []
    for digits in range(17):
        texts = [format(tick, form.format(digits)) for tick in ticks]
        if all(abs(float(text.replace(",", "")) - x) <= 1e-3 * gap for text, x in zip(texts, ticks, strict=True)):
            break
    return ["0" if tick == 0 else typeset(text) for tick, text in zip(ticks, texts, strict=True)]


def typeset(number: str) -> str:
    """A formatted number with a real minus sign, and its exponent without the zeros before it."""
    return re.sub(r"e([+-])0*(?=\d)", lambda sign: "e" + sign[1].replace("+", ""), number).replace("-", "\u2212")


def _number(axis: Axis, *, together: bool) -> int:
    """Writes the numbers of an axis, each by itself if not `together`; returns the letters of the longest."""
    low, high = sorted(axis.get_view_interval())
    slack = 1e-6 * (high - low)
    ticks = [float(x) for x in axis.get_majorticklocs() if low - slack <= x <= high + slack]
    texts = tick_texts(ticks) if together else [tick_texts([x])[0] for x in ticks]
    axis.set_ticks(ticks, texts)
    return max(map(len, texts), default=0)


def _name(axes: Axes, name: list[str], letters: int) -> None:
    """Names the vertical axis, to the left of numbers of so many letters, and has the axes begin to their right.

    A letter counts as 5.8 points: to measure the texts would be to draw each chart twice.
    """
    numbers = 9 + 5.8 * max(letters, 5)
    left = 4 + 11 * len(name) + numbers
    right = 0.94 * WIDTH
    axes.set_position((left / WIDTH, 0.18, (right - left) / WIDTH, 0.73))
    axes.yaxis.set_label_coords(-numbers / (right - left), 0.5)
    axes.set_ylabel("\n".join(name))


def running_mean(values: list[float]) -> list[float]:
    """Centred mean over about a twentieth of the series; the same list where it is short or smooth."""
    half = len(values) // 40
    low, high = min(values), max(values)
    travelled = sum(abs(b - a) for a, b in itertools.pairwise(values))
    if half < 1 or _one_number(low, high) or travelled < 3 * (high - low):
        return values
    total = [0.0]
    for value in values:
        total.append(total[-1] + (value - low))  # from the lowest, so that rounding is of what moves
    out = []
    for i in range(len(values)):
        begin, end = max(0, i - half), min(len(values), i + half + 1)
        out.append(low + (total[end] - total[begin]) / (end - begin))
    return out


def never_moves(line: Line) -> bool:
    """Whether all its values are one number, but for rounding."""
    return _one_number(min(line.values), max(line.values))


def _one_number(low: float, high: float) -> bool:
    """Whether what lies between the two is one number, but for rounding."""
    return high - low <= 1e-9 * max(abs(low), abs(high))


def _far_apart(lines: Sequence[Line]) -> bool:
    """Whether one line would lie flat on the floor beside another."""
    middles = [statistics.median(line.values) for line in lines]
    return max(middles) > 30 * min(middles)


def _themed(svg: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    # Ids must not meet those of the other charts on the page.
    salt = re.sub(r"\W", "", title)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{salt}-", svg)
    svg = svg.replace(_INK, "var(--ink-soft)").replace(_RULE, "var(--rule)")
    for i, color in enumerate(_LINES):
        svg = svg.replace(color, f"var(--s{i})")
    return svg
