"""Packages that only some verbs and metrics need, and the extra of steersman that installs each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from steersman.types import SteersmanError

EXTRAS = {
    "gymnasium": "control", "matplotlib": "reports", "sacrebleu": "metrics", "rapidfuzz": "metrics",
    "rouge_score": "metrics", "nltk": "metrics", "math_verify": "metrics",
    "lm_eval": "harness", "ray": "ray", "deepspeed": "deepspeed",
}  # fmt: skip
"""Module -> extra."""


def installed(module: str) -> bool:
    """Whether the module can be imported; it is not."""
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


def require(what: str, *modules: str) -> None:
    """Raises SteersmanError for the first module that is not installed, with the extra to install."""
    for module in modules:
        if not installed(module):
            raise SteersmanError(_sentence(what, module))


@contextmanager
def explain_missing(what: str) -> Iterator[None]:
    """Turns the import error of a module in EXTRAS into a SteersmanError that names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        raise SteersmanError(_sentence(what, module)) from error


def _sentence(what: str, module: str) -> str:
    return f"{what} needs {module}, which is not installed: pip install 'steersman[{EXTRAS[module]}]'"
