"""The verbs as Python functions: a recipe in, the run's summary out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from steersman.cli import VERBS, Verb
from steersman.config.load import load_recipe as read_recipe
from steersman.config.sections import Section
from steersman.types import SteersmanError


def load_recipe(verb: str, path: str | Path | None = None, settings: Mapping[str, Any] | None = None) -> Section:
    """The recipe of a verb, checked: the file at `path` (None: defaults only) with `settings` laid over it.

    `settings` maps dotted keys to values: `{"iterations": 20, "optimizer.lr": 1e-6}`.

    Raises SteersmanError for an unknown verb, and for each setting that is not right by its dotted key.
    """
    # JSON is YAML too, so every value arrives as it was given.
    words = [f"--{key}={json.dumps(value)}" for key, value in (settings or {}).items()]
    file = None if path is None else Path(path)
    return read_recipe(_verb(verb).recipe_class(file, words), file, words)


def run_verb(verb: str, recipe: Section, *, resume: bool = False) -> dict[str, Any]:
    """Carries out a verb as `steersman VERB RECIPE` does; the summary is also `summary.json` in the run folder.

    With `resume` the run in the recipe's folder goes on from its newest checkpoint. A summary whose `finished` is
    false is of a run that a signal ended early. Raises SteersmanError for what the user can mend.
    """
    return _verb(verb).start(verb, recipe, resume=resume)


def _verb(name: str) -> Verb:
    if name not in VERBS:
        near = get_close_matches(name, VERBS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
        raise SteersmanError(f"{name}: there is no such verb; {hint}")
    return VERBS[name]
