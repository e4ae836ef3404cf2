"""What the numbers of a reward model's head mean; it travels in the model's config.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

KEY = "steersman"
"""The field of config.json."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """number = shift + scale * head, one of each per output; without them the head's number is the score.

    `kind` is what it was trained on: preference, ranking, rating, feedback or steps. `attributes` name the outputs
    of a model of ratings. `separator` ends a step where `kind` is steps. `gating` holds the sizes of the network
    that mixes the attributes, where there is one. `debiased` is what each unit of a feature of style is worth, which
    the score is freed of.
    """

    kind: str = "preference"
    attributes: tuple[str, ...] = ()
    shift: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    separator: str = ""
    gating: dict[str, Any] = field(default_factory=dict)
    debiased: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Any) -> Meaning:
        """What a config says; the default where it says nothing."""
        return cls.parsed(getattr(config, KEY, None) or {})

    @classmethod
    def parsed(cls, saved: dict[str, Any]) -> Meaning:
        """What `write` put there. Raises TypeError for a field that no meaning has."""
        lists: Any = {name: tuple(saved[name]) for name in ("attributes", "shift", "scale") if name in saved}
        return cls(**(saved | lists))

    def write(self, config: Any) -> None:
        """Puts it into a config, for `save_pretrained`."""
        if self == Meaning() and not hasattr(config, KEY):
            return
        setattr(config, KEY, {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()})

    @staticmethod
    def forget(config: Any) -> None:
        """Takes it out of a config whose head begins anew."""
        if hasattr(config, KEY):
            delattr(config, KEY)


def step_ends(tokenizer: Any, ids: Sequence[int], separator: str) -> list[int]:
    """Places of the tokens that complete a step: the last of each separator, and the last token of all.

    A last piece without visible text (an end token after a separator) is no step.
    """
    ends: list[int] = []
    text = ""
    for place, added in enumerate(_additions(tokenizer, ids)):
        text += added
        if separator in text:
            body, _, text = text.rpartition(separator)
            if body.replace(separator, "").strip():
                ends.append(place)
    if text.strip():
        ends.append(len(ids) - 1)
    return ends


def _additions(tokenizer: Any, ids: Sequence[int]) -> Iterator[str]:
    """What each token adds to the text: "" where a character is not whole yet, which a later token completes.

    Each is decoded behind the tokens before it, since a leading space is dropped at the start of a text.
    """
    context: list[int] = []
    fresh: list[int] = []
    before = ""
    for place, token in enumerate(ids, 1):
        fresh.append(token)
        text = _decoded(tokenizer, [*context, *fresh])
        if text == before or (text.endswith("\ufffd") and place < len(ids)):
            yield ""
            continue
        yield text[len(before) :]
        context, fresh = fresh, []
        before = _decoded(tokenizer, context)


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
