"""Recipes: YAML files of small typed sections, with overrides from the command line.

A stage's settings are a `Section`; a recipe is a `Section` of sections. `load_recipe` reads the file, lays
the overrides over it and reports everything that is wrong at once, each by its dotted key.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from steersman.run.peer_names import peer_hint
from steersman.run.recipe_text import RecipeDumper, RecipeFault, load_yaml, suggestion, type_text
from steersman.types import SteersmanError


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
    )

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


R = TypeVar("R", bound=Section)


def load_recipe(model: type[R], path: Path | None = None, overrides: list[str] | None = None) -> R:
    """The recipe at `path` (None: defaults only) with `--section.key value` overrides laid over it.

    Values of overrides are YAML: `3e-4`, `true`, `null`, `[a, b]`. A section that is given in part keeps the
    recipe class's own defaults for the rest.

    Raises SteersmanError naming the recipe, and for each problem its dotted key, what was given and what is
    allowed; for an unknown key the nearest known one, or the section that it belongs under.
    """
    data = _read_yaml(path) if path is not None else {}
    problems, from_command = _apply_overrides(model, data, overrides or [])
    problems += _drop_unknown(model, model, data, "", from_command)
    merged = _merge(_merge(_defaults(model), model.dependent_defaults(data), model), data, model)
    recipe = None
    try:
        recipe = model.model_validate(merged)
    except ValidationError as error:
        problems += [_value_problem(model, dict(e), from_command) for e in error.errors()]
    if recipe is not None:
        problems += [f"{_where(key, from_command)}: this verb does not read it; remove it" for key in _idle(recipe)]
    if problems or recipe is None:
        source = f"recipe {path}" if path is not None else "settings"
        if len(problems) == 1:
            raise SteersmanError(f"{source}: {problems[0]}")
        listed = "".join(f"\n  - {p}" for p in problems)
        raise SteersmanError(f"{source}: {len(problems)} problems{listed}")
    return recipe


def dump_recipe(section: Section) -> str:
    """The section as YAML with each field's description as a comment; `load_recipe` reads it back equal."""
    return "\n".join(_dump_lines(section, 0)) + "\n"


