"""What turns carry beside their text: thoughts, tool calls, and the tools of a conversation.

Each is passed to the chat template under its own name, and a template that does not show one is refused: what it
leaves out would not be learned, and nobody would be told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from steersman.data.examples import Example, Message, Query
from steersman.data.rows import Row
from steersman.guards.untrusted import parse_json
from steersman.types import SteersmanError

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
REFERENCES = ("name", "tool_call_id")
"""Fields of a turn that name something; templates need not show them."""


def template_fields(row: Row, column: str, at: str, item: dict[str, Any]) -> dict[str, Any]:
    """The fields of a turn `at` that the template is to have beside role and content.

    Raises RowError for one of another type than it has everywhere, and for a weight other than 1.
    """
    kinds = dict.fromkeys((*THOUGHTS, *REFERENCES), str) | {"tool_calls": list, "function_call": dict}
    out = {}
    for name, kind in kinds.items():
        got = item.get(name)
        if got is None or got in ("", [], {}):
            continue
        if not isinstance(got, kind):
            raise row.fault("wrong type", f"{at}: {name} must be a {kind.__name__}, not {type(got).__name__}", column)
        out[name] = with_objects(got) if name in CALLS else got
    if item.get("weight") not in (None, 1):
        raise row.fault(
            "weighted turn",
            f"{at} has the weight {item['weight']!r}, which is not read: all assistant turns count alike, or the "
            "last one alone (data.assistant_turns: last); leave the field out",
            column,
        )
    return out


def with_objects(calls: Any) -> Any:
    """Tool calls whose arguments are objects where they were JSON as text, as most templates want them."""
    if isinstance(calls, list):
        return [with_objects(call) for call in calls]
    if not isinstance(calls, dict):
        return calls
    out = {name: with_objects(x) if name == "function" else x for name, x in calls.items()}
    if isinstance(out.get("arguments"), str):
        try:
            read = parse_json(out["arguments"], "arguments")
        except ValueError:
            read = None
        out["arguments"] = read if isinstance(read, dict) else out["arguments"]
    return out


def with_text(calls: Any) -> Any:
    """The reverse of `with_objects`, for templates that join the arguments to other text."""
    if isinstance(calls, list):
        return [with_text(call) for call in calls]
    if not isinstance(calls, dict):
        return calls
    out = {name: with_text(x) if name == "function" else x for name, x in calls.items()}
    if isinstance(out.get("arguments"), dict):
        out["arguments"] = json.dumps(out["arguments"], ensure_ascii=False)
    return out


def with_tools(example: Example, row: Row) -> Example:
    """The example with its row's `tools`, a list or JSON as text, on the first turn of its prompt.

    Raises RowError for tools that are no list of objects, and for tools beside answers in plain text.
    """
    got = row.data.get("tools")
    if isinstance(got, str) and got.strip():
        try:
            got = parse_json(got, row.where("tools"))
        except ValueError as error:
            raise row.fault("broken JSON", f"the field does not hold JSON ({error})", "tools") from error
    if not got or (isinstance(example, Query) and isinstance(example.prompt, str)):
        return example
    if not isinstance(got, list) or not all(isinstance(tool, dict) for tool in got):
        raise row.fault("wrong type", "must be a list of objects, one for each tool", "tools")
    if isinstance(example.prompt, str):
        raise row.fault(
            "tools without turns",
            "the row has tools, but plain text goes past the chat template, which would show them; write the prompt "
            "as turns (messages), or rename the column",
            "tools",
        )
    first: Message = {**example.prompt[0], "tools": got}
    example.prompt = [first, *example.prompt[1:]]
    return example


def require_shown(render: Callable[[Sequence[Message]], str], messages: Sequence[Message]) -> None:
    """Raises SteersmanError, with turn and field, for what the template leaves out of a conversation.

    A turn is rendered as the last one, with the field and without: templates may drop the thoughts of earlier turns.
    """
    for i, message in enumerate(messages):
        fields = [name for name in (*CALLS, *THOUGHTS) if name in message]
        fields += ["content"] if message["role"] == "tool" and message["content"].strip() else []
        for name in fields:
            less: Any = {k: x for k, x in message.items() if k != name} | (
                {"content": ""} if name == "content" else {}
            )
            if _same(render, [*messages[:i], less], messages[: i + 1]):
                what = {"content": "results of tools", **dict.fromkeys(CALLS, "tool calls")}.get(name, name)
                raise SteersmanError(
                    f"turn {i + 1}: the chat template shows no {what}, so the field {name} would be lost; use a "
                    "model whose template shows it, or leave the field out of the data"
                )
    if any("tools" in m for m in messages):
        without: Any = [{k: x for k, x in m.items() if k != "tools"} for m in messages]
        if _same(render, without, messages):
            raise SteersmanError(
                "the chat template shows no tools, which the row has; use a model whose template does, or leave the "
                "column tools out"
            )


def _same(render: Callable[[Sequence[Message]], str], less: Sequence[Message], whole: Sequence[Message]) -> bool:
    shown = render(whole)
    try:
        return render(less) == shown
    except SteersmanError:  # the template insists on the field
        return False
