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


def read_outcomes(path: str, control: str, treatment: str, bad: BadRows | None = None) -> list[Outcome]:
    """The outcomes of a file or folder, by time; those of one time in the order of their rows.

    A row is a judgement (`judgements.JudgementFiles` says which columns; one of other models is passed over), or has
    `user` and `winner` (an arm's name, tie, both_bad), or `arm` with any of `thumb` (up, down), `retained` (true,
    false), `length` (tokens), `latency` (seconds), or `metric` with `value`; and it may have `time`, without which it
    is as late as the row before it.

    Raises RowError (file, row, field) at what is none of these, or skips and counts it if `bad` says so.
    """
    bad, before = bad or BadRows(key=None), 0.0
    found, judged = list[tuple[int, Outcome]](), dict[int, Judgement]()
    for place, row in enumerate(read_rows(path, bad)):
        row.data = {k: v for k, v in row.data.items() if v not in (None, "")}  # cells of CSV are empty, not missing
        try:
            if "choice" in row.data or "label" in row.data:
                judged[place] = judgement(row, before)
                before = judged[place].time
            else:
                found += [(place, one) for one in _outcomes(row, control, treatment, before)]
                before = found[-1][1].time
        except RowError as error:
            bad.add(error)
    places = {id(one): place for place, one in judged.items()}
    for one in counting(judged.values()):
        found += [(places[id(one)], outcome) for outcome in _told(one, control, treatment)]
    return [one for _, one in sorted(found, key=lambda at: (at[1].time, at[0]))]


def outcomes_of(rows: Iterable[Judgement], control: str, treatment: str) -> Iterator[Outcome]:
    """Wins and thumbs of judgements about these two models, by time.

    Gold items tell of raters, not of models. Where a user judged the same answers again, the last judgement counts
    and the earlier ones do not.
    """
    for one in counting(rows):
        yield from _told(one, control, treatment)


def counting(rows: Iterable[Judgement]) -> list[Judgement]:
    """The judgements that tell of models, by time: no gold items, and of a user's judgements of the same answers the
    last."""
    return newest(one for one in rows if one.expected is None)


def _told(one: Judgement, control: str, treatment: str) -> Iterator[Outcome]:
    """The outcome of a judgement; none where it is about other models."""
    if one.choice is not None and set(one.models) == {control, treatment}:
        first = one.models[0] == treatment
        yield Outcome(one.user, one.time, WIN, one.share if first else 1 - one.share)
    elif one.label is not None and one.models and one.models[0] in (control, treatment):
        yield Outcome(one.user, one.time, "thumb", one.share, one.models[0] == treatment)


def _outcomes(row: Row, control: str, treatment: str, before: float) -> Iterator[Outcome]:
    data = row.data
    user, time = name(row, "user"), when(row, before)
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
