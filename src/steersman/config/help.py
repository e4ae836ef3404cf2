"""The table of a verb's settings for `--help`."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args, get_origin

from rich.table import Table
from rich.text import Text

from steersman.config.recipe_text import type_text
from steersman.config.sections import Section, section_of


def help_table(model: type[Section]) -> Table:
    """Every setting of a recipe class for `--help`, grouped by section: key, default, meaning and type."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("setting", overflow="fold", min_width=24)
    table.add_column("default", style="cyan", max_width=12, overflow="fold")
    table.add_column("meaning", ratio=1)
    _help_rows(table, model, None, "", model.unread_keys())
    return table


def _help_rows(table: Table, model: type[Section], default: Any, prefix: str, unread: frozenset[str]) -> None:
    sections = []
    for name, info in model.model_fields.items():
        inner = section_of(info.annotation)
        own = info.get_default(call_default_factory=True, validated_data={}) if not info.is_required() else ...
        # A section's default may come from the recipe around it rather than from its own class.
        value = getattr(default, name) if isinstance(default, Section) else own
        if f"{prefix}{name}" in unread:
            continue
        if inner is not None:
            sections.append((name, info, inner, value))
            continue
        typed = "required" if value is ... else default_text(value)
        meaning = Text(info.description or "")
        if not _is_one_word(info.annotation):  # which stands for a choice that was made before, and is described
            meaning.append(f"  ({type_text(info.annotation, info.metadata)})", style="dim")
        table.add_row(f"--{prefix}{name}", Text(typed), meaning)
    for name, info, inner, value in sections:
        meaning = info.description or (inner.__doc__ or "").strip().split("\n")[0]
        off = " (off by default)" if value is None else ""
        table.add_row("")
        table.add_row(Text(f"{prefix}{name}", style="bold"), "", Text(meaning + off, style="italic"))
        _help_rows(table, inner, value, f"{prefix}{name}.", unread)


def _is_one_word(annotation: Any) -> bool:
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def default_text(value: Any) -> str:
    """A default as one types it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return text if text and text.isprintable() else json.dumps(text, ensure_ascii=False)
