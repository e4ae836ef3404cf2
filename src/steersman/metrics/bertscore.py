"""BERTScore with any encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from steersman.metrics.core import MetricInput, Scorer
from steersman.metrics.encoders import fit, in_batches, load, model_path, room
from steersman.types import SteersmanError


@dataclass
class BERTScore(Scorer):
    """Greedy matching of contextual token vectors by cosine, about [0, 1], for the best reference by F.

        P = mean_i max_j cos(x_i, y_j)      R = mean_j max_i cos(x_i, y_j)      F = 2 P R / (P + R)

    Over the tokens of text x and reference y without the special ones at both ends, which may still be matched
    to, as in the authors' package. `layer` counts transformer layers from 1; null is the last. No weights by
    document frequency and no rescaling. An empty text scores 0, as there. Source: arXiv 1904.09675, sec. 3.

    A reference is read once: its vectors are kept for the next batch, up to `keep_mib` MiB of them, then those that
    came first go. Layers after `layer` and the next one are not loaded. Raises SteersmanError for a layer that the
    encoder does not have.
    """

    path: str = "minilm"
    layer: int | None = None
    part: Literal["f1", "precision", "recall"] = "f1"
    batch_size: int = 64
    truncate: bool = False
    device: str = "auto"
    keep_mib: int = 256
    name = "bertscore"
    needs = ("references",)

    @property
    def implementation(self) -> str:
        return (
            f"steersman's own, equal to bert-score 0.3.13; {self.path}, layer {self.layer or 'last'}, {self.part}, "
            f"no idf, no rescaling"
        )

    def rows(self, batch: MetricInput) -> Sequence[float]:
        references = self._kept(dict.fromkeys(r for listed in batch.references for r in listed))
        new = [text for text in dict.fromkeys(batch.texts) if text not in references]
        vectors = {**references, **self._vectors(new)}
        out = []
        for text, listed in zip(batch.texts, batch.references, strict=True):
            scored = [_match(vectors[text], vectors[r]) for r in listed]
            best = max(scored, key=lambda parts: parts[2])
            out.append(best[{"precision": 0, "recall": 1, "f1": 2}[self.part]])
        return out

    def _kept(self, texts: dict[str, None]) -> dict[str, Float[Tensor, "L H"]]:
        """Vectors of references, from earlier batches where they are there."""
        known = self._known
        found = {text: known[text] for text in texts if text in known}
        new = self._vectors([text for text in texts if text not in known])
        known.update(new)
        most = self.keep_mib * 2**20
        used = sum(v.nbytes for v in known.values())
        while used > most:
            used -= known.pop(next(iter(known))).nbytes
        return {**found, **new}

    @cached_property
    def _known(self) -> dict[str, Float[Tensor, "L H"]]:
        return {}

    def _vectors(self, listed: Sequence[str]) -> dict[str, Float[Tensor, "L H"]]:
        """Unit vectors of every text's tokens, special ones included."""
        model, tokenizer = self._model
        limit = room(model, tokenizer)
        ids = [tokenizer(text.strip())["input_ids"] for text in listed]
        if self.truncate:
            ids = [tokenizer(t.strip(), truncation=True, max_length=limit)["input_ids"] for t in listed]
        fit(ids, limit, self.name, self.path)
        layer = -1 if self.layer is None else self.layer

        def read(padded: Tensor, mask: Tensor, rows: list[int]) -> list[Tensor]:
            hidden = model(input_ids=padded, attention_mask=mask, output_hidden_states=True).hidden_states[layer]
            unit = hidden / hidden.norm(dim=-1, keepdim=True)
            return [unit[b, : len(ids[i])].clone() for b, i in enumerate(rows)]  # the padding need not be kept

        return dict(zip(listed, in_batches(ids, read, self.batch_size, model.device), strict=True))

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        from transformers import AutoModel

        layers = None if self.layer is None else self.layer + 1  # the last one's output may be normed once more
        model, tokenizer = load(AutoModel, model_path(self.path, self.name), self.name, self.device, layers)
        if self.layer is not None and not 1 <= self.layer <= model.config.num_hidden_layers:
            raise SteersmanError(
                f"metric '{self.name}': {self.path} has {model.config.num_hidden_layers} layers, so none of number "
                f"{self.layer}"
            )
        return getattr(model, "encoder", model) if model.config.is_encoder_decoder else model, tokenizer


def _match(text: Float[Tensor, "I H"], reference: Float[Tensor, "J H"]) -> tuple[float, float, float]:
    """Precision, recall and F; rows 0 and -1 are the special tokens."""
    if len(text) <= 2 or len(reference) <= 2:
        return 0.0, 0.0, 0.0
    cos = text @ reference.T
    precision = float(cos.amax(1)[1:-1].mean())
    recall = float(cos.amax(0)[1:-1].mean())
    return precision, recall, 2 * precision * recall / (precision + recall)
