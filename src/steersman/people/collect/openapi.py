"""The addresses of the pages and their forms, as an OpenAPI document that a scanner reads."""

from __future__ import annotations

import re
from typing import Any

FORMS: dict[str, tuple[str, ...]] = {
    "/login": ("name", "password"), "/logout": (), "/name": ("name",), "/language": ("path",),
    "/item/{assignment}": ("choice", "rank-0", "score-0", "spans", "accept", "correction", "skip", "reason"),
    "/undo": (), "/chat": (), "/chat/{chat}/say": ("text",), "/chat/{chat}/answer": (),
    "/chat/{chat}/edit/{turn}": ("text",), "/chat/{chat}/thumb/{turn}": ("up", "correction", "r_wrong"),
    "/admin/forget": ("name",), "/admin/add": ("name", "password", "role"), "/admin/password": ("name", "password"),
    "/admin/disable": ("name",),
}  # fmt: skip
"""Address: the fields of its form, beside `csrf`, `key` and `seconds` of every form."""
PAGES: dict[str, tuple[str, ...]] = {
    "/": (), "/login": (), "/judge/{queue}": (), "/item/{assignment}": (), "/chat": (), "/chat/{chat}": (),
    "/look": ("q", "task", "rater"), "/look/conversations": ("q", "rater"), "/look/conversation/{chat}": (),
    "/look/runs": (), "/look/run/{run}": (), "/look/rows/{run}": ("table", "q", "step", "order", "from"),
    "/look/beside": ("run", "column", "q"), "/admin": (),
}  # fmt: skip
"""Address: its query."""
STATUSES = {
    "200": "the page", "303": "done; on to the next page", "400": "the form holds what it may not",
    "401": "wrong name or password", "403": "not a form of ours", "404": "no such page, or another's",
    "405": "not this method", "413": "the form is too large", "429": "too many forms",
}  # fmt: skip


def document(csrf: str = "") -> dict[str, Any]:
    """OpenAPI 3.1; `csrf` is the token of the login that the forms are sent under."""
    paths: dict[str, dict[str, Any]] = {}
    for path, query in PAGES.items():
        asked = [{"name": n, "in": "query", "schema": {"type": "string"}} for n in query]
        paths.setdefault(path, {})["get"] = {"parameters": [*_in_path(path), *asked], "responses": _responses()}
    for path, fields in FORMS.items():
        every = {name: {"type": "string"} for name in fields}
        every |= {"csrf": {"type": "string", "const": csrf}, "key": {"type": "string", "format": "uuid"}}
        every["seconds"] = {"type": "string"}
        form = {"type": "object", "properties": every, "required": ["csrf", "key"]}
        body = {"required": True, "content": {"application/x-www-form-urlencoded": {"schema": form}}}
        paths.setdefault(path, {})["post"] = {
            "parameters": _in_path(path), "requestBody": body, "responses": _responses(),
        }  # fmt: skip
    return {"openapi": "3.1.0", "info": {"title": "steersman collect", "version": "1"}, "paths": paths}


def _in_path(path: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"{(\w+)}", path)
    ]


def _responses() -> dict[str, Any]:
    told: dict[str, Any] = {status: {"description": what} for status, what in STATUSES.items()}
    for status in told.keys() - {"303"}:
        told[status]["content"] = {"text/html": {}, "text/plain": {}}  # the second where no page was reached
    return told
