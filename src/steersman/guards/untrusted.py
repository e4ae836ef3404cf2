"""JSON that someone else wrote, parsed within limits of depth and size, in time linear in its length.

Python's own parser lets through what fails later and elsewhere (half a surrogate pair, a key that stands twice), and
fails on the rest with errors that are no JSON errors (RecursionError, ValueError). Here each has a name and a place.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

DEPTH = 200
"""Brackets inside each other. What works on a parsed value by recursion has room for as many."""
DIGITS = 300
"""Digits of an integer: with more it is no finite float."""
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair in a str: no character, so that no file and no tokenizer takes it."""

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a value: `reason` is a short name for counting, `problem` a sentence, `field` the place as
    in `messages[0].content` (empty for the value itself)."""

    reason: str
    problem: str
    field: str = ""
    line: int = 1


class UntrustedError(ValueError):
    """JSON that breaks a limit; `fault` says which. Broken JSON is a `json.JSONDecodeError` as ever."""

    def __init__(self, where: str, fault: Fault) -> None:
        at = f", field {fault.field!r}" if fault.field else ""
        line = f", line {fault.line}" if fault.line > 1 else ""
        super().__init__(f"{where}{line}{at}: {fault.problem}")
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Parsed:
    """A parsed value. Only where it is `suspect` has `first_fault` anything to find in it."""

    value: Any
    suspect: bool


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a parsed value is a number; true and false are none."""
    return type(value) in (int, float)


def without_half_pairs(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair."""
    return LONE_SURROGATE.sub("\ufffd", text)


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; `where` (a file and line, a reply) begins the message of every fault.

    Raises UntrustedError for more than 200 brackets inside each other, an integer of more than 300 digits, a lone
    surrogate and a key that stands twice in one object, and json.JSONDecodeError for what is no JSON.
    """
    parsed = parse_suspect(text, where)
    fault = first_fault(parsed.value) if parsed.suspect else None
    if fault is not None:
        raise UntrustedError(where, fault)
    return parsed.value


def parse_suspect(text: str, where: str) -> Parsed:
    """As `parse_json`, but what is wrong inside a part of the value stays there for `first_fault` to find, so that
    the other parts of a list can be used. Raises UntrustedError only where nesting leaves no value at all."""
    planted: list[Fault] = []

    def integer(digits: str) -> Any:
        if len(digits) <= DIGITS:
            return int(digits)
        planted.append(Fault("huge integer", f"an integer of more than {DIGITS} digits ({digits[:12]}...)"))
        return planted[-1]

    def an_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
            planted.append(Fault("repeated key", "the key stands twice in one object; keep one of the two"))
            made[twice] = planted[-1]
        return made

    try:
        value = json.loads(text, parse_int=integer, object_pairs_hook=an_object)
    except RecursionError as error:
        line = text.count("\n", 0, _too_deep(text)) + 1
        raise UntrustedError(where, _deep(line=line)) from error
    deep = text.count("[") + text.count("{") > DEPTH
    halves = _ESCAPED_SURROGATE.search(text) or LONE_SURROGATE.search(text)
    return Parsed(value, bool(planted or deep or halves))


def first_fault(value: Any) -> Fault | None:
    """The first fault inside a parsed value, with its place; None where there is none."""
    for inner, place, depth in _walk(value):
        if depth >= DEPTH and isinstance(inner, list | dict):
            return _deep(place.split(".")[0].split("[")[0])
        if isinstance(inner, Fault):
            return Fault(inner.reason, inner.problem, place)
        found = LONE_SURROGATE.search(inner) if isinstance(inner, str) else None
        if found is not None:
            problem = (
                f"a lone surrogate (U+{ord(found[0]):04X} at character {found.start()}), which is no character; "
                "mend the text, or put U+FFFD in its place"
            )
            return Fault("lone surrogate", problem, without_half_pairs(place))
    return None


def _walk(value: Any) -> Iterator[tuple[Any, str, int]]:
    """Every value and every key inside, in order, with its place and depth; the stack is a list's."""
    stack: list[tuple[Any, str, int]] = [(value, "", 0)]
    while stack:
        inner, place, depth = stack.pop()
        yield inner, place, depth
        if isinstance(inner, dict):
            for name in inner:
                yield name, f"{place}.{name}" if place else name, depth
            below = [(x, f"{place}.{name}" if place else name, depth + 1) for name, x in inner.items()]
            stack += reversed(below)
        elif isinstance(inner, list):
            stack += [(x, f"{place}[{i}]", depth + 1) for i, x in reversed([*enumerate(inner)])]


def _deep(field: str = "", line: int = 1) -> Fault:
    problem = f"nested too deeply (more than {DEPTH} brackets inside each other)"
    return Fault("nested too deeply", problem, field, line)


def _too_deep(text: str) -> int:
    """Where in a text brackets are nested deeper than `DEPTH`."""
    depth = 0
    for found in _BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > DEPTH:
            return found.start()
    return len(text)
