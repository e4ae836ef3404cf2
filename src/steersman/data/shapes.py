"""The shape of rows, recognised by columns and contents, and said.

A format knows the columns that it is known by and turns one row into an example of one kind; examples of one
kind can serve as another where that is honest (`DERIVED`), and then the sentence says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from steersman.data.examples import (
    Content,
    Demonstration,
    Example,
    Feedback,
    Preference,
    Query,
    has_ties,
    pairs,
)
from steersman.data.fields import is_json_text, is_label, label_fault, read_as_json
from steersman.data.rows import BadRows, Row, nearest
from steersman.data.tools import with_tools
from steersman.types import SteersmanError

Kind = Literal["demonstration", "preference", "triple", "feedback", "ranking", "rating", "steps", "query"]
Probe = dict[str, Any]
"""Column -> the first value of it that is not None, over the first rows."""

ALIASES = {
    "prompt": ("question", "query", "input", "source"),
    "completion": ("response", "answer", "output", "target"),
}

IN_TURNS = ("messages", "conversations", "responses", "chosen", "rejected", "prompt", "completion", "steps")
"""Columns that may hold lists, which some files keep as JSON text."""


@dataclass(frozen=True, slots=True)
class Format:
    """One shape: `matches` looks at the columns, `convert` turns a row into an example of kind `kind`.

    `regroup` turns the rows of a file into other rows first, where an example is not one row. `as_query` makes
    a prompt of a row where that is more than leaving the answer out.
    """

    name: str
    kind: Kind
    sentence: str
    matches: Callable[[Probe], bool]
    convert: Callable[[Row], Example]
    regroup: Callable[[Iterable[Row], BadRows], Iterable[Row]] | None = None
    as_query: Callable[[Row], Query] | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """What was recognised: the format, what its examples are used as, and a sentence that says so."""

    format: Format
    want: Kind
    columns: dict[str, str]
    sentence: str


def probe(rows: list[Row]) -> Probe:
    seen: Probe = {}
    for row in rows:
        for column, got in row.data.items():
            if seen.get(column) is None:
                seen[column] = got
    return seen


def recognise(rows: list[Row], want: Kind, formats: list[Format]) -> Shape:
    """The first format that fits the rows and can serve as `want`.

    Raises SteersmanError naming the columns, what they fit, and the nearest known name of a misspelt one.
    """
    seen = probe(rows)
    renamed = {name: alias for name, names in ALIASES.items() if (alias := _alias(seen, name, names))}
    widened = seen | {name: seen[alias] for name, alias in renamed.items()}
    fitting = []
    for candidate in formats:
        direct = candidate.matches(seen)
        if not direct and not candidate.matches(widened):
            continue
        fitting.append(candidate)
        if want == candidate.kind or (candidate.kind, want) in DERIVED:
            columns = {} if direct else renamed
            return Shape(candidate, want, columns, _sentence(candidate, want, columns))
    raise SteersmanError(_unknown(rows[0], seen, want, fitting))


def kind_of(rows: list[Row], among: Sequence[Kind], formats: list[Format]) -> Kind | None:
    """The kind of the first format that fits the rows and gives one of the wanted kinds by itself."""
    seen = probe(rows)
    renamed = {name: alias for name, names in ALIASES.items() if (alias := _alias(seen, name, names))}
    widened = seen | {name: seen[alias] for name, alias in renamed.items()}
    fits = (f for f in formats if f.kind in among and (f.matches(seen) or f.matches(widened)))
    found = next(fits, None)
    return found.kind if found else None


def examples(shape: Shape, row: Row) -> Sequence[Example]:
    """The examples of the wanted kind that a row gives."""
    for name, column in shape.columns.items():
        if name not in row.data:
            row.names = row.names | {name: column}
            if column in row.data:
                row.data = row.data | {name: row.data[column]}
    if shape.want == "query" and shape.format.as_query:
        return [with_tools(shape.format.as_query(row), row)]
    example = with_tools(shape.format.convert(row), row)
    if shape.format.kind == shape.want:
        return [example]
    return DERIVED[shape.format.kind, shape.want][0](example)


def _alias(seen: Probe, name: str, names: tuple[str, ...]) -> str | None:
    if name in seen or "instruction" in seen:
        return None
    return next((n for n in names if isinstance(seen.get(n), str)), None)


def _sentence(fmt: Format, want: Kind, columns: dict[str, str]) -> str:
    said = fmt.sentence
    if columns:
        said += " (" + ", ".join(f"{new} is the column {old!r}" for new, old in columns.items()) + ")"
    if fmt.kind != want:
        said += f"; used as {NOUNS[want]}: {DERIVED[fmt.kind, want][1]}"
    return said


def _unknown(row: Row, seen: Probe, want: Kind, fitting: list[Format]) -> str:
    columns = ", ".join(repr(c) for c in seen) or "none"
    if want == "feedback" and "label" in seen and not is_label(seen["label"]):
        return f"{row.where()}, field 'label': {label_fault(seen['label'])}"
    rename = "Name your columns in data.columns, such as {prompt: question, completion: answer}"
    if fitting:
        return (
            f"{row.file}: these rows are {fitting[0].sentence} (columns {columns}); "
            f"they can not serve as {NOUNS[want]}, which need {NEEDS[want]}. {rename}"
        )
    known = ["text", "prompt", "completion", "messages", "chosen", "rejected", "label", "instruction", "output"]
    known += ["conversations", "responses", "ranks", "scores", "score"]
    hints = [f"{c!r} looks like {near[len('; did you mean ') : -1]}" for c in seen if (near := nearest(c, known))]
    hints = [h for h, c in zip(hints, [c for c in seen if nearest(c, known)], strict=True) if c not in known]
    hints += [read_as_json(c) for c, got in seen.items() if c in IN_TURNS and is_json_text(got)]
    return (
        f"{row.where()}: the columns {columns} are no shape that is known for {NOUNS[want]}, "
        f"which need {NEEDS[want]}{'; ' + ', '.join(hints) if hints else ''}. {rename}"
    )


NOUNS: dict[Kind, str] = {
    "demonstration": "demonstrations",
    "preference": "preference pairs",
    "triple": "preference pairs with a gold answer",
    "feedback": "thumbs up and down",
    "ranking": "rankings",
    "rating": "ratings",
    "steps": "answers with labelled steps",
    "query": "prompts",
}
NEEDS: dict[Kind, str] = {
    "demonstration": "text, prompt and completion, messages, or instruction and output",
    "preference": "prompt, chosen and rejected (or responses and ranks)",
    "triple": "prompt, chosen, rejected and gold",
    "feedback": "prompt, completion and label",
    "ranking": "prompt, responses and ranks (or scores)",
    "rating": "prompt, completion and a score (data.scores names the rating columns)",
    "steps": "prompt, steps and labels, one label per step",
    "query": "prompt (or messages, or data.prompt_template)",
}


def _positive(example: Feedback) -> list[Example]:
    return [Demonstration(example.prompt, example.completion, example.row)] if example.label else []


def _by_raters(example: Preference) -> tuple[Content, Content]:
    """The answer that most raters preferred, and the other one."""
    if example.agreement < 0.5:
        return example.rejected, example.chosen
    return example.chosen, example.rejected


def _preferred(example: Preference) -> list[Example]:
    if has_ties(example):
        return []
    return [Demonstration(example.prompt, _by_raters(example)[0], example.row)]


def _both(example: Preference) -> list[Example]:
    if has_ties(example):
        raise example.row.fault("tie", "the raters are evenly split, so neither answer has a thumb up")
    better, worse = _by_raters(example)
    return [
        Feedback(example.prompt, better, True, example.row, example.weight),
        Feedback(example.prompt, worse, False, example.row, example.weight),
    ]


def _query(example: Any) -> list[Example]:
    return [Query(example.prompt, example.row, example.row.data)]


def _text_query(example: Demonstration) -> list[Example]:
    prompt = example.completion if example.prompt == "" else example.prompt
    return [Query(prompt, example.row, example.row.data)]


DERIVED: dict[tuple[Kind, Kind], tuple[Callable[[Any], Sequence[Example]], str]] = {
    ("preference", "demonstration"): (_preferred, "the chosen answers"),
    ("preference", "feedback"): (_both, "chosen is up, rejected is down"),
    ("feedback", "demonstration"): (_positive, "the rows with thumbs up"),
    ("ranking", "preference"): (pairs, "all pairs of unequal rank"),
    ("demonstration", "query"): (_text_query, "without the completions"),
    ("preference", "query"): (_query, "without the answers"),
    ("feedback", "query"): (_query, "without the completions"),
    ("ranking", "query"): (_query, "without the responses"),
    ("rating", "query"): (_query, "without the completions"),
    ("steps", "query"): (_query, "without the steps"),
}  # fmt: skip
