"""What a row becomes: typed examples, one dataclass for each kind of training signal, with their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NotRequired, TypedDict

from steersman.data.rows import Row


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user, assistant or tool.

    `tools` stands on the first turn of a conversation: what all of it may call.
    """

    role: str
    content: str
    tool_calls: NotRequired[Any]
    function_call: NotRequired[Any]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    thinking: NotRequired[str]
    tools: NotRequired[list[Any]]


Content = str | list[Message]
"""Plain text, which no template touches, or turns of a conversation, which the chat template renders."""


@dataclass(slots=True)
class Demonstration:
    """What the model should say: `completion` counts in the loss (of a conversation, its assistant turns).

    Text without a prompt has `prompt == ""`. A conversation's prompt is what precedes its first assistant turn.
    """

    prompt: Content
    completion: Content
    row: Row


@dataclass(slots=True)
class Preference:
    """`chosen` was preferred to `rejected` for the same prompt.

    `margin` is how much better it is, in the data's own units. `agreement` is the share of raters who chose it (a tie
    counts half): the soft label of the pair, 1 for a single rater. `weight` scales its loss. `votes` are the raters
    one by one where they are known: 1 for `chosen`, 0 for `rejected`, 1/2 for a tie. Where one of the two is the
    reference model's answer, `chosen_from_reference` says which. `gold` is an answer that is better than both, where
    it was asked for.
    """

    prompt: Content
    chosen: Content
    rejected: Content
    row: Row
    margin: float | None = None
    agreement: float = 1.0
    weight: float = 1.0
    votes: tuple[float, ...] = ()
    chosen_from_reference: bool | None = None
    gold: Content | None = None


@dataclass(slots=True)
class Feedback:
    """Thumbs up (True) or down (False) for one completion."""

    prompt: Content
    completion: Content
    label: bool
    row: Row
    weight: float = 1.0


@dataclass(slots=True)
class Ranking:
    """K completions of one prompt; a lower rank is better, equal ranks are ties."""

    prompt: Content
    completions: list[Content]
    ranks: list[float]
    row: Row


@dataclass(slots=True)
class Rating:
    """One completion with a number for each attribute, higher meaning more of it; not every row rates all."""

    prompt: Content
    completion: Content
    scores: dict[str, float]
    row: Row


@dataclass(slots=True)
class Steps:
    """An answer in steps, each with a label in [0, 1]: right so far, or the share of roll-outs that succeed.

    `separator` stands between two steps of the answer.
    """

    prompt: Content
    steps: list[str]
    labels: list[float]
    row: Row
    separator: str = "\n"

    @property
    def completion(self) -> Content:
        """The whole answer, as one text or, under a conversation, as one turn."""
        whole = self.separator.join(self.steps)
        return whole if isinstance(self.prompt, str) else assistant(whole)


@dataclass(slots=True)
class Query:
    """A prompt to be answered by the policy; `columns` are the row's own columns, for rewards."""

    prompt: Content
    row: Row
    columns: dict[str, Any] = field(default_factory=dict)


Example = Demonstration | Preference | Feedback | Ranking | Rating | Steps | Query


def is_empty(content: Content) -> bool:
    if isinstance(content, str):
        return not content.strip()
    return not content or not any(m["content"].strip() or calls(m) for m in content)


def calls(message: Message) -> Any:
    """The tool calls of a turn, in either field; empty where it makes none."""
    return message.get("tool_calls") or message.get("function_call")


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def same_form(prompt: Content, *answers: Content) -> tuple[Content, list[Content]]:
    """Prompt and answers as one type: all text, or, where any of them is a conversation, all turns."""
    if all(isinstance(c, str) for c in (prompt, *answers)):
        return prompt, list(answers)
    turns = user(prompt) if isinstance(prompt, str) else prompt
    return turns, [assistant(a) if isinstance(a, str) else a for a in answers]