def walk_keys(model: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key below `model` as (dotted key, pydantic FieldInfo), sections before their own keys."""
    for name, info in model.model_fields.items():
        yield prefix + name, info
        inner = section_of(info.annotation)
        if inner is not None:
            yield from walk_keys(inner, f"{prefix}{name}.")


def section_of(annotation: Any) -> type[Section] | None:
    """The one Section class that an annotation such as `Optim` or `Optim | None` stands for, else None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        found = [section_of(a) for a in get_args(annotation) if a is not type(None)]
        return found[0] if len(found) == 1 else None
    return None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SteersmanError(f"recipe {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SteersmanError(f"recipe {path}: it can not be read: {error}") from None
    try:
        data = load_yaml(text)
    except RecipeFault as fault:
        line = 0 if fault.problem_mark is None else fault.problem_mark.line + 1
        raise SteersmanError(f"recipe {path}, line {line}: {fault.problem}") from None
    except yaml.YAMLError as error:
        raise SteersmanError(f"recipe {path}: not valid YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise SteersmanError(f"recipe {path}: expected `section:` blocks at the top level, got {type(data).__name__}")
    return data


def _apply_overrides(model: type[Section], data: dict[str, Any], overrides: list[str]) -> tuple[list[str], set[str]]:
    """Writes the overrides into `data`; gives the problems met and the dotted keys that were set."""
    known = dict(walk_keys(model))
    problems: list[str] = []
    keys: set[str] = set()
    rest = list(overrides)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--":
            problems.append(
                f"{token}: not understood here; settings look like --section.key value, "
                "and a recipe file comes right after the verb"
            )
            continue
        key, equals, text = token[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif key not in known or known[key].annotation is bool:
                text = "true"  # of an unknown key its name is told, which is what matters
            else:
                problems.append(f"--{key}: a value is missing after it")
                continue
        if not _put(data, key.split("."), _parse(key, text, known.get(key))):
            problems.append(f"--{key}: what stands above it is not a section")
        keys.add(key)
    return problems, keys


def _parse(key: str, text: str, info: Any) -> Any:
    """The override's value: YAML, but for a field of text the text as typed unless it is null or quoted."""
    try:
        value = load_yaml(text)
    except RecipeFault as fault:
        if info is None or str not in {info.annotation, *get_args(info.annotation)}:
            raise SteersmanError(f"--{key}: {fault.problem}") from None
        return text
    except yaml.YAMLError:
        return text
    if info is None or isinstance(value, str):
        return value
    allowed = {info.annotation, *get_args(info.annotation)}
    shapes = {get_origin(a) or a for a in allowed}
    if text.strip() in ("null", "~"):
        return None
    return text if str in allowed and (value is None or type(value) not in shapes) else value


def _put(data: dict[str, Any], path: list[str], value: Any) -> bool:
    """Sets data[path[0]][path[1]]... = value, making sections on the way; False where that can not be."""
    here: Any = data
    for i, part in enumerate(path):
        last = i == len(path) - 1
        if isinstance(here, list) and part.isdigit() and int(part) < len(here):
            if last:
                here[int(part)] = value
            here = here[int(part)]
        elif isinstance(here, dict):
            if last:
                here[part] = value
            elif here.get(part) is None:
                here[part] = {}
            here = here[part]
        else:
            return False
    return True


def _drop_unknown(
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
            problems.append(f"{_where(key, from_command)}: unknown key; {hint}")
            continue
        inner = section_of(info.annotation)
        if inner is not None and isinstance(data[name], dict):
            problems += _drop_unknown(root, inner, data[name], f"{key}.", from_command)
        for place, item, item_model in _items(info.annotation, data[name]):
            problems += _drop_unknown(item_model, item_model, item, f"{key}.{place}.", from_command)
    return problems


def _idle(recipe: Section) -> list[str]:
    """The keys that the verb does not read and that have another value than their default."""
    return [
        key
        for key in sorted(recipe.unread_keys())
        for value, default in [(_value_at(recipe, key), _default_at(type(recipe), key))]
        if value is not ... and value != default
    ]


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


def _items(annotation: Any, value: Any) -> list[tuple[str, dict[str, Any], type[Section]]]:
    """The sections inside a `list[Section]` or `dict[str, Section]` value."""
    args = get_args(annotation)
    if get_origin(annotation) not in (list, tuple, dict) or not args:
        return []
    model = section_of(args[1] if get_origin(annotation) is dict else args[0])
    if model is None or not isinstance(value, (list, dict)):
        return []
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return [(str(k), v, model) for k, v in pairs if isinstance(v, dict)]


def _defaults(model: type[Section]) -> dict[str, Any]:
    """Defaults as nested plain data, so that a section given in part keeps the defaults of this recipe."""
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


def _merge(base: dict[str, Any], over: dict[str, Any], model: type[Section]) -> dict[str, Any]:
    out = dict(base)
    for name, value in over.items():
        inner = section_of(model.model_fields[name].annotation)
        optional = type(None) in get_args(model.model_fields[name].annotation)
        if inner is not None and value is None and not optional:
            value = {}
        if inner is not None and isinstance(value, dict):
            below = out.get(name)
            out[name] = _merge(below if isinstance(below, dict) else _defaults(inner), value, inner)
        else:
            out[name] = value
    return out


def _where(key: str, from_command: set[str]) -> str:
    return f"--{key}" if any(k == key or k.startswith(key + ".") for k in from_command) else key


def _value_problem(model: type[Section], error: dict[str, Any], from_command: set[str]) -> str:
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
    where = _where(key, from_command) if key else "the recipe"
    if error["type"] == "missing":
        info = known.get(key)
        meaning = f" ({info.description})" if info is not None and info.description else ""
        return f"{where}: missing{meaning}; set it in the recipe or with --{key} VALUE"
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}"
    given = repr(error["input"])
    given = given if len(given) <= 80 else given[:77] + "..."
    info = known.get(key)
    allowed = type_text(info.annotation, info.metadata) if info is not None else error["msg"]
    return f"{where}: {given} was given; allowed: {allowed}"


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
