"""The fields of examples that are not text (labels, weights, ranks): to Arrow columns, and back to examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steersman.data.examples import Demonstration, Example, Feedback, Preference, Ranking, Rating, Steps
from steersman.data.rows import Row
from steersman.data.shapes import Kind


def schema(kind: Kind) -> dict[str, Any]:
    """The fields of a kind of example that are no text of it, each with its Arrow type."""
    import pyarrow as pa

    number, numbers = pa.float64(), pa.list_(pa.float64())
    pair = {
        "margin": number,
        "agreement": number,
        "weight": number,
        "votes": numbers,
        "chosen_from_reference": pa.bool_(),
    }
    fields: dict[Kind, dict[str, Any]] = {
        "demonstration": {},
        "preference": pair,
        "triple": pair,
        "feedback": {"label": pa.bool_(), "weight": number},
        "ranking": {"ranks": numbers},
        "rating": {"scores": pa.map_(pa.string(), number)},
        "steps": {"labels": numbers, "separator": pa.string()},
    }
    return fields[kind]


def column(examples: Sequence[Example], name: str) -> list[Any]:
    """A field of examples as Arrow takes it."""
    values = [getattr(e, name) for e in examples]
    return [list(x.items()) for x in values] if name == "scores" else values


def example(kind: Kind, prompt: str, row: Row, told: dict[str, Any]) -> Example:
    """An example without its texts; what stands for its prompt differs where the prompts differ."""
    match kind:
        case "preference" | "triple":
            return Preference(prompt, "", "", row, **{**told, "votes": tuple(told["votes"])})
        case "feedback":
            return Feedback(prompt, "", row=row, **told)
        case "ranking":
            return Ranking(prompt, [], row=row, **told)
        case "rating":
            return Rating(prompt, "", dict(told["scores"]), row)
        case "steps":
            return Steps(prompt, [], row=row, **told)
        case _:
            return Demonstration(prompt, "", row)
