"""Tool calls in replies: which form a template writes them in, and reading them back.

| form | as a reply writes it |
| --- | --- |
| tagged | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen, SmolLM3) |
| bare | the reply is `{"name": ..., "parameters": {...}}` alone (Llama 3) |
| listed | `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]` (Mistral) |
| functions | `<function=name><parameter=x>value</parameter></function>` in `<tool_call>` (Qwen3-Coder) |

What a reply thinks (`<think>...</think>`) calls nothing. Replies are text of others: nothing in them is trusted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from steersman.data.examples import Message
from steersman.data.template import ChatTemplate, unfenced
from steersman.environments.port import Call, Reply
from steersman.guards.untrusted import parse_json
from steersman.types import SteersmanError

_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
# A name holds no "<": after a mark without its end the search goes on at the next one, not at the end of the text.
_FUNCTION = re.compile(r"<function=([^<>]*)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^<>]*)>\n?(.*?)\n?(?:</parameter>|\Z)", re.DOTALL)
_LISTED = "[TOOL_CALLS]"
_LONGEST = 100_000
"""Characters of one reply that are looked at."""

Parser = Callable[[str], tuple[str, list[Call]]]


def without_thoughts(text: str) -> str:
    """The text behind its thoughts. A thought that the prompt opened ends at its first end mark; one without an end
    goes on to the end of the text."""
    head, closed, rest = text.partition("</think>")
    if closed and "<think>" not in head:
        text = rest
    return _THOUGHT.sub("", text)


def read_reply(text: str, form: str | None, *, cut: bool = False) -> Reply:
    """A reply with its calls, in the order in which it makes them; `form` None reads none."""
    said = without_thoughts(text[:_LONGEST])
    if form is None:
        return Reply(text, said.strip(), cut=cut)
    content, calls = FORMS[form](said)
    return Reply(text, content.strip(), tuple(calls), cut)


def form_of(template: ChatTemplate) -> str | None:
    """The form in which a template writes calls; None where it writes none. Raises SteersmanError for a form that is
    not known here."""
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "probe_tool", "arguments": {"probe": "x1"}}}
    ask: Message = {"role": "user", "content": "a"}
    try:
        shown = unfenced(template.render([ask, {"role": "assistant", "content": "", "tool_calls": [call]}]))
    except SteersmanError:
        return None
    if "probe_tool" not in shown:
        return None
    written = shown.removeprefix(unfenced(template.render([ask])))
    for name, mark in (("functions", "<function=probe_tool>"), ("tagged", "<tool_call>"), ("listed", _LISTED)):
        if mark in written:
            return name
    if re.search(r"\{\s*\"name\"\s*:\s*\"probe_tool\"\s*,\s*\"(parameters|arguments)\"", written):
        return "bare"
    raise SteersmanError(
        f"the chat template writes tool calls in a form that is not read here: {written[-120:]!r}; tell the tools in "
        "the prompt (environment.tell_tools), or use another template"
    )


def _tagged(text: str) -> tuple[str, list[Call]]:
    calls = [_from_json(found[1]) for found in _TAGGED.finditer(text)]
    return _TAGGED.sub("", text), calls


def _functions(text: str) -> tuple[str, list[Call]]:
    calls = []
    for found in _FUNCTION.finditer(text):
        values = {p[1].strip(): _value(p[2]) for p in _PARAMETER.finditer(found[2])}
        calls.append(Call(found[1].strip(), values))
    return _TAGGED.sub("", _FUNCTION.sub("", text)), calls


def _value(text: str) -> Any:
    """A parameter that is written without quotes: JSON where it reads as a number, list or object, else text."""
    try:
        read = parse_json(text, "parameter")
    except ValueError:
        return text
    return read


def _bare(text: str) -> tuple[str, list[Call]]:
    stripped = text.strip().removeprefix("<|python_tag|>").strip()
    if not stripped.startswith("{"):
        return text, []
    return "", [_from_json(part) for part in re.split(r"(?<=\})\s*;\s*(?=\{)", stripped)]


def _listed(text: str) -> tuple[str, list[Call]]:
    content, found, rest = text.partition(_LISTED)
    if not found:
        return text, []
    try:
        read = parse_json(rest.strip(), "calls")
    except ValueError as error:
        return content, [Call("", problem=f"the calls are no JSON list: {error}")]
    items = read if isinstance(read, list) else [read]
    return content, [_from_value(item) for item in items]


def _from_json(text: str) -> Call:
    try:
        return _from_value(parse_json(text.strip(), "call"))
    except ValueError as error:
        return Call("", problem=f"the call is no JSON object: {error}")


def _from_value(value: Any) -> Call:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Call("", problem='a call is an object with "name" and "arguments"')
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments, "arguments")
        except ValueError as error:
            return Call(value["name"], problem=f'"arguments" is text that holds no JSON object: {error}')
    if not isinstance(arguments, dict):
        return Call(value["name"], problem='"arguments" must be an object')
    return Call(value["name"], arguments)


FORMS: dict[str, Parser] = {"tagged": _tagged, "bare": _bare, "listed": _listed, "functions": _functions}
