"""How recipes look as text: the YAML dialect, the words for types, and suggestions."""

from __future__ import annotations

import difflib
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel


class RecipeLoader(yaml.SafeLoader):
    """Safe YAML with YAML 1.2's scalars: `1e-4` is a number, `no` and `off` are text, a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"`{key}` stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class RecipeDumper(yaml.SafeDumper):
    """Quotes exactly what RecipeLoader would otherwise not read back as text."""


_SCALARS = [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)",
        "-+.0123456789",
    ),
]
_REPLACED = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp")}
for _class in (RecipeLoader, RecipeDumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in _REPLACED]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for _kind, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), list(_first))

_PLAIN = {
    float: "number",
    int: "whole number",
    bool: "true or false",
    str: "text",
    Path: "path",
    type(None): "null",
    Any: "anything",
}


def type_text(annotation: Any, metadata: list[Any] | None = None) -> str:
    """A type with its limits in words, such as "number > 0 or null"."""
    limits = "".join(_limit(m) for m in metadata or [])
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join("null" if a is None else str(a) for a in args)
    if origin in (Union, types.UnionType):
        words = [type_text(a, metadata if a in (int, float, str) else None) for a in args]
        return " or ".join(dict.fromkeys(words))
    if annotation in _PLAIN:
        return _PLAIN[annotation] + limits
    if origin in (list, tuple):
        return f"list of {type_text(args[0])}{limits}" if args else "list"
    if origin is dict:
        return f"mapping of {type_text(args[0])} to {type_text(args[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section with " + ", ".join(annotation.model_fields)
    if hasattr(annotation, "__metadata__"):
        return type_text(args[0], [*annotation.__metadata__, *(metadata or [])])
    return getattr(annotation, "__name__", str(annotation))


def _limit(rule: Any) -> str:
    for kind, field, sign in (
        (annotated_types.Gt, "gt", ">"),
        (annotated_types.Ge, "ge", ">="),
        (annotated_types.Lt, "lt", "<"),
        (annotated_types.Le, "le", "<="),
    ):
        if isinstance(rule, kind):
            return f" {sign} {getattr(rule, field)}"
    if isinstance(rule, annotated_types.MinLen):
        return f", at least {rule.min_length}"
    if isinstance(rule, annotated_types.MaxLen):
        return f", at most {rule.max_length}"
    return ""


def suggestion(key: str, here: list[str], known: list[str]) -> str:
    """What an unknown key probably meant, given the keys of its own section and all keys of the recipe."""
    leaf = key.rsplit(".", 1)[-1]
    elsewhere = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    if elsewhere:
        places = " or ".join(f"`{k.rsplit('.', 1)[0]}`" if "." in k else "the top level" for k in elsewhere)
        return f"`{leaf}` belongs under {places}: write {' or '.join(elsewhere)}"
    leaves = {k.rsplit(".", 1)[-1]: k for k in here}
    near = [leaves[n] for n in difflib.get_close_matches(leaf, leaves, 1)]
    near = near or difflib.get_close_matches(key, known, 1)
    if near:
        return f"did you mean {near[0]}?"
    return "known here: " + ", ".join(here)
