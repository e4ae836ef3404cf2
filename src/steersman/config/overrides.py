"""Settings on the command line: `--section.key value`, read as YAML."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml

from steersman.config.recipe_text import RecipeFault, load_yaml
from steersman.config.sections import Section, walk_keys
from steersman.types import SteersmanError


def apply_overrides(model: type[Section], data: dict[str, Any], overrides: list[str]) -> tuple[list[str], set[str]]:
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
        if info is None or _takes_text(info.annotation):
            return text
        raise SteersmanError(
            f"--{key}: {text!r} can not be read; is a bracket or a quotation mark missing, or one too many?"
        ) from None
    if info is None or isinstance(value, str):
        return value
    allowed = {info.annotation, *get_args(info.annotation)}
    shapes = {get_origin(a) or a for a in allowed}
    if text.strip() in ("null", "~"):
        return None
    return text if str in allowed and (value is None or type(value) not in shapes) else value


def _takes_text(annotation: Any) -> bool:
    """Whether text as typed can be the field's value."""
    union = get_origin(annotation) in (Union, types.UnionType)
    return not {str, Path}.isdisjoint(get_args(annotation) if union else (annotation,))


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
