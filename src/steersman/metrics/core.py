"""What a metric is: texts in, one score per text out, and a value of the whole set with its interval."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch

from steersman.guards.raised import user_errors
from steersman.guards.untrusted import LONE_SURROGATE
from steersman.ops.text import by_character, uncut, words
from steersman.statistics.intervals import DRAWS, normal_interval, percentile_interval, resampled_sums
from steersman.types import SteersmanError, missing

Cut = Literal["words", "space"]
CUTS: dict[Cut, Callable[[str], list[str]]] = {"words": words, "space": lambda text: text.lower().split()}
"""How a text becomes tokens, lower case: `ops.text.words`, or at white space, for text that is tokenised already."""

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Value of a metric over a whole set of texts, with the ends of its confidence interval.

    `low` and `high` are NaN where one text alone leaves nothing to measure a spread from. `count` is the number
    of texts.
    """

    value: float
    low: float
    high: float
    count: int


@runtime_checkable
class Metric(Protocol):
    """Anything that judges texts.

    `needs` names what must be given beside the texts: "references", "sources", or the name of a column such as
    "table" or "concepts". `per_sample` is False for a metric that is defined on a whole set only, which can not
    be a reward. `better` says in which direction the value improves. `implementation` names package, version
    and tokenisation.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> tuple[str, ...]: ...

    @property
    def per_sample(self) -> bool: ...

    @property
    def better(self) -> Better: ...

    @property
    def implementation(self) -> str: ...

    def wrong_with(self, need: str, value: Any) -> str:
        """What is wrong with a row's value of a need, such as "it is missing"; "" where nothing is."""
        ...

    def score(
        self,
        texts: Sequence[str],
        references: Sequence[Any] | None = None,
        sources: Sequence[str] | None = None,
        **columns: Sequence[Any],
    ) -> list[float]: ...

    def corpus(
        self,
        texts: Sequence[str],
        references: Sequence[Any] | None = None,
        sources: Sequence[str] | None = None,
        **columns: Sequence[Any],
    ) -> Corpus: ...


