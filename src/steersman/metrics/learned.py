"""Scores of trained models: classifiers and regressors of texts, perplexity under a causal model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from steersman.metrics.core import Better, Corpus, MetricInput, Scorer, bootstrap
from steersman.metrics.encoders import fit, in_batches, label_names, load, room
from steersman.types import SteersmanError, missing


@dataclass
class Classifier(Scorer):
    """A sequence classifier's probability of one label, or a regressor's value (one output: `label` not given).

    `label` is a name or number of the model's own; `label_column` in its place names the column of the data that
    holds each row's. `output: logit` gives the label's score before the softmax (sigmoid for multi-label models),
    `output: accuracy` 1 where the label is the likeliest of all (multi-label: likelier than not), else 0. `beside`
    makes pairs: `reference` (BLEURT's way: reference first, best of several), or `source`; with `joined` the source
    and the text are one text, with a space between them where the text begins with a letter or digit. `truncate`
    cuts what is too long at its end, a joined text at its beginning.

    Raises SteersmanError when the model does not load, has no trained head or no such label, and for a row whose
    label the model does not have.
    """

    path: str
    label: str | int | None = None
    output: Literal["probability", "logit", "accuracy"] = "probability"
    beside: Literal["nothing", "reference", "source", "joined"] = "nothing"
    batch_size: int = 64
    truncate: bool = False
    device: str = "auto"
    label_column: str | None = None
    name = "classifier"

    def __post_init__(self) -> None:
        if self.label is not None and self.label_column is not None:
            raise ValueError("label and label_column are both given; give one of them")
        if self.label_column in ("references", "sources"):
            raise ValueError(f"label_column is '{self.label_column}', which holds texts; name the column of labels")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        beside = {"nothing": (), "reference": ("references",), "source": ("sources",), "joined": ("sources",)}
        return (*beside[self.beside], *(() if self.label_column is None else (self.label_column,)))

    @property
    def implementation(self) -> str:
        label = self.label if self.label_column is None else f"the label in {self.label_column}"
        what = "value" if label is None else f"{self.output} of {label}"
        return f"transformers AutoModelForSequenceClassification, {self.path}, {what}, beside: {self.beside}"

    def wrong_with(self, need: str, value: Any) -> str:
        if need != self.label_column:
            return super().wrong_with(need, value)
        return missing(value) or ("" if self._has(value) else f"{self.path} has no label {value!r}; {self._known}")

    def rows(self, batch: MetricInput) -> Sequence[float]:
        labels = self._labels(batch)
        if self.beside == "reference":
            pairs = [(r, t) for t, listed in zip(batch.texts, batch.references, strict=True) for r in listed]
            each = [i for i, listed in zip(labels, batch.references, strict=True) for _ in listed]
            scores, out = iter(self._scores(pairs, each)), []
            for listed in batch.references:
                out.append(max(next(scores) for _ in listed))
            return out
        if self.beside == "source":
            return self._scores(list(zip(batch.sources, batch.texts, strict=True)), labels)
        if self.beside == "joined":
            joined = zip(batch.sources, batch.texts, strict=True)
            return self._scores([(_joined(source, text),) for source, text in joined], labels)
        return self._scores([(text,) for text in batch.texts], labels)

    def _labels(self, batch: MetricInput) -> list[int | None]:
        """Each row's label as its number in the model; None for a regressor."""
        if self.label_column is None:
            if self.label is None and len(self._names) == 1 and self.output != "accuracy":
                return [None] * len(batch.texts)
            if not self._has(self.label):
                said = "no label is given" if self.label is None else f"it has no label '{self.label}'"
                raise SteersmanError(f"metric '{self.name}': {self.path}: {said}; {self._known}")
            return [self._number[self.label]] * len(batch.texts)
        column = batch.columns[self.label_column]
        for row, label in enumerate(column):
            if wrong := self.wrong_with(self.label_column, label):
                raise SteersmanError(f"metric '{self.name}', row {row}, {self.label_column}: {wrong}")
        return [self._number[label] for label in column]

    def _scores(self, parts: Sequence[tuple[str, ...]], labels: Sequence[int | None]) -> list[float]:
        model, tokenizer = self._model
        limit = room(model, tokenizer)
        cut: dict[str, Any] = {"truncation": True, "max_length": limit} if self.truncate else {}
        encoded = [tokenizer(*part, **cut) for part in parts]
        ids = [e["input_ids"] for e in encoded]
        fit(ids, limit, self.name, self.path)
        if any(not listed for listed in ids):  # a tokeniser that adds nothing leaves an empty text without tokens
            row = next(i for i, listed in enumerate(ids) if not listed)
            raise SteersmanError(f"metric '{self.name}', row {row}: the text has no token for {self.path} to read")

        def read(padded: Tensor, mask: Tensor, rows: list[int]) -> list[float]:
            inputs: dict[str, Tensor] = {"input_ids": padded, "attention_mask": mask}
            if "token_type_ids" in encoded[0]:
                kinds = torch.zeros_like(padded)
                for b, i in enumerate(rows):
                    kinds[b, : len(ids[i])] = torch.tensor(encoded[i]["token_type_ids"])
                inputs["token_type_ids"] = kinds
            if model.config.pad_token_id is not None:
                inputs["input_ids"] = padded.masked_fill(mask == 0, model.config.pad_token_id)
            return self._read_out(model(**inputs).logits.float(), [labels[i] for i in rows]).tolist()

        size = self.batch_size if model.config.pad_token_id is not None else 1
        return in_batches(ids, read, size, model.device)

    def _read_out(self, logits: Tensor, labels: Sequence[int | None]) -> Tensor:
        index = torch.tensor([label or 0 for label in labels], device=logits.device)
        own = logits.gather(1, index[:, None])[:, 0]  # of a regressor its one output
        if labels[0] is None or self.output == "logit":
            return own
        many = self._model[0].config.problem_type == "multi_label_classification"
        if self.output == "accuracy":
            return (own > 0).float() if many else (logits.argmax(-1) == index).float()
        return own.sigmoid() if many else logits.softmax(-1).gather(1, index[:, None])[:, 0]

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        from transformers import AutoModelForSequenceClassification

        model, tokenizer = load(AutoModelForSequenceClassification, self.path, self.name, self.device)
        if self.beside == "joined":
            tokenizer.truncation_side = "left"
        return model, tokenizer

    @cached_property
    def _names(self) -> dict[int, str]:
        return label_names(self.path, self.name)

    @cached_property
    def _number(self) -> dict[Any, int]:
        """The number of each label by its name, its number and its number as text."""
        out: dict[Any, int] = {}
        for number, name in sorted(self._names.items()):
            for key in (number, name, str(number)):
                out.setdefault(key, number)
        return out

    @property
    def _known(self) -> str:
        return "its labels are " + ", ".join(f"{i}: {n}" for i, n in sorted(self._names.items()))

    def _has(self, label: Any) -> bool:
        return isinstance(label, str | int) and not isinstance(label, bool) and label in self._number


def _joined(source: str, text: str) -> str:
    """Both as one text; a space is put between where the text begins with a letter or digit right behind the
    source, as one does that was stripped."""
    gap = " " if source and not source[-1].isspace() and text[:1].isalnum() else ""
    return source + gap + text


@dataclass
class Perplexity(Scorer):
    """exp of the mean negative log-probability per token under a causal model; lower is likelier.

        exp(-1/n sum_t log p(x_t | x_<t))

    The model's begin token is put in front where it has one; else the first token is not judged. With `after:
    source` the source stands in front, as it is, and only the text's tokens are judged. `unit: nats` gives the
    mean itself. A set's value weighs every token alike. An empty text has none and is refused. A text that is
    longer than the model reads is refused, or cut with `truncate`.
    """

    path: str
    unit: Literal["perplexity", "nats"] = "perplexity"
    after: Literal["nothing", "source"] = "nothing"
    batch_size: int = 32
    truncate: bool = False
    device: str = "auto"
    name = "perplexity"
    better: Better = field(default="lower", init=False, repr=False)
    scores_empty = False

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("sources",) if self.after == "source" else ()

    @property
    def implementation(self) -> str:
        return f"transformers AutoModelForCausalLM, {self.path}, in {self.unit} per token, after {self.after}"

    def rows(self, batch: MetricInput) -> Sequence[float]:
        return [self._value(nats / count) for nats, count in self._sums(batch)]

    def over(self, batch: MetricInput) -> Corpus:
        sums = np.array(self._sums(batch))

        def value(totals: np.ndarray) -> np.ndarray:
            mean = totals[:, 0] / totals[:, 1]
            return mean if self.unit == "nats" else np.exp(mean)

        return bootstrap(sums, value, self.name)

    def _value(self, nats: float) -> float:
        return nats if self.unit == "nats" else float(np.exp(nats))

    def _sums(self, batch: MetricInput) -> list[tuple[float, float]]:
        """Per text: the sum of -log p over its judged tokens, and how many they are."""
        model, tokenizer = self._model
        limit = room(model, tokenizer)
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        fronts, ids = [], []
        for row, text in enumerate(batch.texts):
            front = list(begin)
            if self.after == "source":
                front += tokenizer(batch.sources[row], add_special_tokens=False)["input_ids"]
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            whole = front + own
            fronts.append(max(len(front), 1))
            ids.append(whole[:limit] if self.truncate else whole)
            if len(ids[-1]) <= fronts[-1]:
                raise SteersmanError(
                    f"metric '{self.name}', row {row}: no token of the text can be judged "
                    f"({len(own)} tokens, {len(front)} in front of them, {limit} read)"
                )
        fit(ids, limit, self.name, self.path)

        def read(padded: Tensor, mask: Tensor, rows: list[int]) -> list[tuple[float, float]]:
            logits = model(input_ids=padded, attention_mask=mask).logits[:, :-1].float()
            nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), padded[:, 1:], reduction="none")
            return [
                (float(nats[b, fronts[i] - 1 : len(ids[i]) - 1].double().sum()), float(len(ids[i]) - fronts[i]))
                for b, i in enumerate(rows)
            ]

        return in_batches(ids, read, self.batch_size, model.device)

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM

        return load(AutoModelForCausalLM, self.path, self.name, self.device)
