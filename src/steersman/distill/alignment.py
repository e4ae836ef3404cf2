"""A teacher with another tokenizer: it reads the same text, and is compared where both stand at the same place.

Source: arXiv 2402.12030. Departure: the paper pairs the t-th token of one with the t-th of the other and cuts the
longer one; after the first word that the tokenizers cut differently that compares predictions of different words.
Here positions are compared where both models have read the same characters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steersman.data import Codec
from steersman.distill.teacher import Answer, Measure, Teacher, TokenDivergence
from steersman.model import Policy
from steersman.ops.divergence import TeacherStates, sorted_distance
from steersman.ops.logprob import Head
from steersman.types import Tokens, send


def text_before_tokens(codec: Codec, ids: Sequence[int]) -> list[str]:
    """The text that stands before each token of a response."""
    return [codec.decode(list(ids[:t])) for t in range(len(ids))]


def same_places(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int]]:
    """Positions (i, j) at which both have read the same text; none inside of a character, each place once."""
    at = {text: j for j, text in reversed(list(enumerate(second)))}
    seen: set[str] = set()
    out = []
    for i, text in enumerate(first):
        if text in at and text not in seen and not text.endswith("\ufffd"):
            seen.add(text)
            out.append((i, at[text]))
    return out


class OtherTokenizer(Teacher):
    """A frozen teacher that reads an answer's text in tokens of its own; sorted probabilities are compared."""

    reads_ids = False

    def __init__(self, model: Policy, student: Codec, name: str) -> None:
        self.model, self.student, self.name = model, student, name
        self.codec = Codec(model.tokenizer)

    def describe(self) -> str:
        return f"{self.name}, by its own tokenizer ({len(self.model.tokenizer):,} tokens)"

    def text(self, ids: list[int]) -> str:
        return self.student.decode(ids)

    def compare(self, answers: Sequence[Answer], hidden: Tensor, head: Head, measure: Measure) -> TokenDivergence:
        """The sorted distance, whatever the kind; 0 at tokens where the two do not stand at the same place."""
        taught, places = self.read(answers)
        places = send(places, hidden.device)
        divergence = sorted_distance(hidden[places], head, taught, temperature=measure.temperature)
        return TokenDivergence(divergence.new_zeros(len(hidden)).index_add(0, places, divergence))

    @torch.no_grad()
    def read(self, answers: Sequence[Answer]) -> tuple[TeacherStates, Tensor]:
        """The teacher's distributions at the places that are compared, and these places among the packed response
        tokens of the answers; only tokens that count are."""
        responses = [self.codec.finish(a.text, eos=a.ended) or [0] for a in answers]
        tokens = Tokens.from_ids([a.teacher_prompt for a in answers], responses)
        mine, theirs, before, before_theirs = [], [], 0, 0
        for answer, response in zip(answers, responses, strict=True):
            places = same_places(
                text_before_tokens(self.student, answer.response), text_before_tokens(self.codec, response)
            )
            kept = [(i, j) for i, j in places if answer.mask[i]]
            mine += [before + i for i, _ in kept]
            theirs += [before_theirs + j for _, j in kept]
            before, before_theirs = before + len(answer.response), before_theirs + len(response)
        hidden = self.model.hidden(tokens)
        at = send(torch.tensor(theirs, dtype=torch.long), hidden.device)
        return TeacherStates(hidden[at], self.model.head()), torch.tensor(mine, dtype=torch.long)
