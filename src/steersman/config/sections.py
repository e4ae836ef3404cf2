"""Sections of settings: what they know, their defaults, and one laid over another."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator

from steersman.config.no_secrets import require_no_secrets


class Section(BaseModel):
    """A few settings of one stage: frozen, complete, and refusing what it does not know.

    Every field has `Field(default=..., description=...)`, by keyword: type checkers miss a positional default.
    Limits are `Field(gt=0)` and the like; rules over several fields are `@model_validator(mode="after")`
    methods that raise ValueError.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        protected_namespaces=(),
        hide_input_in_errors=True,  # it may be an address with a password
    )

    @model_validator(mode="after")
    def _holds_no_secrets(self) -> Self:
        require_no_secrets(dict(self))
        return self

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        """Dotted keys of shared sections that the recipe's verb does not read. They are left out of its help, and
        another value than the default is refused."""
        return frozenset()

    @classmethod
    def dependent_defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Defaults of a recipe, as nested plain data, that follow from what it is given elsewhere; those that it is
        given itself win."""
        return {}


def key_names(**sections: Iterable[str]) -> frozenset[str]:
    """Dotted keys: `key_names(run=("dir", "seed"))` is {"run.dir", "run.seed"}."""
    return frozenset(f"{section}.{key}" for section, keys in sections.items() for key in keys)


@cache
def walk_keys(model: type[Section]) -> tuple[tuple[str, Any], ...]:
    """Every key below `model` as (dotted key, pydantic FieldInfo), sections before their own keys."""
    found: list[tuple[str, Any]] = []
    for name, info in model.model_fields.items():
        found.append((name, info))
        inner = section_of(info.annotation)
        if inner is not None:
            found += [(f"{name}.{key}", below) for key, below in walk_keys(inner)]
    return tuple(found)


def section_of(annotation: Any) -> type[Section] | None:
    """The one Section class that an annotation such as `Optim` or `Optim | None` stands for, else None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        found = [section_of(a) for a in get_args(annotation) if a is not type(None)]
        return found[0] if len(found) == 1 else None
    return None


def branches(annotation: Any) -> list[Any]:
    """The types of which a value may be any: those of a union, and of an `Annotated` the type itself."""
    if get_origin(annotation) is Annotated:
        return branches(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [b for a in get_args(annotation) for b in branches(a)]
    return [annotation]


def below(annotation: Any, name: str) -> Any:
    """What stands under `name` in a value of this type: a section's field, a mapping's value, a list's item, anything
    below `Any`; None where nothing is known of it."""
    for branch in branches(annotation):
        origin, args = get_origin(branch), get_args(branch)
        if branch is Any:
            return Any
        section = section_of(branch)
        if section is not None and name in section.model_fields:
            return section.model_fields[name].annotation
        if origin is dict:
            return args[1]
        if origin in (list, tuple) and args and name.isdigit():
            place = int(name)
            return args[place] if origin is tuple and place < len(args) and args[-1] is not ... else args[0]
    return None


def key_path(model: type[Section], key: str) -> tuple[list[str], Any]:
    """A dotted key of the command line as (its parts, the type of what stands there, None where it is not known).

    Names of fields may be written with dashes. Names in a mapping, and all below one of anything, are the user's own
    and stay as they are typed.
    """
    here: Any = model
    path = []
    for part in key.split("."):
        own = any(branch is Any or get_origin(branch) is dict for branch in branches(here))
        path.append(part if own else part.replace("-", "_"))
        here = below(here, path[-1])
    return path, here


def items_of(annotation: Any, value: Any) -> list[tuple[str, dict[str, Any], type[Section]]]:
    """The sections inside a `list[Section]` or `dict[str, Section]` value."""
    args = get_args(annotation)
    if get_origin(annotation) not in (list, tuple, dict) or not args:
        return []
    model = section_of(args[1] if get_origin(annotation) is dict else args[0])
    if model is None or not isinstance(value, (list, dict)):
        return []
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return [(str(k), v, model) for k, v in pairs if isinstance(v, dict)]


def defaults_of(model: type[Section]) -> dict[str, Any]:
    """Defaults as nested plain data, so that a section given in part keeps the defaults of this recipe."""
    return copy.deepcopy(_defaults(model))


@cache
def _defaults(model: type[Section]) -> dict[str, Any]:
    out = {}
    for name, info in model.model_fields.items():
        if not info.is_required() and not info.default_factory_takes_validated_data:
            default = info.get_default(call_default_factory=True)
            out[name] = _plain(default) if isinstance(default, Section) else default
        elif (inner := section_of(info.annotation)) is not None:
            # A required section is begun empty, so that what is missing is told key by key.
            out[name] = _defaults(inner)
    return out


def _plain(section: Section) -> dict[str, Any]:
    """The section as plain data, without the defaults that follow other fields: those are not known yet."""
    out = section.model_dump()
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            out[name] = _plain(value)
        elif info.default_factory_takes_validated_data and name not in section.model_fields_set:
            del out[name]
    return out


def merged(base: dict[str, Any], over: dict[str, Any], model: type[Section]) -> dict[str, Any]:
    out = dict(base)
    for name, value in over.items():
        inner = section_of(model.model_fields[name].annotation)
        optional = type(None) in get_args(model.model_fields[name].annotation)
        if inner is not None and value is None and not optional:
            value = {}
        if inner is not None and isinstance(value, dict):
            below = out.get(name)
            out[name] = merged(below if isinstance(below, dict) else defaults_of(inner), value, inner)
        else:
            out[name] = value
    return out
