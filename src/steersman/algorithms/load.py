"""A method of one's own, by "my_method.py:Class" or "module:Class"."""

from __future__ import annotations

from steersman.algorithms.base import Algorithm
from steersman.guards.functions import load_function
from steersman.types import SteersmanError


def load_algorithm(spec: str) -> type[Algorithm]:
    """The subclass of `Algorithm` that `spec` names.

    Raises SteersmanError where there is none, or where it lacks its name, title or paper.
    """
    found = load_function(spec)
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise SteersmanError(
            f"{spec}: a method is a subclass of steersman.algorithms.Algorithm; see docs/algorithms.md"
        )
    missing = [name for name in ("name", "title", "paper") if name not in dir(found)]
    if missing:
        raise SteersmanError(f"{spec}: the class has no {', '.join(missing)}; set each to a text in its body")
    return found
