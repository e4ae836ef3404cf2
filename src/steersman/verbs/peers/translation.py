"""One file's settings on their way into a recipe: which of our keys they became, and which were left out and why."""

from __future__ import annotations

from typing import Any, TypeGuard

from steersman.config.sections import walk_keys
from steersman.guards.untrusted import is_number
from steersman.verbs.peers.settings import recipe_of, script_words, toolkit_of

OFF = ("false", "no", "off", "none", "0", "")
NULLS = ("max_grad_norm", "save_total_limit")
"""Names of which null says something; of the others it is as if they were not given."""


class LeftOutError(Exception):
    """A setting is not written; the message says why."""


class Translation:
    """`keys` are ours with their values, `left` the names that have none, with the reason. `sources` says of each key
    which names it comes from, and `taken` which names need no further look."""

    def __init__(self, settings: dict[str, Any], verb: str) -> None:
        self.settings = {name: value for name, value in settings.items() if value is not None or name in NULLS}
        self.verb, self.recipe = verb, recipe_of(verb)
        self.known = {key for key, _ in walk_keys(self.recipe)} - self.recipe.unread_keys()
        self.words = script_words(settings)
        self.toolkit = toolkit_of(settings)
        self.keys: dict[str, Any] = {}
        self.left: dict[str, str] = {}
        self.sources: dict[str, tuple[str, ...]] = {}
        self.taken: set[str] = set()

    def given(self, *names: str) -> tuple[str, Any]:
        """The first of the names that the file has and that is not left out, with its value; else ("", None)."""
        return next(((n, self.settings[n]) for n in names if n in self.settings and n not in self.left), ("", None))

    def leave(self, name: str, reason: str) -> None:
        """Names the setting as left out; an earlier reason stays."""
        self.taken.add(name)
        self.left.setdefault(name, " ".join(reason.split()))

    def put(self, key: str, value: Any, *names: str) -> None:
        """Writes a key that stands for these names; where another name said it before, and otherwise, they are left
        out."""
        self.taken.update(names)
        if key not in self.keys:
            self.keys[key], self.sources[key] = value, names
        elif self.keys[key] != value:
            before = " and ".join(self.sources[key]) or "a default there"
            for name in names:
                self.leave(name, f"{before} decided {key}, which is {short(self.keys[key])}")

    def whole(self, name: str, default: int) -> int:
        """The whole number that the setting is, or the default. Raises LeftOutError for anything else."""
        value = self.settings.get(name, default)
        if not is_whole(value):
            raise LeftOutError(f"{name} is {short(value)}, which is no whole number above 0")
        return value

    def has_critic(self) -> bool:
        """Whether the verb trains a critic."""
        method: Any = self.recipe.model_fields.get("algorithm")
        return method is not None and method.annotation.critic

    def steps(self, key: str, value: Any, *strategies: str) -> dict[str, Any]:
        """Steps between two looks or checkpoints. Raises LeftOutError for what is not counted in steps."""
        strategy, _ = self.given(*strategies)
        told = next((n for n in strategies if n in self.left), strategy)
        if told and self.settings[told] != "steps":
            raise LeftOutError(f"{told} is {short(self.settings[told])}, which does not read it")
        if is_number(value) and value <= 0:
            raise LeftOutError(f"{short(value)} counts no steps there; {key} is at least 1")
        if not is_whole(value):
            raise LeftOutError(f"{short(value)} is no number of steps; {key} counts them")
        return {key: self.in_iterations(value)}

    def in_iterations(self, updates: int) -> int:
        """TRL counts updates in on-policy trainers without a critic, and steps are iterations here.

        Raises LeftOutError where that is no whole number.
        """
        if "iterations" not in self.known or self.toolkit != "trl" or self.has_critic():
            return updates
        each = self.keys.get("algorithm.epochs", 1) * self.keys.get("algorithm.minibatches", 1)
        if not is_whole(each) or updates % each:
            raise LeftOutError(f"{updates} updates are no whole number of iterations, which have {short(each)} each")
        return updates // each


def listed(value: Any) -> list[Any]:
    """The value as a list; text is cut at its commas."""
    if isinstance(value, str):
        return [part for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def is_on(value: Any) -> bool:
    """Whether a switch is on."""
    return str(value).lower() in ("true", "yes", "on", "1")


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def short(value: Any) -> str:
    """The value for a comment, in at most 60 characters."""
    text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
