"""Settings on the command line: `--section.key value`, read as YAML."""

from __future__ import annotations

from typing import Any, get_origin

import yaml

from steersman.config.recipe_text import RecipeFault, load_yaml, takes_text
from steersman.config.sections import Section, branches, key_path
from steersman.types import SteersmanError


def apply_overrides(model: type[Section], data: dict[str, Any], overrides: list[str]) -> tuple[list[str], set[str]]:
    """Writes the overrides into `data`; gives the problems met and the dotted keys that were set."""
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
        path, annotation = key_path(model, key)
        key = ".".join(path)
        if not equals:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif annotation in (None, Any, bool):
                text = "true"  # of an unknown key its name is told, which is what matters
            else:
                problems.append(f"--{key}: a value is missing after it")
                continue
        if not _put(data, path, _parse(key, text, annotation)):
            problems.append(f"--{key}: what stands above it is not a section")
        keys.add(key)
    return problems, keys


def _parse(key: str, text: str, annotation: Any) -> Any:
    """The override's value: YAML, but for a field of text the text as typed unless it is null or quoted.

    None as the annotation is that of a key that is not known.
    """
    may_be_text = takes_text(annotation)
    try:
        value = load_yaml(text, annotation)
    except RecipeFault as fault:
        if not may_be_text:
            raise SteersmanError(f"--{key}: {fault.problem}") from None
        return text
    except yaml.YAMLError:
        if annotation is None or may_be_text:
            return text
        raise SteersmanError(
            f"--{key}: {text!r} can not be read; is a bracket or a quotation mark missing, or one too many?"
        ) from None
    if not may_be_text or text.strip() in ("null", "~"):
        return value
    if isinstance(value, str):
        return value if text.lstrip().startswith(("'", '"')) else text
    shapes = {get_origin(a) or a for a in branches(annotation)}
    return value if value is not None and type(value) in shapes else text


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
