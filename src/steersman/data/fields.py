"""Reading one field of a row, with an error that names file, row and field where it is not as it should be."""

from __future__ import annotations

import json
import math
from typing import Any

from steersman.data.examples import Content, Message, assistant, is_empty, user
from steersman.data.rows import Row, nearest
from steersman.data.tools import template_fields
from steersman.guards.untrusted import UntrustedError, parse_json

ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "agent": "assistant", "bing": "assistant", "bard": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip


def value(row: Row, column: str) -> Any:
    if column not in row.data:
        hint = nearest(row.names.get(column, column), row.data)
        raise row.fault("missing field", f"the row has no such field (it has {', '.join(row.data)}){hint}", column)
    if row.data[column] is None:
        raise row.fault("missing value", "the field is null", column)
    return row.data[column]


def text(row: Row, column: str) -> str:
    got = value(row, column)
    if not isinstance(got, str):
        raise row.fault("wrong type", f"must be text, not {type(got).__name__} ({str(got)[:40]!r})", column)
    return got


def optional_text(row: Row, column: str) -> str:
    return text(row, column) if row.data.get(column) is not None else ""


def number(row: Row, column: str, got: Any = None) -> float:
    got = value(row, column) if got is None else got
    if isinstance(got, str):  # what CSV holds
        try:
            got = float(got)
        except ValueError:
            raise row.fault("wrong type", f"must be a number, not {got[:40]!r}", column) from None
    if not isinstance(got, int | float) or isinstance(got, bool):
        raise row.fault("wrong type", f"must be a number, not {type(got).__name__}", column)
    if not math.isfinite(got):
        raise row.fault("number not finite", f"must be a finite number, not {got}", column)
    return float(got)


def optional_number(row: Row, column: str) -> float | None:
    return number(row, column) if row.data.get(column) is not None else None


LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "-1": False}
"""What a thumb may be, as text."""


def is_label(got: Any) -> bool:
    """Whether a value is a thumb: true/false, 1/0, or 1/-1, also as text."""
    return isinstance(got, bool | int | float | str) and str(got).strip().lower() in LABELS


def label_fault(got: Any) -> str:
    """What is wrong with a value that is no thumb."""
    return f"must be true or false (or 1 and 0), not {str(got)[:40]!r}"


def label(row: Row, column: str) -> bool:
    """A thumb: true/false, 1/0, or 1/-1, also as text."""
    got = value(row, column)
    if is_label(got):
        return LABELS[str(got).strip().lower()]
    raise row.fault("wrong type", label_fault(got), column)


def listing(row: Row, column: str) -> list[Any]:
    got = value(row, column)
    if not isinstance(got, list):
        hint = f"; {read_as_json(row.names.get(column, column))}" if is_json_text(got) else ""
        raise row.fault("wrong type", f"must be a list, not {type(got).__name__}{hint}", column)
    return got


def is_json_text(got: Any) -> bool:
    """Whether a value is text that holds a JSON list or object."""
    if not isinstance(got, str) or not got.lstrip().startswith(("[", "{")):
        return False
    try:
        return isinstance(parse_json(got, ""), list | dict)
    except ValueError:
        return False


def read_as_json(column: str) -> str:
    """What to do about a column of JSON as text."""
    return f"{column!r} holds JSON as text: data.json_columns: [{column}] reads it"


def content(row: Row, column: str) -> Content:
    """Plain text, or turns: a list of {role, content} or {from, value}, or a single one of them."""
    got = value(row, column)
    if isinstance(got, str):
        return got
    if isinstance(got, dict):
        return [turn(row, column, got, "assistant")]
    if isinstance(got, list):
        return turns(row, column, got)
    raise row.fault("wrong type", f"must be text or a list of turns, not {type(got).__name__}", column)


def turns(row: Row, column: str, items: list[Any]) -> list[Message]:
    if not items:
        raise row.fault("empty conversation", "the conversation has no turn", column)
    return [turn(row, column, item, None, i) for i, item in enumerate(items)]


def turn(row: Row, column: str, item: Any, default_role: str | None, index: int = 0) -> Message:
    at = f"turn {index + 1}"
    if not isinstance(item, dict):
        raise row.fault("wrong type", f"{at} must be an object, not {type(item).__name__}", column)
    role = item.get("role", item.get("from", default_role))
    if role not in ROLES:
        known = "system, user, assistant, tool"
        hint = nearest(str(role), ROLES)
        raise row.fault("unknown role", f"{at} has the role {role!r}; known are {known}{hint}", column)
    body = item.get("content", item.get("value", item.get("text")))
    if isinstance(body, list):
        body = _parts(row, column, at, body)
    more = template_fields(row, column, at, item)
    called = bool(more.get("tool_calls") or more.get("function_call"))
    if body is None and called:
        body = ""
    if not isinstance(body, str):
        what = "has no content" if body is None else f"must hold text, not {type(body).__name__}"
        raise row.fault("missing value" if body is None else "wrong type", f"{at} {what}", column)
    made: Any = {"role": ROLES[role], "content": body, **more}
    if made["role"] == "assistant" and not body.strip() and not called:
        raise row.fault("empty completion", f"{at}, the assistant's, is empty", column)
    return made


def _parts(row: Row, column: str, at: str, parts: list[Any]) -> str:
    texts = [p.get("text") if isinstance(p, dict) and p.get("type", "text") == "text" else None for p in parts]
    if any(not isinstance(t, str) for t in texts):
        kinds = {str(p.get("type"))[:20] for p in parts if isinstance(p, dict)} - {"text", "None"}
        named = f" ({', '.join(sorted(kinds))})" if kinds else ""
        raise row.fault(
            "wrong type",
            f"{at} holds a part that is not text{named}; images and sound are not read: no verb "
            "passes a processor's pixels or samples beside the token ids. Leave the row out "
            "(data.on_bad_row: skip), or put what it shows into words",
            column,
        )
    return "".join(t for t in texts if t)


