"""The metrics by their names, and making one of a name and settings."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from steersman.extras import require
from steersman.guards.functions import load_function
from steersman.metrics.answers import ConceptCoverage, ExactMatch, MathAnswer, TokenF1
from steersman.metrics.bertscore import BERTScore
from steersman.metrics.cider import CIDEr
from steersman.metrics.core import Better, Metric, Scorer
from steersman.metrics.diversity import MSTTR, Distinct, Entropy, Length, Repetition, Unique
from steersman.metrics.ifeval import IFEval
from steersman.metrics.java import METEOR15, spice
from steersman.metrics.learned import Classifier, Perplexity
from steersman.metrics.nltk_scores import BLEU, METEOR
from steersman.metrics.parent import PARENT
from steersman.metrics.rouge import Rouge
from steersman.metrics.sacre import TER, ChrF, SacreBLEU
from steersman.metrics.sentiment import VaderSentiment
from steersman.types import SteersmanError

METRICS: dict[str, Callable[..., Metric]] = {
    "rouge1": partial(Rouge, "rouge1"),
    "rouge2": partial(Rouge, "rouge2"),
    "rougeL": partial(Rouge, "rougeL"),
    "rougeLsum": partial(Rouge, "rougeLsum"),
    "bleu": BLEU,
    "sacrebleu": SacreBLEU,
    "chrf": ChrF,
    "chrf++": partial(ChrF, "chrf++", 2),
    "ter": TER,
    "meteor": METEOR,
    "meteor1.5": METEOR15,
    "cider": CIDEr,
    "spice": spice,
    "parent": PARENT,
    "bertscore": BERTScore,
    "classifier": Classifier,
    "perplexity": Perplexity,
    "vader_sentiment": VaderSentiment,
    "exact_match": ExactMatch,
    "token_f1": TokenF1,
    "math_answer": MathAnswer,
    "concept_coverage": ConceptCoverage,
    "distinct": Distinct,
    "unique": Unique,
    "entropy": Entropy,
    "msttr": MSTTR,
    "repetition": Repetition,
    "length": Length,
    "ifeval": IFEval,
}
"""Name -> factory; its keyword parameters are the metric's settings."""


def metric(name: str, settings: Mapping[str, Any] | None = None) -> Metric:
    """The metric of that name in `METRICS`, or of "module:Class" or "path/to/file.py:Class", with its settings.

    Raises SteersmanError when there is no such metric, a setting is unknown or of the wrong type, a package that it
    needs is not installed, or what a user's class makes is not a metric.
    """
    factory = METRICS.get(name)
    if factory is None:
        if ":" not in name:
            near = difflib.get_close_matches(name, METRICS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(METRICS)}."
            raise SteersmanError(f"there is no metric '{name}'. {hint} One's own is module:Class or file.py:Class")
        factory = load_function(name)
    checked = _checked(name, factory, settings or {})
    try:
        made = factory(**checked)
    except (TypeError, ValueError) as error:
        raise SteersmanError(f"metric '{name}': {error}") from error
    if not isinstance(made, Metric):
        raise SteersmanError(
            f"metric '{name}': it makes {type(made).__name__}, which is no metric; subclass steersman.metrics.Scorer"
        )
    _check_facts(name, made)
    if isinstance(made, Scorer):
        require(f"metric '{name}'", *made.libraries)
    return made


def _check_facts(name: str, made: Metric) -> None:
    """Raises SteersmanError for what a class of a user's own says of its metric and can not be."""
    if made.better not in get_args(Better):
        known = ", ".join(get_args(Better))
        raise SteersmanError(f"metric '{name}': better is {made.better!r}; it is one of {known}")
    needs: Any = made.needs
    if not isinstance(needs, tuple | list) or not all(isinstance(need, str) for need in needs):
        raise SteersmanError(f"metric '{name}': needs is {needs!r}; give a tuple of names, as in (\"references\",)")


def settings_of(factory: Callable[..., Metric]) -> dict[str, inspect.Parameter]:
    """The settings that a factory takes, by name."""
    fixed = len(factory.args) if isinstance(factory, partial) else 0
    inner = factory.func if isinstance(factory, partial) else factory
    return dict(list(inspect.signature(inner).parameters.items())[fixed:])


def _checked(name: str, factory: Callable[..., Metric], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, known and of the types that the factory's annotations name."""
    known = settings_of(factory)
    for key in given:
        if key not in known:
            raise SteersmanError(f"metric '{name}': it has no setting '{key}'; it has: {', '.join(known) or 'none'}")
    missing = [k for k, p in known.items() if p.default is p.empty and k not in given]
    if missing:
        plain = "; it is a function, and a metric is a subclass of steersman.metrics.Scorer"
        hint = plain if inspect.isfunction(factory) and name not in METRICS else ""
        raise SteersmanError(f"metric '{name}': it needs the setting {' and '.join(missing)}{hint}")
    hints = get_type_hints(factory.func if isinstance(factory, partial) else factory)
    out = dict(given)
    for key in given.keys() & hints.keys():
        try:
            out[key] = TypeAdapter(hints[key]).validate_python(given[key])
        except ValidationError as error:
            raise SteersmanError(f"metric '{name}': {key} is {given[key]!r}: {error.errors()[0]['msg']}") from None
    return out
