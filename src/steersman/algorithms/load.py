"""A method of one's own, by "my_method.py:Class" or "module:Class"."""

from __future__ import annotations

from pydantic import ValidationError

from steersman.algorithms.base import Algorithm
from steersman.guards.functions import load_function
from steersman.types import SteersmanError


def load_algorithm(spec: str) -> type[Algorithm]:
    """The subclass of `Algorithm` that `spec` names.

    Raises SteersmanError where there is none, where it lacks its name, title or paper, or where it gives a setting of
    `Algorithm` another type.
    """
    found = load_function(spec)
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise SteersmanError(
            f"{spec}: a method is a subclass of steersman.algorithms.Algorithm; see docs/algorithms.md"
        )
    missing = [name for name in ("name", "title", "paper") if name not in dir(found)]
    if missing:
        raise SteersmanError(f"{spec}: the class has no {', '.join(missing)}; set each to a text in its body")
    _check_settings(spec, found)
    return found


def _check_settings(spec: str, found: type[Algorithm]) -> None:
    """Raises SteersmanError where the class gives a setting of `Algorithm` a default that no method can have."""
    for name in Algorithm.model_fields.keys() & found.model_fields.keys():
        default = found.model_fields[name].get_default(call_default_factory=True)
        try:
            Algorithm.model_validate({name: default}, strict=True)
        except ValidationError as error:
            raise SteersmanError(
                f"{spec}: the setting {name} is {default!r} by default, and every method's {name} must be so: "
                f"{error.errors()[0]['msg']}; give a setting of your own another name"
            ) from None
