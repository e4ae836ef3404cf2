"""What a reward is: samples in, scores out, each part by its name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from steersman.distributed.ranks import ranks
from steersman.guards.coroutines import await_result
from steersman.guards.functions import describe_function, load_function
from steersman.guards.raised import user_errors
from steersman.model import Headed
from steersman.types import Need, Sample, SteersmanError

RewardFunction = Callable[..., Any]

LARGEST = 1e16
"""Rewards are in [-LARGEST, LARGEST]: the sum of a batch's squares must stay within float32."""


@dataclass(slots=True)
class Scores:
    """Rewards of a batch of samples, on the CPU in float32.

    `total` [B] is what is optimised; `parts` holds each reward's own value [B] before its weight; `per_token`
    [B, T], where a reward judges tokens, sums over T to `total` and is 0 past a row's end. `feedback` is what the
    rewards say of each sample in words, "" where nothing; None where none says anything.
    """

    total: Float[Tensor, " B"]
    parts: dict[str, Float[Tensor, " B"]]
    per_token: Float[Tensor, "B T"] | None = None
    feedback: list[str] | None = None

    def of(self, rows: Sequence[int]) -> Scores:
        """The scores of some of the samples."""
        kept = list(rows)
        per_token = None if self.per_token is None else self.per_token[kept]
        feedback = None if self.feedback is None else [self.feedback[i] for i in kept]
        return Scores(self.total[kept], {name: part[kept] for name, part in self.parts.items()}, per_token, feedback)

    def with_weights(self, weights: Mapping[str, float]) -> Float[Tensor, "B K 2"]:
        """Each part's value beside its weight, as `Trajectory.parts` holds them."""
        pairs = [torch.stack([x, torch.full_like(x, weights[name])], -1) for name, x in self.parts.items()]
        return torch.stack(pairs, 1)


class Reward(Protocol):
    """Anything that scores samples; `describe` says in one line what it is, for the page before a run.

    `model` is the one that it asks, None where it asks none; `reads_ids` says that it is shown the policy's own ids.
    Every rank calls `score` with the same samples and gets the same scores: a model's rows are shared out, functions
    run on rank 0. `needs` is asked before anything is sampled, with the rows of the data's prompts: it gives the
    columns that the reward needs of every row, and raises SteersmanError for one that no row has.
    """

    @property
    def model(self) -> Headed | None: ...

    @property
    def reads_ids(self) -> bool: ...

    def score(self, samples: Sequence[Sample]) -> Scores: ...

    def needs(self, rows: Sequence[Mapping[str, Any]]) -> list[Need]: ...

    def describe(self) -> str: ...


class WeightedSum:
    """total = sum_k weight_k * score_k, every score_k logged under its name before its weight; what the parts say in
    words stands one below the other.

    When a part judges tokens, the parts that judge whole responses stand at the last token of `per_token`.
    Raises SteersmanError when there is no part, or when a weight is not a finite number.
    """

    def __init__(self, parts: Mapping[str, tuple[float, Reward]]):
        if not parts:
            raise SteersmanError("reward: there is no part; give at least one model, function or builtin")
        for name, (weight, _) in parts.items():
            if not math.isfinite(weight):
                raise SteersmanError(f"reward '{name}': the weight is {weight}; give a finite number")
        self.parts = dict(parts)

    def score(self, samples: Sequence[Sample]) -> Scores:
        scored = {name: (weight, reward.score(samples)) for name, (weight, reward) in self.parts.items()}
        total = torch.stack([weight * scores.total for weight, scores in scored.values()]).sum(0)
        outside = torch.nonzero(~(total.abs() <= LARGEST)).flatten().tolist()
        if outside:
            at = outside[0]
            parts = ", ".join(f"{w:g} x {float(s.total[at]):g} ({n})" for n, (w, s) in scored.items())
            raise SteersmanError(
                f"reward: the sum for sample {at} is {float(total[at]):g}: {parts} {_about(samples[at])}; it must be "
                f"finite and within {LARGEST:g}: mend the rewards or their weights"
            )
        per_token = None
        if any(scores.per_token is not None for _, scores in scored.values()):
            per_token = sum((w * _per_token(s, samples) for w, s in scored.values()), torch.zeros(()))
        said = [scores.feedback for _, scores in scored.values() if scores.feedback is not None]
        feedback = ["\n".join(filter(None, texts)) for texts in zip(*said, strict=True)] if said else None
        return Scores(total, {name: scores.total for name, (_, scores) in scored.items()}, per_token, feedback)

    def needs(self, rows: Sequence[Mapping[str, Any]]) -> list[Need]:
        return [need for _, reward in self.parts.values() for need in reward.needs(rows)]

    def describe(self) -> str:
        return "; ".join(f"{weight:g} x {name} ({r.describe()})" for name, (weight, r) in self.parts.items())


