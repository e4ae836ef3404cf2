"""What an experiment measures: rows of a user, a metric and a value in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from steersman.data import BadRows, Row, RowError, read_rows
from steersman.data import fields as f
from steersman.people.judgements import Judgement, judgement, name, newest, when

WIN = "win"
"""The metric of two answers shown side by side: the treatment's share, 1 won, 0 lost, 0.5 tied or both bad."""
THUMBS = {"up": 1.0, "down": 0.0}
ARMS = "experiment.control and experiment.treatment name the two arms"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One outcome of a user. `treated` says whose it is, or None where both arms were shown at once (a win).

    `value` is in the metric's own unit: a share, 0 or 1, tokens, seconds.
    """

    user: str
    time: float
    metric: str
    value: float
    treated: bool | None = None


def outcome_rows(rows: Iterable[Row], control: str, treatment: str, bad: BadRows | None = None) -> Iterator[Outcome]:
    """The outcomes of rows, those of judgements last; judgements of other models are passed over.

    A row is a judgement (`judgements.JudgementFiles` says which columns), or has `user` and
    `winner` (an arm's name, tie, both_bad), or `arm` with any of `thumb` (up, down), `retained` (true, false),
    `length` (tokens), `latency` (seconds), or `metric` with `value`; and it may have `time`.

    Raises RowError (file, row, field) at what is none of these, or skips and counts it if `bad` says so.
    """
    bad, judged = bad or BadRows(key=None), list[Judgement]()
    for row in rows:
        row.data = {k: v for k, v in row.data.items() if v not in (None, "")}  # cells of CSV are empty, not missing
        found: list[Outcome] = []
        try:
            if "choice" in row.data or "label" in row.data:
                judged.append(judgement(row))
            else:
                found = list(_outcomes(row, control, treatment))
        except RowError as error:
            bad.add(error)
        yield from found
    yield from outcomes_of(judged, control, treatment)


def read_outcomes(path: str, control: str, treatment: str, bad: BadRows | None = None) -> list[Outcome]:
    """The outcomes of a file or folder, by time."""
    return sorted(outcome_rows(read_rows(path, bad), control, treatment, bad), key=lambda o: o.time)


def outcomes_of(rows: Iterable[Judgement], control: str, treatment: str) -> Iterator[Outcome]:
    """Wins and thumbs of judgements about these two models, by time; gold items tell of raters, not of models.

    Where a user judged the same answers again, the last judgement counts and the earlier ones do not.
    """
    for one in newest(one for one in rows if one.expected is None):
        if one.choice is not None and set(one.models) == {control, treatment}:
            first = one.models[0] == treatment
            yield Outcome(one.user, one.time, WIN, one.share if first else 1 - one.share)
        elif one.label is not None and one.models and one.models[0] in (control, treatment):
            yield Outcome(one.user, one.time, "thumb", one.share, one.models[0] == treatment)


def _outcomes(row: Row, control: str, treatment: str) -> Iterator[Outcome]:
    data = row.data
    user, time = name(row, "user"), when(row)
    if "winner" in data:
        shares = {treatment: 1.0, control: 0.0, "tie": 0.5, "both_bad": 0.5}
        winner = name(row, "winner")
        if winner not in shares:
            known = ", ".join(shares)
            raise row.fault("unknown arm", f"must be one of {known}, not {winner[:40]!r}; {ARMS}", "winner")
        yield Outcome(user, time, WIN, shares[winner])
        return
    arm = name(row, "arm")
    if arm not in (control, treatment):
        raise row.fault("unknown arm", f"must be {control} or {treatment}, not {arm[:40]!r}; {ARMS}", "arm")
    values = dict(_values(row))
    if not values:
        raise row.fault(
            "no outcome",
            f"the row has none of winner, thumb, retained, length, latency, value (it has {', '.join(data)})",
        )
    for metric, value in values.items():
        yield Outcome(user, time, metric, value, arm == treatment)


def _values(row: Row) -> Iterator[tuple[str, float]]:
    data = row.data
    if "thumb" in data:
        word = str(data["thumb"]).strip().lower()
        yield "thumb", THUMBS[word] if word in THUMBS else float(f.label(row, "thumb"))
    if "retained" in data:
        yield "retained", float(f.label(row, "retained"))
    for metric in ("length", "latency"):
        if metric in data:
            yield metric, f.number(row, metric)
    if "metric" in data or "value" in data:
        metric = name(row, "metric")
        if metric == WIN:
            raise row.fault(
                "wrong metric", f"{WIN} is of two answers shown at once: give `winner`, not `arm`", "metric"
            )
        yield metric, f.number(row, "value")
