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
from pydantic.fields import FieldInfo

from steersman.config.sections import below, branches
from steersman.guards.untrusted import LONE_SURROGATE


class RecipeLoader(yaml.SafeLoader):
    """Safe YAML with YAML 1.2's scalars: `1e-4` is a number, `no` and `off` are text."""


LARGEST = 2**63 - 1
"""The largest whole number of a recipe: what a 64-bit integer holds."""
DEPTH = 50
"""Sections, lists and mappings inside each other."""
NODES = 100_000
"""Values of a whole recipe, each counted as often as an alias repeats it."""


class RecipeFault(yaml.MarkedYAMLError):
    """YAML that can be read, with a value that nothing can use."""


def load_yaml(text: str, annotation: Any = None) -> Any:
    """The value of a recipe's text. Where the annotation, such as a recipe's class, says text (or a path) and no
    number, what looks like a number, true or false is the text as it is written: `007` stays `007`.

    Raises yaml.YAMLError for what is no YAML, and its kind RecipeFault, with dotted key and line, for a key that is
    no plain value, a value that contains itself, integers of more than 64 bits, lone surrogates, more than 50 levels
    and more than 100,000 values.
    """
    try:
        loader = RecipeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check(node)
            node = _as_text(node, annotation)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:  # a value that its explicit tag does not fit
        raise yaml.YAMLError(f"a value does not fit its tag: {error}") from error


def _check(root: yaml.Node) -> None:
    """Walks the tree with a list as its stack; `above` are the nodes that a node stands in."""
    stack: list[tuple[yaml.Node, str, tuple[int, ...]]] = [(root, "", ())]
    count = 0
    while stack:
        node, key, above = stack.pop()
        count += 1
        if id(node) in above:
            raise _fault(node, key, "it contains itself, by an alias")
        if len(above) > DEPTH:
            raise _fault(node, key, f"nested too deeply (more than {DEPTH} levels)")
        if count > NODES:
            raise _fault(node, key, f"more than {NODES:,} values; is one alias repeated inside another?")
        inside = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            below = _named(node, key)
        elif isinstance(node, yaml.SequenceNode):
            below = [(x, f"{key}.{i}" if key else str(i)) for i, x in enumerate(node.value)]
        else:
            _check_scalar(node, key)
            continue
        stack += [(x, name, inside) for x, name in reversed(below)]


def _named(node: yaml.MappingNode, key: str) -> list[tuple[yaml.Node, str]]:
    seen: set[tuple[str, str]] = set()
    out = []
    for name, value in node.value:
        if not isinstance(name, yaml.ScalarNode):
            raise _fault(name, key, "a list or a mapping stands where a key must be; write a plain word as the key")
        _check_scalar(name, key)
        inner = f"{key}.{name.value}" if key else name.value
        if (name.tag, name.value) in seen:
            raise yaml.MarkedYAMLError(problem=f"`{name.value}` stands twice", problem_mark=name.start_mark)
        seen.add((name.tag, name.value))
        out.append((value, inner))
    return out


def _check_scalar(node: Any, key: str) -> None:
    if LONE_SURROGATE.search(node.value):
        raise _fault(node, key, "a lone surrogate, which is no character")
    if node.tag == "tag:yaml.org,2002:int":
        digits = node.value.replace("_", "").lstrip("+-")
        if len(digits) > 20 or int(digits, 16 if digits.startswith("0x") else 10) > LARGEST:
            raise _fault(node, key, f"the whole number {node.value[:12]}... is above {LARGEST}, the largest there is")


def _fault(node: yaml.Node, key: str, problem: str) -> RecipeFault:
    return RecipeFault(problem=f"{key}: {problem}" if key else problem, problem_mark=node.start_mark)


_TAG = "tag:yaml.org,2002:"
_TEXT, _MERGE = f"{_TAG}str", f"{_TAG}merge"
_KINDS = {f"{_TAG}int": (int, float), f"{_TAG}float": (float,), f"{_TAG}bool": (bool,)}


def takes_text(annotation: Any) -> bool:
    """Whether text as typed can be the value of a field."""
    return not {str, Path}.isdisjoint(b for b in branches(annotation) if b in _PLAIN)


def _as_text(node: yaml.Node, annotation: Any) -> yaml.Node:
    """The tree with text in the place of scalars that would be read as numbers or booleans where text is wanted."""
    if isinstance(node, yaml.ScalarNode):
        kinds = branches(annotation)
        if node.tag not in _KINDS or not takes_text(annotation) or any(k in kinds for k in (*_KINDS[node.tag], Any)):
            return node
        return yaml.ScalarNode(_TEXT, node.value, node.start_mark, node.end_mark)
    if isinstance(node, yaml.SequenceNode):
        node.value = [_as_text(item, below(annotation, str(place))) for place, item in enumerate(node.value)]
    elif isinstance(node, yaml.MappingNode):
        names = next((get_args(b)[0] for b in branches(annotation) if get_origin(b) is dict), None)
        node.value = [
            (_as_text(name, names), _as_text(value, below(annotation, name.value)))
            if name.tag != _MERGE
            else (name, _merged_as_text(value, annotation))
            for name, value in node.value
        ]
    return node


def _merged_as_text(node: yaml.Node, annotation: Any) -> yaml.Node:
    """The same of what `<<` lays into a mapping: one mapping, or a list of them."""
    if isinstance(node, yaml.SequenceNode):
        node.value = [_as_text(item, annotation) for item in node.value]
        return node
    return _as_text(node, annotation)


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
        rules = [rule for m in annotation.__metadata__ for rule in (m.metadata if isinstance(m, FieldInfo) else [m])]
        return type_text(args[0], [*rules, *(metadata or [])])
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
