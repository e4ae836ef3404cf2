"""A reward as a judge: for offline work, and for labels whose source can be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from steersman.data import Layout
from steersman.data.examples import Content
from steersman.model import load_tokenizer
from steersman.reward import RewardConfig, RewardPart, WeightedSum, build_reward
from steersman.types import Need, Prompt, Sample

CHUNK = 256
"""About as many answers does a reward see at once."""


class Scorer:
    """Score of an answer under a weighted sum of rewards, from its text.

    The texts become the ids of the first reward model's own tokenizer, laid out as in its training: with the end
    token, and in a chat template where it has one. Rewards that are functions see the texts. `columns` are the
    prompt's row, for functions that need them.
    """

    def __init__(self, parts: Mapping[str, RewardPart], device: torch.device | str = "cpu") -> None:
        paths = [part.model for part in parts.values() if part.model is not None]
        tokenizer = load_tokenizer(paths[0]) if paths else None
        self.layout = None if tokenizer is None else Layout(tokenizer, wrap_in_chat=bool(tokenizer.chat_template))
        config = RewardConfig(parts=dict(parts))
        self.reward: WeightedSum = build_reward(config, tokenizer, device)  # pyright: ignore[reportArgumentType]

    def __call__(
        self,
        prompts: Sequence[Content],
        answers: Sequence[str],
        columns: Sequence[dict] | None = None,
        groups: Sequence[int] | None = None,
    ) -> dict[str, list[float]]:
        """Each part's scores by name, and their weighted sum as `total`.

        `groups` number the answers that meet each other, where a reward compares them; by default those to one
        prompt do.
        """
        rows, texts = columns or [{} for _ in prompts], [as_text(p) for p in prompts]
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        among = groups or [place[text] for text in texts]
        samples = [self._sample(*item) for item in zip(prompts, texts, answers, rows, among, strict=True)]
        out = {name: [0.0] * len(samples) for name in ["total", *self.reward.parts]}
        for piece in pieces(among):
            scores = self.reward.score([samples[i] for i in piece])
            for name, values in {"total": scores.total, **scores.parts}.items():
                for i, value in zip(piece, values.tolist(), strict=True):
                    out[name][i] = value
        return out

    def needs(self, rows: Sequence[Mapping[str, Any]]) -> list[Need]:
        """The columns that the rewards need of every prompt's row. Raises SteersmanError for one that no row has."""
        return self.reward.needs(rows)

    def describe(self) -> str:
        return self.reward.describe()

    def _sample(self, prompt: Content, text: str, answer: str, row: dict, group: int) -> Sample:
        if self.layout is None:
            return Sample(Prompt([0], text, row, index=group), [0], [0.0], "eos", answer)
        ids, response, _ = self.layout.answer(prompt, answer)
        return Sample(Prompt(ids, text, row, index=group), response, [0.0] * len(response), "eos", answer)


def pieces(groups: Sequence[int]) -> list[list[int]]:
    """The places of answers in pieces of about `CHUNK` and of about one size, which part no group of answers."""
    members: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    size = len(groups) / max(1, round(len(groups) / CHUNK))
    found: list[list[int]] = []
    done = 0
    for places in members.values():
        if done >= size * len(found):
            found.append([])
        found[-1] += places
        done += len(places)
    return found


def as_text(content: Content) -> str:
    """A prompt as a judge reads it: text as it is, turns as "Role: text" with a blank line between."""
    if isinstance(content, str):
        return content
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in content)
