"""Replies on disk: one line each, appended as they come, so that nothing judged is lost."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from steersman.atomic import saving
from steersman.jsonl import append_jsonl, read_jsonl
from steersman.types import SteersmanError

Reply = dict[str, Any]
"""What a judge answered, as JSON: {"text", "tokens", "cut"} of one that writes, {"logp", "tokens"} of one that
weighs. `cut` says that the text was ended by a limit and not by its writer."""
MOST_TOKENS = 10_000_000
"""Tokens that one request and its reply can cost; who says more is not believed."""


class UnansweredError(SteersmanError):
    """One question got no reply; others may get one. `refused`: the judge is there, and does not take this one."""

    refused = False


class ReplyCache:
    """Replies by key; with a path, those of earlier runs too.

    Each is one appended line, flushed to the disk, so that a kill loses at most the one being written; a line
    that was cut is passed over. Several processes may share a file.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.replies = path, {}
        if path is None:
            return
        for row in read_jsonl(path):
            if isinstance(row.get("key"), str) and isinstance(row.get("reply"), dict) and _usable(row["reply"]):
                self.replies.setdefault(row["key"], row["reply"])

    def __contains__(self, key: str) -> bool:
        return key in self.replies

    def __getitem__(self, key: str) -> Reply:
        return self.replies[key]

    def add(self, key: str, reply: Reply, asked: dict[str, Any]) -> None:
        """Keeps the reply; `asked` is written beside it, to be read by people.

        Raises SteersmanError where the file can not be written.
        """
        self.replies[key] = reply
        if self.path is None:
            return
        with saving(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        append_jsonl(self.path, {"key": key, **asked, "reply": reply})


def _usable(reply: Reply) -> bool:
    """Whether the reply says something, at a cost that the budget can hold. Files may hold anything; what is passed
    over is asked anew, where it would end every resumed run."""
    tokens, logp = reply.get("tokens", 0), reply.get("logp")
    weighs = isinstance(logp, dict) and len(logp) > 0 and all(type(x) is float for x in logp.values())
    says = weighs if "logp" in reply else isinstance(reply.get("text"), str)
    return says and type(tokens) is int and 0 <= tokens <= MOST_TOKENS


def key_of(*parts: Any) -> str:
    """SHA-256 (hex) of what a reply depends on."""
    return hashlib.sha256(
        json.dumps(parts, sort_keys=True, ensure_ascii=False).encode(errors="backslashreplace")
    ).hexdigest()
