"""A recipe written as YAML, with what each key means beside it."""

from __future__ import annotations

from typing import Any

import yaml

from steersman.config.recipe_text import RecipeDumper
from steersman.config.sections import Section


def dump_recipe(section: Section) -> str:
    """The section as YAML with each field's description as a comment; `load_recipe` reads it back equal."""
    return "\n".join(_dump_lines(section, 0)) + "\n"


def changed_keys(before: Any, after: Any) -> list[str]:
    """Where two recipes (or parts of them) as plain data differ, such as "train.lr: 0.001 -> 0.0003"."""
    old, new = flat_keys(before), flat_keys(after)
    keys = [k for k in [*new, *(k for k in old if k not in new)] if old.get(k) != new.get(k)]
    return [f"{k}: {old.get(k, 'not there')} -> {new.get(k, 'not there')}" for k in keys]


def flat_keys(data: Any, between: str = ".", prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one: {"train": {"lr": 0.1}} is {"train.lr": 0.1}. `prefix` stands before every key."""
    if not isinstance(data, dict):
        return {prefix.removesuffix(between): data}
    below = (flat_keys(inner, between, f"{prefix}{name}{between}") for name, inner in data.items())
    return {k: v for inner in below for k, v in inner.items()}


def _dump_lines(section: Section, indent: int) -> list[str]:
    pad = " " * indent
    lines: list[str] = []
    plain = section.model_dump(mode="json")
    for name, info in type(section).model_fields.items():
        value, meaning = getattr(section, name), info.description
        if isinstance(value, Section):
            lines += ([""] if indent == 0 and lines else []) + ([f"{pad}# {meaning}"] if meaning else [])
            inner = _dump_lines(value, indent + 2)
            lines += [f"{pad}{name}:", *inner] if inner else [f"{pad}{name}: {{}}"]
            continue
        text = _dump_field(name, plain[name])
        block = [pad + line for line in text.split("\n")]
        if meaning and len(block) == 1 and len(block[0]) + len(meaning) < 106:
            block = [f"{block[0]}  # {meaning}"]
        elif meaning:
            block = [f"{pad}# {meaning}", *block]
        lines += block
    return lines


def _dump_field(name: str, value: Any) -> str:
    """One `name: value` as YAML; a list or mapping of scalars stays on one line."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inside is None:
        return _yaml({name: value}, flow=False)
    if any(isinstance(v, (list, dict)) for v in inside):
        return _yaml({name: value}, flow=None)
    return f"{name}: {_yaml(value, flow=True)}"


def _yaml(data: Any, *, flow: bool | None) -> str:
    """PyYAML's text; flow None puts only the innermost collections on one line."""
    text = yaml.dump(
        data, Dumper=RecipeDumper, sort_keys=False, default_flow_style=flow, width=10**6, allow_unicode=True
    )
    return text.rstrip("\n")
