"""The tables of `steersman verify`, for a terminal and for a page of text."""

from __future__ import annotations

from statistics import mean

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from steersman.tabular.preference_check import FixedPoint
from steersman.verify.identities import Identity
from steersman.verify.judge import EXACT, REACHED, Method
from steersman.verify.ranks import OnRanks
from steersman.verify.staleness import LAGS, RATES, StalenessRow

MARKS = "abcdefghijklmnopqrstuvwxyz"


def method_table(methods: list[Method], seeds: int, iterations: int) -> RenderableType:
    """One row per on-policy method, and below it what its marks mean."""
    table = Table(
        box=box.SIMPLE_HEAD, title="On-policy methods", title_style="bold", title_justify="left",
        collapse_padding=True, pad_edge=False,
    )  # fmt: skip
    for name in (
        "method",
        "paper",
        "",
        "gradient\nshipped",
        "\ncore",
        "\ncosine",
        "\n2 turns",
        "way to J*, %\nshipped",
        "\ncore",
        "\ns",
    ):
        text = name in ("method", "paper")
        table.add_column(name, justify="left" if text or not name else "right", no_wrap=not text)
    notes: dict[str, str] = {}
    for method in methods:
        check = method.gradient
        table.add_row(
            Text(method.title, style="bold"),
            method.paper.removeprefix("arXiv "),
            " ".join(_mark(notes, text) for text in (*method.bias.split("; "), _rest(method)) if text),
            _deviation(check.shipped, bool(method.bias)),
            _deviation(check.core),
            f"{check.cosine:.3f}",
            _deviation(method.turns.core),
            _way(method.way, bool(method.fixed_point)),
            _way(method.way_core),
            f"{method.seconds:.0f}",
        )
    legend = Text("\n").join(Text(f"{mark}  {text}") for text, mark in notes.items())
    reading = (
        "Gradient: largest relative deviation of the estimator's expectation, over every batch that could be drawn, "
        "from the exact gradient, and the cosine between the two; 2 turns: the core's, over episodes in which an "
        "environment answers at random between two actions. Way: share of the way from J(pi_ref) to J* after "
        f"{iterations} iterations of 128 sampled answers, mean of {seeds} seeds (and the worst). Core: with the "
        "named biases switched off."
    )
    return Group("", table, Padding(legend, (0, 2)), Padding(Text(reading, style="dim"), (1, 2)))


def offline_table(rows: list[FixedPoint], title: str = "Offline losses", gap_name: str = "J* - J") -> RenderableType:
    """One row per loss, descended on infinite data."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_style="bold", title_justify="left")
    for name in ("loss", "rests where", "off by", gap_name):
        table.add_column(name, justify="left" if name in ("loss", "rests where") else "right")
    for row in rows:
        style = "green" if row.holds else "bold red"
        gap = Text(f"{abs(row.gap):.4f}", style="green" if row.reaches_optimum else "")
        table.add_row(
            Text(row.name, style="bold"), Text(row.statement), Text(f"{row.deviation:.0e}", style=style), gap
        )
    return table


def identity_table(rows: list[Identity]) -> RenderableType:
    """One row per identity of the estimators."""
    table = Table(box=box.SIMPLE_HEAD, title="Estimators", title_style="bold", title_justify="left")
    for name in ("estimator", "identity", "off by"):
        table.add_column(name, justify="right" if name == "off by" else "left")
    for row in rows:
        table.add_row(Text(row.name, style="bold"), Text(row.statement), _deviation(row.deviation))
    return table


def staleness_table(rows: list[StalenessRow]) -> RenderableType:
    """One row per correction: bias / standard deviation by lag and rate, whole answers and mixed ones."""
    title = "Samples of an older policy: bias / deviation of one answer's gradient, in lengths of the exact one"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_style="bold", title_justify="left", pad_edge=False)
    table.add_column("correction")
    columns = [
        (lag, rate, mixed) for rate in RATES for lag, mixed in ((LAGS[0], False), (LAGS[-1], False), (LAGS[-1], True))
    ]
    for lag, rate, mixed in columns:
        table.add_column(f"rate {rate:g}\nlag {lag}" + (" mixed" if mixed else ""), justify="right")
    at = {(r.correction, r.lag, r.rate, r.mixed): r for r in rows}
    for name in dict.fromkeys(r.correction for r in rows):
        cells = [at[name, *column] for column in columns]
        table.add_row(Text(name, style="bold"), *(f"{r.bias:.3f} / {r.deviation:.2f}" for r in cells))
    return table


def ranks_table(rows: list[OnRanks], devices: int) -> RenderableType:
    """One row per method: how far its gradient on several ranks is from that of one process."""
    title = f"Exact gradients: {devices} ranks beside one process"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_style="bold", title_justify="left")
    for name in ("method", "shipped, off by", "core, off by"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        style = "green" if row.holds else "bold red"
        table.add_row(Text(row.name), Text(f"{row.shipped:.0e}", style=style), Text(f"{row.core:.0e}", style=style))
    return table


def _deviation(x: float, by_design: bool = False) -> Text:
    if x < EXACT:
        return Text(f"{x:.0e}", style="green")
    return Text(f"{x:.3f}", style="yellow" if by_design else "bold red")


def _way(ways: list[float], elsewhere: bool = False) -> Text:
    if not ways:
        return Text("")
    style = "green" if min(ways) >= REACHED else "yellow" if elsewhere else "bold red"
    return Text(f"{100 * mean(ways):.1f} ({100 * min(ways):.1f})", style=style)


def _mark(notes: dict[str, str], text: str) -> str:
    return notes.setdefault(text, MARKS[len(notes)])


def _rest(method: Method) -> str:
    if not method.fixed_point:
        return ""
    reached = f" ({mean(method.way_allowed):.1%} of the way there)" if method.limited else ""
    return f"comes to rest elsewhere: {method.fixed_point}{reached}"