@dataclass(frozen=True, slots=True)
class MetricInput:
    """What a metric reads, checked: as many rows of each as there are texts, references as lists of strings."""

    texts: list[str]
    references: list[list[str]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def rows(self, index: Sequence[int]) -> MetricInput:
        def take(values: list[Any]) -> list[Any]:
            return [values[i] for i in index] if values else values

        columns = {name: take(values) for name, values in self.columns.items()}
        return MetricInput(take(self.texts), take(self.references), take(self.sources), columns)


class Scorer(ABC):
    """A metric that needs only one method: `rows`, the score of every text of a batch.

    `score` and `corpus` check what they are given and what comes back, so that `rows` may rely on it.
    `scores_empty` says that an empty text has a score by the metric's own definition; without it an empty text
    is refused. `empty_reference` allows empty references, which are refused otherwise: they are holes in data.

    Raises SteersmanError naming the metric, and the row where there is one: a need that is not given, lists of
    different lengths, a lone surrogate, an empty reference, an empty text that has no score, a score that is not
    finite, a value of the whole set that is no finite number.
    """

    name: str = ""
    needs: tuple[str, ...] = ()
    per_sample: bool = True
    better: Better = "higher"
    scores_empty: bool = True
    empty_reference: bool = False
    libraries: tuple[str, ...] = ()
    """Modules of `extras.py` without which it has no scores; `metric` asks for them."""

    @property
    @abstractmethod
    def implementation(self) -> str:
        """Package, version and tokenisation."""

    @abstractmethod
    def rows(self, batch: MetricInput) -> Sequence[float]:
        """One score per text."""

    def score(
        self,
        texts: Sequence[str],
        references: Sequence[Any] | None = None,
        sources: Sequence[str] | None = None,
        **columns: Sequence[Any],
    ) -> list[float]:
        if not self.per_sample:
            raise SteersmanError(
                f"metric '{self.name}': it is defined on a whole set of texts and gives single texts no score, "
                f"so it can not be a reward; use it in an evaluation"
            )
        batch = self.checked(texts, references, sources, columns)
        with user_errors(f"metric '{self.name}'"):
            return finite(self.name, self.rows(batch), len(batch.texts)) if batch.texts else []

    def corpus(
        self,
        texts: Sequence[str],
        references: Sequence[Any] | None = None,
        sources: Sequence[str] | None = None,
        **columns: Sequence[Any],
    ) -> Corpus:
        batch = self.checked(texts, references, sources, columns)
        if not batch.texts:
            raise SteersmanError(f"metric '{self.name}': there is no text to judge")
        with user_errors(f"metric '{self.name}'"):
            found: Any = self.over(batch)
        if not isinstance(found, Corpus):
            raise SteersmanError(
                f"metric '{self.name}': over gave {type(found).__name__}; give steersman.metrics.Corpus(value, low, "
                "high, count), with NaN for low and high where there is no interval"
            )
        if not isinstance(found.count, Integral):
            raise SteersmanError(
                f"metric '{self.name}': over gave a Corpus whose count is {found.count!r}; give the number of texts"
            )
        value, low = self._plain("value", found.value), self._plain("low", found.low)
        plain = Corpus(value, low, self._plain("high", found.high), int(found.count))
        if not math.isfinite(plain.value):
            raise SteersmanError(
                f"metric '{self.name}': the value over {len(batch.texts)} texts is {plain.value}, not a finite number"
            )
        return plain

    def _plain(self, key: str, number: Any) -> float:
        """A number of a `Corpus` as a float; arrays and tensors of one number are numbers too."""
        if not isinstance(number, str):
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                return float(number)
        raise SteersmanError(
            f"metric '{self.name}': over gave a Corpus whose {key} is {number!r}; give a number, and NaN for low and "
            "high where there is no interval"
        )

    def over(self, batch: MetricInput) -> Corpus:
        """The value of a checked batch with its interval: the mean of its scores, unless a metric says otherwise."""
        scores = finite(self.name, self.rows(batch), len(batch.texts))
        return bootstrap(np.array([[s, 1.0] for s in scores]), lambda sums: sums[:, 0] / sums[:, 1], self.name)

    def wrong_with(self, need: str, value: Any) -> str:
        """See `Metric`. A metric that reads columns may say more of them than that a value must be there."""
        if need == "references":
            return self._wrong_references(value)
        return missing(value)

    def checked(
        self,
        texts: Sequence[str],
        references: Sequence[Any] | None,
        sources: Sequence[str] | None,
        columns: Mapping[str, Sequence[Any]],
    ) -> MetricInput:
        given = {"references": references, "sources": sources, **columns}
        for need in self.needs:
            if given.get(need) is None:
                raise SteersmanError(f"metric '{self.name}': it needs {need}, and none are given")
        wanted = {need: list(given[need]) for need in self.needs}
        for need, values in wanted.items():
            if len(values) != len(texts):
                raise SteersmanError(f"metric '{self.name}': {len(texts)} texts but {len(values)} {need}")
        for row, text in enumerate(texts):
            self._check_text(row, text)
        listed = [self._references(row, value) for row, value in enumerate(wanted.pop("references", []))]
        for row, source in enumerate(wanted.get("sources", [])):
            if not isinstance(source, str):
                raise SteersmanError(f"metric '{self.name}', row {row}: the source is {_kind(source)}; give a text")
            _check_characters(f"metric '{self.name}', row {row}: the source", source)
        return MetricInput(list(texts), listed, wanted.pop("sources", []), wanted)

    def _check_text(self, row: int, text: Any) -> None:
        if not isinstance(text, str):
            raise SteersmanError(f"metric '{self.name}', row {row}: the text is {_kind(text)}; give a string")
        _check_characters(f"metric '{self.name}', row {row}: the text", text)
        if not self.scores_empty and not text.strip():
            raise SteersmanError(
                f"metric '{self.name}', row {row}: the text is empty, and an empty text has no {self.name}; "
                f"leave the row out, or give a reward the setting `empty: NUMBER`"
            )

    def _references(self, row: int, value: Any) -> list[str]:
        """One reference or several as a list."""
        wrong = self._wrong_references(value)
        if wrong:
            raise SteersmanError(f"metric '{self.name}', row {row}: {wrong}")
        return _listed(value)

    def _wrong_references(self, value: Any) -> str:
        """What is wrong with one reference or a list of several, each a text, or one number that answers a sum."""
        listed = _listed(value)
        if not listed:
            return f"the reference is {_kind(value)}; give a text or a list of texts"
        for reference in listed:
            if not isinstance(reference, str):
                return f"a reference is {_kind(reference)}; give a text or a list of texts"
            if found := _surrogate(reference):
                return f"a reference {found}"
            if not self.empty_reference and not reference.strip():
                return "a reference is empty; leave it out or mend the data"
        return ""


def finite(name: str, scores: Any, count: int) -> list[float]:
    """The scores as floats; raises SteersmanError where they are no list (tuple, array, tensor), or one is missing or
    not finite, naming metric and row."""
    scores = scores.tolist() if isinstance(scores, np.ndarray | torch.Tensor) else scores
    if not isinstance(scores, list | tuple):
        given = type(scores).__name__
        raise SteersmanError(f"metric '{name}': rows gave {given}; give a list of one number for each text")
    if len(scores) != count:
        raise SteersmanError(f"metric '{name}': gave {len(scores)} scores for {count} texts; give one each")
    values = []
    for row, score in enumerate(scores):
        try:
            values.append(math.nan if isinstance(score, str) else float(score))
        except (TypeError, ValueError):
            values.append(math.nan)
        if not math.isfinite(values[-1]):
            said = repr(score) if isinstance(score, str) else score
            raise SteersmanError(f"metric '{name}', row {row}: the score is {said}, not a finite number")
    return values


def bootstrap(statistics: np.ndarray, value: Callable[[np.ndarray], np.ndarray], name: str) -> Corpus:
    """Percentile interval of a value that is a function of the rows' summed statistics.

    `statistics` [N, K] has one row per text; `value` turns sums [D, K] into values [D]. Each of `DRAWS` draws takes
    N rows with replacement; no text is scored twice. The random stream is fixed.
    Source: Efron 1979; Koehn 2004 for corpus metrics of text.
    """
    n = len(statistics)
    point = float(value(statistics.sum(0, keepdims=True))[0])
    if not math.isfinite(point):
        raise SteersmanError(f"metric '{name}': the value over {n} texts is {point}, not a finite number")
    if n < 2:
        return Corpus(point, math.nan, math.nan, n)
    sums = np.stack(list(resampled_sums(statistics, DRAWS)))
    return Corpus(point, *percentile_interval(value(sums)), n)


def jackknife(whole: MetricInput, value: Callable[[MetricInput], float], name: str, *, groups: int = 20) -> Corpus:
    """Normal interval of a value that no resampling with repeats can give, such as a share of distinct n-grams.

        se^2 = (G - 1) / G * sum_g (value without group g - their mean)^2        value +- z se

    A text that is drawn twice would repeat itself, so the bootstrap is biased there; leaving groups out is not.
    Row i is in group i mod G. Source: Efron and Tibshirani 1993, ch. 11 (delete-d jackknife).
    """
    n = len(whole.texts)
    point = finite(name, [value(whole)], 1)[0]
    G = min(groups, n)
    if G < 2:
        return Corpus(point, math.nan, math.nan, n)
    without = np.array([value(whole.rows([i for i in range(n) if i % G != g])) for g in range(G)])
    if not np.isfinite(without).all():  # too few texts are left without a group
        return Corpus(point, math.nan, math.nan, n)
    error = math.sqrt((G - 1) / G * float(((without - without.mean()) ** 2).sum()))
    return Corpus(point, *normal_interval(point, error), n)


def check_script(
    name: str, references: Sequence[Sequence[str]], mend: str, cut: Callable[[str], Sequence[str]] = str.split
) -> None:
    """Raises SteersmanError for a reference in a script of which every character counts as a word, where `cut`, the
    metric's tokeniser, leaves it whole."""
    for row, listed in enumerate(references):
        for reference in listed:
            if by_character(reference) and uncut(reference, cut(reference)):
                raise SteersmanError(
                    f"metric '{name}', row {row}: the reference is in a script of which every character counts as a "
                    f"word, and the tokeniser does not cut it: {reference[:30]!r}; {mend}"
                )


def _listed(value: Any) -> list[Any]:
    """One reference, text or number, or several, as a list; what is neither has none."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [str(value)]
    if isinstance(value, str):
        return [value]
    if isinstance(value, (list, tuple)):
        return list(value)
    return []


def _check_characters(who: str, text: str) -> None:
    """Raises SteersmanError for half a surrogate pair, which is no character: no tokeniser and no file takes it."""
    if found := _surrogate(text):
        raise SteersmanError(f"{who} {found}")


def _surrogate(text: str) -> str:
    """What is wrong with a text that holds half a surrogate pair."""
    found = LONE_SURROGATE.search(text)
    if found is None:
        return ""
    return (
        f"holds a lone surrogate (U+{ord(found[0]):04X} at character {found.start()}), which is no character; mend "
        "the data, or replace it with U+FFFD"
    )


def _kind(value: Any) -> str:
    return "missing" if value is None else "an empty list" if value == [] else type(value).__name__