def with_system(row: Row, messages: list[Message]) -> list[Message]:
    """Turns with the row's column `system` as the first one; where they begin with a system turn of their own, that
    one stands and the column is not read."""
    system = optional_text(row, "system")
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def prompt(row: Row) -> Content:
    """The column `prompt`, as turns behind the system turn where the row has the column `system`."""
    got = content(row, "prompt")
    if is_empty(got):
        raise row.fault("empty prompt", "the prompt is empty", "prompt")
    if isinstance(got, str):
        return with_system(row, user(got)) if optional_text(row, "system") else got
    return with_system(row, got)


def conversation(row: Row, column: str) -> tuple[list[Message], list[Message]]:
    """A whole conversation as (turns before the first assistant turn, the rest up to the last assistant turn).

    Turns after the last assistant turn teach nothing and are cut off.
    """
    return from_first_reply(row, with_system(row, turns(row, column, listing(row, column))), column)


def from_first_reply(row: Row, messages: list[Message], column: str) -> tuple[list[Message], list[Message]]:
    """Turns as `conversation` parts them; `column` is what errors name."""
    speaks = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not speaks:
        raise row.fault("no assistant turn", "no turn of the conversation is the assistant's", column)
    if speaks[0] == 0:
        raise row.fault("empty prompt", "the conversation begins with the assistant", column)
    return messages[: speaks[0]], messages[speaks[0] : speaks[-1] + 1]


def last_reply(row: Row, column: str) -> tuple[list[Message], list[Message]]:
    """A whole conversation as (everything before the last assistant turn, that turn)."""
    prompt, rest = conversation(row, column)
    return prompt + rest[:-1], rest[-1:]


def common_prompt(row: Row, chosen: list[Message], rejected: list[Message]) -> tuple[Content, Content, Content]:
    """Two whole conversations as (the turns they share, rest of the chosen, rest of the rejected)."""
    n = _shared(row, chosen, rejected)
    return with_system(row, chosen[:n]), chosen[n:], rejected[n:]


def prompt_of_both(row: Row, chosen: list[Message], rejected: list[Message]) -> tuple[Content, Content, Content]:
    """As `common_prompt`, of a row that has a column `prompt` beside the two whole conversations.

    A text there repeats what the conversations ask. Of turns there, a system turn stands first where the
    conversations have none; all others must be those with which both begin.
    """
    n, given = _shared(row, chosen, rejected), content(row, "prompt")
    shared = chosen[:n]
    if not isinstance(given, str):
        said, asked = ([_bare(m) for m in turns if m["role"] != "system"] for turns in (given, shared))
        if said != asked[: len(said)]:
            raise row.fault(
                "prompt beside whole conversations",
                "the conversations in chosen and rejected do not begin with these turns; put the turns into both, or "
                "leave the column out",
                "prompt",
            )
        if shared[0]["role"] != "system":
            shared = [*(m for m in given if m["role"] == "system"), *shared]
    return with_system(row, shared), chosen[n:], rejected[n:]


def _shared(row: Row, chosen: list[Message], rejected: list[Message]) -> int:
    """How many turns two whole conversations share before the replies in which they part."""
    n = 0
    while n < min(len(chosen), len(rejected)) and chosen[n] == rejected[n]:
        n += 1
    n = min(n, len(chosen) - 1, len(rejected) - 1)
    heads = (chosen[n]["role"], rejected[n]["role"])
    if n == 0 or heads != ("assistant", "assistant"):
        raise row.fault(
            "conversations differ before the reply",
            f"the two conversations part at turn {n + 1}, which is not the assistant's in both",
            "chosen",
        )
    return n


def _bare(message: Message) -> tuple[str, str]:
    return message["role"], message["content"].strip()


def instruction(row: Row) -> list[Message]:
    """Alpaca's instruction and optional input as a user's turn, behind the earlier turns of the column `history`."""
    asked = text(row, "instruction")
    if not asked.strip():
        raise row.fault("empty prompt", "the instruction is empty", "instruction")
    extra = optional_text(row, "input")
    return with_system(row, [*_history(row), *user(f"{asked}\n\n{extra}" if extra.strip() else asked)])


def _history(row: Row) -> list[Message]:
    """LLaMA-Factory's column of earlier turns: a list of pairs, what the user said and what was answered."""
    if row.data.get("history") in (None, ""):
        return []
    found: list[Message] = []
    for i, pair in enumerate(listing(row, "history")):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
            raise row.fault(
                "wrong type",
                f"item {i + 1} must be a list of two texts, a question and its answer; rename the column where it "
                "holds no earlier turns",
                "history",
            )
        question, answer = pair
        if not answer.strip():
            raise row.fault("empty completion", f"the answer of item {i + 1} is empty", "history")
        found += [*user(question), *assistant(answer)]
    return found


def json_text(row: Row, column: str) -> Any:
    """A field that holds JSON as text."""
    try:
        return parse_json(text(row, column), row.where(column))
    except json.JSONDecodeError as error:
        raise row.fault("broken JSON", f"the field does not hold whole JSON ({error.msg})", column) from error
    except UntrustedError as error:
        inside = f"in its {error.fault.field}, " if error.fault.field else ""
        raise row.fault(error.fault.reason, inside + error.fault.problem, column) from error
