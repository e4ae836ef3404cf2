"""The text of a message of Open WebUI, and whether there was more to it than text."""

from __future__ import annotations

import re
from typing import Any

WITH_FILES = "a conversation with images or other files"
WITH_TOOLS = "a conversation in which tools were used"

_TEXTS = ("text", "input_text", "output_text")
"""Types of the parts of a content that are text."""
_TOKEN = re.compile(r'```.*?```|`[^`\n]*`|<details\s+type="([\w-]{1,40})"[^<>]*>', re.DOTALL | re.IGNORECASE)
"""Code, in which nothing is cut, or the beginning of a block."""
_END = re.compile("</details>", re.IGNORECASE)


def read_message(message: dict[str, Any]) -> tuple[str, str]:
    """(text, what was more than text), the second as a reason for which a judgement is left out, or empty.

    Open WebUI writes what a model thought, and the calls of tools, as `<details type="...">` blocks into the text of
    an answer, and takes them out again before it asks a model the next time. Here they are cut, too; of the text of
    a question nothing is. The parts of a list are joined, each on its own line. Raises ValueError for a content that
    is neither.
    """
    texts, whole = _content(message.get("content"))
    output = message.get("output") or []
    kinds = {item["type"] for item in output} - {"message"}
    if not any(t.strip() for t in texts):
        texts = [t for item in output if item["type"] == "message" for t in _content(item.get("content"))[0]]
    text = "\n".join(texts)
    if message.get("role") == "assistant":
        text, blocks = without_blocks(text)
        kinds |= blocks
    if not whole or message.get("files"):
        return text, WITH_FILES
    return text, WITH_TOOLS if kinds - {"reasoning"} else ""


def without_blocks(text: str) -> tuple[str, set[str]]:
    """The text without its `<details type="...">` blocks, and their types, in time linear in its length.

    A block that does not end goes to the end of the text. What stands in code is no block.
    """
    kept, kinds = list[str](), set[str]()
    start = at = 0
    while found := _TOKEN.search(text, at):
        at = found.end()
        if found[1] is None:
            continue
        kinds.add(found[1].lower())
        kept.append(text[start : found.start()])
        end = _END.search(text, at)
        start = at = len(text) if end is None else end.end()
    return ("".join([*kept, text[start:]]).strip() if kinds else text), kinds


def _content(content: Any) -> tuple[list[str], bool]:
    """The texts of a content, and whether they are all of it."""
    if content is None or isinstance(content, str):
        return [content or ""], True
    if not isinstance(content, list):
        raise ValueError("the content of a message is neither text nor a list of parts")
    texts = [p["text"] for p in content if p["type"] in _TEXTS]
    return texts, len(texts) == len(content)
