"""Recipes: YAML files of small typed sections, with overrides from the command line.

A stage's settings are a `Section`; a recipe is a `Section` of sections. `load_recipe` reads the file, lays
the overrides over it and reports everything that is wrong at once, each by its dotted key.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from steersman.config.overrides import apply_overrides
from steersman.config.problems import drop_unknown, idle_keys, place_of, value_problem
from steersman.config.recipe_text import RecipeFault, load_yaml
from steersman.config.sections import Section, defaults_of, merged, walk_keys
from steersman.types import SteersmanError

R = TypeVar("R", bound=Section)

_DATA = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".gz")


def load_recipe(model: type[R], path: Path | None = None, overrides: list[str] | None = None) -> R:
    """The recipe at `path` (None: defaults only) with `--section.key value` overrides laid over it.

    Values of overrides are YAML: `3e-4`, `true`, `null`, `[a, b]`. A section that is given in part keeps the
    recipe class's own defaults for the rest.

    Raises SteersmanError naming the recipe, and for each problem its dotted key, what was given and what is
    allowed; for an unknown key the nearest known one, or the section that it belongs under; for a file of data the
    flag that takes it.
    """
    if path is not None and path.suffix.lower() in _DATA:
        known = "data.path" in (key for key, _ in walk_keys(model))
        mend = f"give it by --data.path {path}" if known else "a recipe is a YAML file"
        raise SteersmanError(f"recipe {path}: that is the name of a data file, not of a recipe; {mend}")
    data = _read_yaml(path, model) if path is not None else {}
    problems, from_command = apply_overrides(model, data, overrides or [])
    problems += drop_unknown(model, model, data, "", from_command)
    recipe = None
    try:
        recipe = model.model_validate(_complete(model, data))
    except ValidationError as error:
        # A default that is worked out of a faulty value is no fault of its own.
        told = [e for e in error.errors() if e["input"] is not PydanticUndefined]
        problems += [value_problem(model, dict(e), from_command) for e in told]
    if recipe is not None:
        problems += [
            f"{place_of(key, from_command)}: this verb does not read it; remove it" for key in idle_keys(recipe)
        ]
    problems = list(dict.fromkeys(problems))  # a value that is none of a union's types is told once
    if problems or recipe is None:
        source = f"recipe {path}" if path is not None else "settings"
        if len(problems) == 1:
            raise SteersmanError(f"{source}: {problems[0]}")
        listed = "".join(f"\n  - {p}" for p in problems)
        raise SteersmanError(f"{source}: {len(problems)} problems{listed}")
    return recipe


def with_new_defaults(model: type[Section], data: dict[str, Any]) -> dict[str, Any]:
    """An earlier recipe, as plain data, with the defaults of keys that were added since; unchanged where it is no
    valid recipe of `model` any more."""
    known = copy.deepcopy(data)
    if drop_unknown(model, model, known, "", set()):
        return data
    try:
        return model.model_validate(_complete(model, known)).model_dump(mode="json")
    except ValidationError:
        return data


def _complete(model: type[Section], data: dict[str, Any]) -> dict[str, Any]:
    """What is given, and the recipe class's own defaults for the rest."""
    return merged(merged(defaults_of(model), model.dependent_defaults(data), model), data, model)


def _read_yaml(path: Path, model: type[Section]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SteersmanError(f"recipe {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SteersmanError(f"recipe {path}: it can not be read: {error}") from None
    try:
        data = load_yaml(text, model)
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
