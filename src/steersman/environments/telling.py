"""Tools told in the prompt's own text, for models whose template knows none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from steersman.data.examples import Message


def with_tool_descriptions(
    messages: list[Message], tools: Sequence[dict[str, Any]], *, system_turns: bool
) -> list[Message]:
    """The turns with the tools' schemas and the form of a call in the first system turn, or in one before all others;
    without `system_turns`, where a chat template shows none, at the head of the first user's turn."""
    schemas = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = (
        f"You can call these tools:\n{schemas}\nTo call one, write\n"
        '<tool_call>{"name": "the tool", "arguments": {}}</tool_call>\nand wait for its result.'
    )
    if messages and messages[0]["role"] == "system":
        first: Message = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    asked = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
    if system_turns or asked is None:
        return [{"role": "system" if system_turns else "user", "content": text}, *messages]
    told: Message = {**messages[asked], "content": f"{text}\n\n{messages[asked]['content']}"}
    return [*messages[:asked], told, *messages[asked + 1 :]]


def as_users(messages: Sequence[Message]) -> list[Message]:
    """Results of tools as one user's turn, between tags."""
    out: list[Message] = []
    results = [f"<tool_response>\n{m['content']}\n</tool_response>" for m in messages if m["role"] == "tool"]
    if results:
        out.append({"role": "user", "content": "\n".join(results)})
    return [*out, *(m for m in messages if m["role"] != "tool")]
