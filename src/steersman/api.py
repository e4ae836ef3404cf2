"""The verbs as Python functions: a recipe in, the run's summary out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from steersman.config.load import load_recipe as read_recipe
from steersman.config.sections import Section
from steersman.types import SteersmanError
from steersman.verb_table import VERBS, Verb


def load_recipe(verb: str, path: str | Path | None = None, settings: Mapping[str, Any] | None = None) -> Section:
    """The recipe of a verb, checked: the file at `path` (None: defaults only) with `settings` laid over it.

    `settings` maps dotted keys to values: `{"iterations": 20, "optimizer.lr": 1e-6}`. Paths and numbers of NumPy are
    taken as what they stand for.

    Raises SteersmanError for an unknown verb, and for each setting that is not right by its dotted key.
    """
    # JSON is YAML too, so every value arrives as it was given.
    words = [f"--{key}={_as_json(key, value)}" for key, value in (settings or {}).items()]
    file = None if path is None else Path(path)
    return read_recipe(_verb(verb).recipe_class(file, words), file, words)


def run_verb(verb: str, recipe: Section, *, resume: bool = False) -> dict[str, Any]:
    """Carries out a verb as `steersman VERB RECIPE` does; the summary is also `summary.json` in the run folder.

    With `resume` the run in the recipe's folder goes on from its newest checkpoint. A summary whose `finished` is
    false is of a run that a signal ended early. Raises SteersmanError for what the user can mend, a recipe of
    another verb among it.
    """
    found = _verb(verb)
    if not found.reads(recipe):
        others = [name for name, other in VERBS.items() if other.is_loaded and other.reads(recipe)]
        whose = f"a recipe of {' or '.join(others)}" if others else f"a {type(recipe).__name__}"
        raise SteersmanError(f"{verb}: it was given {whose}; make its own with load_recipe({verb!r}, ...)")
    return found.start(verb, recipe, resume=resume)


def _as_json(key: str, value: Any) -> str:
    """A setting as text. Raises SteersmanError by its key for what no recipe can hold."""
    try:
        return json.dumps(value, default=_plain)
    except (TypeError, ValueError) as error:  # also of keys that are no text, and of what holds itself
        raise SteersmanError(
            f"settings: {key}: {error}. Give text, numbers, true or false, null, lists or mappings; a function or "
            "class is named by its file, such as my_rewards.py:score"
        ) from None


def _plain(value: Any) -> Any:
    """What JSON has no word for, and a recipe has."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r} can not stand in a recipe")


def _verb(name: str) -> Verb:
    if name not in VERBS:
        near = get_close_matches(name, VERBS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
        raise SteersmanError(f"{name}: there is no such verb; {hint}")
    return VERBS[name]
