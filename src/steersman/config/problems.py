"""What is wrong with a recipe's keys and values, in a recipe's words."""

from __future__ import annotations

from typing import Any, get_origin

from steersman.config.no_secrets import without_secrets
from steersman.config.peer_names import peer_hint
from steersman.config.recipe_text import suggestion, type_text
from steersman.config.sections import Section, items_of, section_of, walk_keys


def drop_unknown(
    root: type[Section], model: type[Section], data: dict[str, Any], prefix: str, from_command: set[str]
) -> list[str]:
    """Removes keys that the model does not know from `data`, and says of each what was probably meant."""
    problems = []
    for name in list(data):
        key = f"{prefix}{name}"
        info = model.model_fields.get(name)
        if info is None:
            del data[name]
            known = [k for k, _ in walk_keys(root)]
            here = [prefix + k for k in model.model_fields]
            hint = peer_hint(key, known) or suggestion(key, here, known)
            problems.append(f"{place_of(key, from_command)}: unknown key; {hint}")
            continue
        inner = section_of(info.annotation)
        if inner is not None and isinstance(data[name], dict):
            problems += drop_unknown(root, inner, data[name], f"{key}.", from_command)
        for place, item, item_model in items_of(info.annotation, data[name]):
            problems += drop_unknown(item_model, item_model, item, f"{key}.{place}.", from_command)
    return problems


def idle_keys(recipe: Section) -> list[str]:
    """The keys that the verb does not read and that have another value than their default."""
    return [
        key
        for key in sorted(recipe.unread_keys())
        for value, default in [(_value_at(recipe, key), _default_at(type(recipe), key))]
        if value is not ... and value != default
    ]


def value_problem(model: type[Section], error: dict[str, Any], from_command: set[str]) -> str:
    """One pydantic error in the words of a recipe."""
    known = dict(walk_keys(model))
    # Where a field is a union pydantic adds the branch's name to the path; the recipe's reader knows none.
    key = ""
    for part in error["loc"]:
        longer = f"{key}.{part}" if key else str(part)
        is_mapping = key in known and get_origin(known[key].annotation) is dict
        if (
            longer in known
            or isinstance(part, int)
            or key not in known
            or is_mapping
            or section_of(known[key].annotation)
        ):
            key = longer
    where = place_of(key, from_command) if key else "the recipe"
    if error["type"] == "missing":
        info = known.get(key)
        meaning = f" ({info.description})" if info is not None and info.description else ""
        return f"{where}: missing{meaning}; set it in the recipe or with --{key} VALUE"
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}"
    given = without_secrets(repr(error["input"]))
    given = given if len(given) <= 80 else given[:77] + "..."
    info = known.get(key)
    allowed = type_text(info.annotation, info.metadata) if info is not None else _allowed(error)
    written = ", written '[one, two]'" if error["type"] == "list_type" else ""
    return f"{where}: {given} was given; allowed: {allowed}{written}"


def _allowed(error: dict[str, Any]) -> str:
    """What pydantic says of a value below a mapping, whose keys have no description of ours."""
    if error["type"] == "literal_error":
        return f"one of {error['ctx']['expected'].replace(' or ', ', ')}".replace("'", "")
    return error["msg"]


def place_of(key: str, from_command: set[str]) -> str:
    return f"--{key}" if any(k == key or k.startswith(key + ".") for k in from_command) else key


def _value_at(recipe: Section, key: str) -> Any:
    """The value of a dotted key; `...` below a section that is not there."""
    value: Any = recipe
    for name in key.split("."):
        if value is None:
            return ...
        value = getattr(value, name)
    return value


def _default_at(model: type[Section], key: str) -> Any:
    """The default of a dotted key, as the sections above it set it."""
    section: Section | None = None
    *above, last = key.split(".")
    for name in above:
        default = _own_default(model, section, name)
        section, inner = (
            default if isinstance(default, Section) else None,
            section_of(model.model_fields[name].annotation),
        )
        assert inner is not None
        model = inner
    return _own_default(model, section, last)


def _own_default(model: type[Section], section: Section | None, name: str) -> Any:
    if section is not None:
        return getattr(section, name)
    info = model.model_fields[name]
    return None if info.is_required() else info.get_default(call_default_factory=True, validated_data={})