def _per_token(scores: Scores, samples: Sequence[Sample]) -> Tensor:
    if scores.per_token is not None:
        return scores.per_token
    out = torch.zeros(len(samples), max(len(s.ids) for s in samples))
    for row, sample in enumerate(samples):
        out[row, len(sample.ids) - 1] = scores.total[row]
    return out


class CallableReward:
    """A reward that is a function of texts.

    `function` is a Python callable, "module:function" or "path/to/file.py:function". It is called once a batch
    as `f(prompts=[...], completions=[...], **columns)` (by position when it has other names for the two), where
    `columns` are the data row's other columns as lists, those that it has parameters for or all if it
    takes `**`. A parameter `samples` receives the Samples. `columns` renames: {"answer": "solution"} fills the
    parameter `answer` from the data's column `solution`. `args` are fixed keyword arguments.

    It returns one number per completion, or for each completion one number per response token; in the place of
    either `{"score": NUMBER, "feedback": TEXT}` where it also says in words what it found. It may be `async`: such
    functions share one event loop.

    Raises SteersmanError naming the reward when the function can't be imported, lacks a column, raises (the
    original exception is chained), asks the process to end, takes longer than `time_limit` seconds (None: no limit),
    or returns a wrong count, a wrong type, NaN, or a number beyond LARGEST.
    """

    model = None
    reads_ids = False

    def __init__(
        self,
        function: str | RewardFunction,
        name: str | None = None,
        args: Mapping[str, Any] | None = None,
        columns: Mapping[str, str] | None = None,
        time_limit: float | None = None,
    ):
        self.time_limit = time_limit
        self.function = load_function(function) if isinstance(function, str) else function
        if isinstance(self.function, type):
            raise SteersmanError(
                f"reward '{name or self.function.__name__}': {describe_function(self.function)} is a class; give a "
                "function of prompts and completions"
            )
        self.name = name or getattr(self.function, "__name__", type(self.function).__name__)
        self.args, self.columns = dict(args or {}), dict(columns or {})
        parameters = _parameters(self.function)
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.by_name = "completions" in [p.name for p in named] or not named
        self.positional = [] if self.by_name else [p.name for p in named[:2]]
        named = named[len(self.positional) :]
        self.parameters = {p.name: p.default is p.empty for p in named}
        for key in [*self.args, *self.columns]:
            if key not in self.parameters and not self.takes_all:
                known = ", ".join(n for n in self.parameters if n not in ("prompts", "completions")) or "none"
                raise SteersmanError(
                    f"reward '{self.name}': '{key}' is not a parameter of the function; it has: {known}"
                )

    def needs(self, rows: Sequence[Mapping[str, Any]]) -> list[Need]:
        """The columns of its parameters without a default; those with one may be missing, and are None there."""
        filled = self._filled(columns_of(rows))
        needed = (column for parameter, column in filled.items() if self.parameters.get(parameter))
        return [Need(column, f"reward '{self.name}'") for column in dict.fromkeys(needed)]

    def describe(self) -> str:
        return f"function {describe_function(self.function)}"

    def score(self, samples: Sequence[Sample]) -> Scores:
        return ranks().from_main(lambda: self._score(samples), f"reward '{self.name}'")

    def _score(self, samples: Sequence[Sample]) -> Scores:
        batch = (
            f"batch of {len(samples)}, first prompt: {_shorten(samples[0].prompt.text)}, "
            f"first completion: {_shorten(samples[0].text)}"
        )
        keywords = self._columns(samples) | self.args
        with user_errors(f"reward '{self.name}'", batch, self.time_limit):
            values = self._call(samples, keywords)
        return _scores(self.name, values, samples)

    def _call(self, samples: Sequence[Sample], keywords: Mapping[str, Any]) -> Any:
        texts = {"prompts": [s.prompt.text for s in samples], "completions": [s.text for s in samples]}
        if self.by_name:
            wanted = {k: v for k, v in texts.items() if k in self.parameters or self.takes_all}
            return await_result(self.function(**wanted, **keywords))
        return await_result(self.function(*texts.values(), **keywords))

    def _columns(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The keyword lists of this batch: data columns, renamed, and the samples where asked for."""
        out: dict[str, Any] = {"samples": list(samples)} if "samples" in self.parameters else {}
        for parameter, column in self._filled(columns_of(s.prompt.row for s in samples)).items():
            out[parameter] = [s.prompt.row.get(column) for s in samples]
        return out

    def _filled(self, have: Sequence[str]) -> dict[str, str]:
        """Parameter -> the column of the data that fills it."""
        reserved = {"prompts", "completions", "samples"}
        taken = next((p for p in self.positional if self.takes_all and p in have), None)
        if taken is not None:
            raise SteersmanError(
                f"reward '{self.name}': the function's first two parameters, {' and '.join(self.positional)}, get "
                f"the prompts and the completions, and '{taken}' is also a column of the data; write them as "
                "`prompts, completions`, and columns behind them"
            )
        wanted = {parameter: self.columns.get(parameter, parameter) for parameter in self.parameters}
        if self.takes_all:
            wanted = {c: c for c in have} | wanted | self.columns
        out: dict[str, str] = {}
        for parameter, column in wanted.items():
            if parameter in reserved or parameter in self.args:
                continue
            if column in have:
                out[parameter] = column
            elif self.parameters.get(parameter) or parameter in self.columns:
                raise SteersmanError(
                    f"reward '{self.name}': the function needs the column '{column}', which the data does "
                    f"not have; it has: {', '.join(have) or 'none'}. Point to another one with "
                    f"`columns: {{{parameter}: NAME}}`"
                )
        return out


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The columns that any of the rows has, in the order in which they come."""
    return list(dict.fromkeys(column for row in rows for column in row))


def _parameters(function: RewardFunction) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some compiled functions have none to show: prompts and completions only
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return [inspect.Parameter(name, kind) for name in ("_prompts", "_completions")]


def _scores(name: str, values: Any, samples: Sequence[Sample]) -> Scores:
    """The checked return value of a reward function as Scores."""
    values = _plain(values)
    if not isinstance(values, list):
        raise SteersmanError(
            f"reward '{name}': returned {type(values).__name__}; return a list of one float per completion"
        )
    if len(values) != len(samples):
        raise SteersmanError(
            f"reward '{name}': returned {len(values)} values for {len(samples)} completions; return one each"
        )
    feedback = None
    if any(isinstance(value, dict) for value in values):
        said = (_said(name, value, i, samples[i]) for i, value in enumerate(values))
        values, feedback = map(list, zip(*said, strict=True))
    rows = [_plain(value) for value in values]
    if not any(isinstance(row, list) for row in rows):
        total = [_number(name, row, i, None, samples[i]) for i, row in enumerate(rows)]
        scores = torch.tensor(total, dtype=torch.float32)
        return Scores(scores, {name: scores}, None, feedback)
    per_token = torch.zeros(len(samples), max(len(s.ids) for s in samples))
    for i, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        if not isinstance(row, list) or len(row) != len(sample.ids):
            given = f"{len(row)} values" if isinstance(row, list) else type(row).__name__
            raise SteersmanError(
                f"reward '{name}': gave {given} for sample {i}, which has {len(sample.ids)} response tokens "
                f"{_about(sample)}; return one float per token for every completion, or one float per completion"
            )
        numbers = [_number(name, value, i, t, sample) for t, value in enumerate(row)]
        per_token[i, : len(row)] = torch.tensor(numbers, dtype=torch.float32)
    total = per_token.sum(1)
    return Scores(total, {name: total}, per_token, feedback)


def _said(name: str, value: Any, row: int, sample: Sample) -> tuple[Any, str]:
    """A score, and the feedback beside it; "" where the function gave the score alone."""
    if not isinstance(value, dict):
        return value, ""
    if set(value) != {"score", "feedback"} or not isinstance(value["feedback"], str | None):
        raise SteersmanError(
            f"reward '{name}': gave {_shorten(str(value))} for sample {row} {_about(sample)}; return a number, or "
            'exactly {"score": NUMBER, "feedback": TEXT}'
        )
    return value["score"], value["feedback"] or ""


def _plain(value: Any) -> Any:
    """Tensors, arrays and tuples as lists, their scalars as Python numbers; anything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _number(name: str, value: Any, row: int, token: int | None, sample: Sample) -> float:
    value = _plain(value)
    place = f"sample {row}" if token is None else f"sample {row}, token {token}"
    if not isinstance(value, Real):
        raise SteersmanError(
            f"reward '{name}': gave {type(value).__name__} {_shorten(str(value))} for {place} {_about(sample)}; "
            "return floats"
        )
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not abs(number) <= LARGEST:
        raise SteersmanError(
            f"reward '{name}': gave {number:g} for {place} {_about(sample)}; return a finite number within "
            f"{LARGEST:g} for every completion"
        )
    return number


def _about(sample: Sample) -> str:
    return f"(prompt: {_shorten(sample.prompt.text)}, completion: {_shorten(sample.text)})"


def _shorten(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")