def preference(
    row: Row,
    prompt: Content,
    chosen: Content,
    rejected: Content,
    margin: float | None = None,
    agreement: float = 1.0,
    weight: float = 1.0,
    votes: tuple[float, ...] = (),
    chosen_from_reference: bool | None = None,
) -> Preference:
    """A checked pair: nothing empty, the answers not equal."""
    prompt, (chosen, rejected) = same_form(prompt, chosen, rejected)
    if is_empty(prompt):
        raise row.fault("empty prompt", "the prompt is empty", "prompt")
    for column, answer in (("chosen", chosen), ("rejected", rejected)):
        if is_empty(answer):
            raise row.fault("empty completion", "the answer is empty", column)
    if _bare(chosen) == _bare(rejected):
        raise row.fault("chosen equals rejected", "the chosen answer equals the rejected one", "chosen")
    return Preference(prompt, chosen, rejected, row, margin, agreement, weight, votes, chosen_from_reference)


def checked_answer(
    row: Row, prompt: Content, completion: Content, column: str = "completion"
) -> tuple[Content, Content]:
    """A checked prompt and completion, as one type, neither empty."""
    prompt, (completion,) = same_form(prompt, completion)
    if is_empty(prompt):
        raise row.fault("empty prompt", "the prompt is empty", "prompt")
    if is_empty(completion):
        raise row.fault("empty completion", "the completion is empty", column)
    return prompt, completion


def ranking(row: Row, prompt: Content, completions: list[Content], ranks: list[float]) -> Ranking:
    """A checked ranking: two items at least, as many ranks, all finite, nothing empty."""
    prompt, completions = same_form(prompt, *completions)
    if is_empty(prompt):
        raise row.fault("empty prompt", "the prompt is empty", "prompt")
    if len(completions) != len(ranks):
        raise row.fault("wrong number of ranks", f"{len(completions)} responses but {len(ranks)} ranks", "ranks")
    if len(completions) < 2:
        raise row.fault("single-item ranking", "a ranking needs two responses at least", "responses")
    if any(is_empty(c) for c in completions):
        raise row.fault("empty completion", "one of the responses is empty", "responses")
    if any(not math.isfinite(r) for r in ranks):
        raise row.fault("rank not finite", f"ranks must be finite numbers, not {ranks}", "ranks")
    for i, j in combinations(range(len(ranks)), 2):
        if ranks[i] != ranks[j] and _bare(completions[i]) == _bare(completions[j]):
            raise row.fault(
                "equal responses", f"responses {i + 1} and {j + 1} are the same text under two ranks", "responses"
            )
    return Ranking(prompt, completions, ranks, row)


def answers(example: Example) -> list[Content]:
    """The answers of an example, in order."""
    match example:
        case Preference():
            return [example.chosen, example.rejected, *([] if example.gold is None else [example.gold])]
        case Ranking():
            return example.completions
        case Demonstration() | Feedback() | Rating() | Steps():
            return [example.completion]
        case Query():
            return []


def compares_two(example: Example) -> bool:
    """True for a pair, which says nothing where its answers are the same."""
    return isinstance(example, Preference)


def has_ties(example: Example) -> bool:
    """True for a ranking with repeated ranks and for a pair on which the raters are split evenly."""
    if isinstance(example, Ranking):
        return len(set(example.ranks)) < len(example.ranks)
    return isinstance(example, Preference) and example.agreement == 0.5


def pairs(example: Ranking) -> list[Preference]:
    """All pairs of a ranking, better over worse; ties make no pair, nor do equal texts."""
    out = []
    order = sorted(range(len(example.ranks)), key=lambda i: example.ranks[i])
    for i, j in combinations(order, 2):
        better, worse = example.completions[i], example.completions[j]
        if example.ranks[i] < example.ranks[j] and _bare(better) != _bare(worse):
            out.append(Preference(example.prompt, better, worse, example.row))
    return out


def _bare(content: Content) -> Any:
    return content.strip() if isinstance(content, str) else [{**m, "content": m["content"].strip()} for m in content]
