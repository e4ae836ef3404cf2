"""The conventional formats: which columns each is known by, and how one of its rows becomes an example.

Formats of single data sets, which need more than one row or a parse, are in `sources.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard, cast

from steersman.data import fields as f
from steersman.data.examples import (
    Content,
    Demonstration,
    Example,
    Feedback,
    Message,
    Preference,
    Query,
    Ranking,
    Rating,
    Steps,
    assistant,
    checked_answer,
    is_empty,
    preference,
    ranking,
    same_form,
)
from steersman.data.rows import Row
from steersman.data.shapes import Format, Probe


def _text_row(row: Row) -> Demonstration:
    body = f.text(row, "text")
    if not body.strip():
        raise row.fault("empty completion", "the text is empty", "text")
    return Demonstration("", body, row)


def _completion_row(row: Row) -> Demonstration:
    prompt, completion = checked_answer(row, f.prompt(row), f.content(row, "completion"))
    return Demonstration(prompt, completion, row)


def _messages_row(column: str) -> Callable[[Row], Example]:
    return lambda row: Demonstration(*f.conversation(row, column), row)


def _open_query(row: Row) -> Query:
    """The conversation up to the reply that the policy is to give: trailing assistant turns are taken off."""
    column = "messages" if "messages" in row.data else "conversations"
    messages = list(f.with_system(row, f.turns(row, column, f.listing(row, column))))
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if is_empty(messages):
        raise row.fault("empty prompt", "nothing precedes the assistant's reply", column)
    return Query(messages, row, row.data)


def _alpaca_row(row: Row) -> Demonstration:
    output = f.text(row, "output")
    if not output.strip():
        raise row.fault("empty completion", "the output is empty", "output")
    return Demonstration(*f.from_first_reply(row, [*f.instruction(row), *assistant(output)], "output"), row)


def _instruction_query(row: Row) -> Query:
    return Query(f.instruction(row), row, row.data)


def _scored_pair(row: Row) -> tuple[float | None, float, float, tuple[float, ...], bool | None]:
    """margin, agreement, weight, votes and chosen_from_reference, where the row has them; the votes' mean is the
    agreement."""
    margin = f.optional_number(row, "margin")
    agreement = f.optional_number(row, "agreement")
    votes = ()
    if row.data.get("votes") is not None:
        votes = tuple(_share(row, "votes", f.number(row, "votes", v)) for v in f.listing(row, "votes"))
        if votes and agreement is None:
            agreement = sum(votes) / len(votes)
    agreement = 1.0 if agreement is None else _share(row, "agreement", agreement)
    known = row.data.get("chosen_from_reference") is not None
    return margin, agreement, _weight(row), votes, f.label(row, "chosen_from_reference") if known else None


def _weight(row: Row) -> float:
    weight = f.optional_number(row, "weight")
    if weight is not None and weight < 0:
        raise row.fault("out of range", f"must be at least 0, not {weight:g}", "weight")
    return 1.0 if weight is None else weight


def _share(row: Row, column: str, got: float) -> float:
    if not 0 <= got <= 1:
        raise row.fault("out of range", f"must lie between 0 and 1, not {got:g}", column)
    return got


def _pair_row(row: Row) -> Preference:
    chosen, rejected = (f.content(row, c) for c in ("chosen", "rejected"))
    if _whole(chosen) and _whole(rejected):
        return preference(row, *f.prompt_of_both(row, chosen, rejected), *_scored_pair(row))
    return preference(row, f.prompt(row), chosen, rejected, *_scored_pair(row))


def _whole(answer: Content) -> TypeGuard[list[Message]]:
    return not isinstance(answer, str) and answer[0]["role"] != "assistant"


def _conversation_pair_row(row: Row) -> Preference:
    chosen, rejected = (f.turns(row, c, f.listing(row, c)) for c in ("chosen", "rejected"))
    return preference(row, *f.common_prompt(row, chosen, rejected), *_scored_pair(row))


def _alpaca_pair_row(row: Row) -> Preference:
    return preference(row, f.instruction(row), f.text(row, "chosen"), f.text(row, "rejected"), *_scored_pair(row))


def _sharegpt_pair_row(row: Row) -> Preference:
    column = "conversations" if "conversations" in row.data else "messages"
    prompt = f.with_system(row, f.turns(row, column, f.listing(row, column)))
    return preference(row, prompt, f.content(row, "chosen"), f.content(row, "rejected"), *_scored_pair(row))


def _with_gold(pairs: Format) -> Format:
    """The same rows with an answer that is better than both, in the column `gold`."""

    def convert(row: Row) -> Example:
        pair, gold = cast(Preference, pairs.convert(row)), f.content(row, "gold")
        if is_empty(gold):
            raise row.fault("empty completion", "the answer is empty", "gold")
        if _whole(gold):
            raise row.fault("prompt in an answer", "give the reply alone, without the turns before it", "gold")
        prompt, (chosen, rejected, gold) = same_form(pair.prompt, pair.chosen, pair.rejected, gold)
        pair.prompt, pair.chosen, pair.rejected, pair.gold = prompt, chosen, rejected, gold
        return pair

    return Format(
        f"{pairs.name} with gold", "triple", f"{pairs.sentence}; with a gold answer",
        lambda seen: "gold" in seen and pairs.matches(seen), convert,
    )  # fmt: skip


def _label_row(row: Row) -> Feedback:
    prompt, completion = checked_answer(row, f.prompt(row), f.content(row, "completion"))
    return Feedback(prompt, completion, f.label(row, "label"), row, _weight(row))


def _chat_label_row(row: Row) -> Feedback:
    column = "messages" if "messages" in row.data else "conversations"
    return Feedback(*f.last_reply(row, column), f.label(row, "label"), row, _weight(row))


def _ranking_row(row: Row) -> Ranking:
    column = "responses" if "responses" in row.data else "completions"
    answers: list[Content] = []
    for answer in f.listing(row, column):
        if not isinstance(answer, str | list):
            raise row.fault(
                "wrong type", f"every response must be text or turns, not {type(answer).__name__}", column
            )
        answers.append(answer if isinstance(answer, str) else f.turns(row, column, answer))
    if "ranks" in row.data:
        ranks = [f.number(row, "ranks", r) for r in f.listing(row, "ranks")]
    else:
        ranks = [-f.number(row, "scores", s) for s in f.listing(row, "scores")]
    return ranking(row, f.prompt(row), answers, ranks)


def _rating_row(row: Row) -> Rating:
    if "prompt" in row.data:
        prompt, completion = checked_answer(row, f.prompt(row), f.content(row, "completion"))
    else:
        prompt, completion = "", _text_row(row).completion
    got = row.data.get("scores")
    if isinstance(got, dict):
        scores = {name: f.number(row, name, s) for name, s in got.items() if s is not None and s != ""}
        if not scores:
            raise row.fault("missing value", "the row rates no attribute", "scores")
    else:
        name = "score" if "score" in row.data else "rating"
        scores = {name: f.number(row, name)}
    return Rating(prompt, completion, scores, row)


def _steps_row(row: Row) -> Steps:
    column = "steps" if "steps" in row.data else "completions"
    steps, labels = f.listing(row, column), f.listing(row, "labels")
    for i, step in enumerate(steps):
        if not isinstance(step, str) or not step.strip():
            raise row.fault("empty step", f"step {i + 1} must be text that is not empty", column)
    if len(steps) != len(labels) or not steps:
        raise row.fault("wrong number of labels", f"{len(steps)} steps but {len(labels)} labels", "labels")
    shares = [_share(row, "labels", float(x) if isinstance(x, bool) else f.number(row, "labels", x)) for x in labels]
    return Steps(f.prompt(row), steps, shares, row)


def _query_row(row: Row) -> Query:
    return Query(f.prompt(row), row, row.data)


def _has(*columns: str) -> Callable[[Probe], bool]:
    return lambda seen: all(c in seen for c in columns)


def _has_score(seen: Probe) -> bool:
    scored = isinstance(seen.get("scores"), dict) or "score" in seen or "rating" in seen
    return scored and ({"prompt", "completion"} <= seen.keys() or ("text" in seen and "prompt" not in seen))


def _has_turns(seen: Probe, *columns: str) -> bool:
    return any(isinstance(seen.get(c), list) for c in columns)


CONVENTIONAL = [
    Format("steps", "steps", "answers in steps with a label for each: prompt, steps, labels",
           lambda s: "prompt" in s and _has_turns(s, "labels") and _has_turns(s, "steps", "completions"),
           _steps_row),
    Format("rankings", "ranking", "rankings: prompt, responses, ranks or scores",
           lambda s: "prompt" in s and _has_turns(s, "responses", "completions") and ("ranks" in s or "scores" in s),
           _ranking_row),
    Format("alpaca pairs", "preference", "Alpaca rows with pairs: instruction, input, chosen, rejected",
           lambda s: _has("instruction", "chosen", "rejected")(s) and "prompt" not in s and "output" not in s,
           _alpaca_pair_row),
    Format("sharegpt pairs", "preference", "conversations with a chosen and a rejected reply",
           lambda s: _has("chosen", "rejected")(s) and _has_turns(s, "conversations", "messages")
           and "prompt" not in s,
           _sharegpt_pair_row),
    Format("pairs", "preference", "preference pairs: prompt, chosen, rejected",
           _has("prompt", "chosen", "rejected"), _pair_row),
    Format("conversation pairs", "preference",
           "pairs of whole conversations: chosen, rejected; the prompt is what they share",
           lambda s: isinstance(s.get("chosen"), list) and isinstance(s.get("rejected"), list),
           _conversation_pair_row),
    Format("chat feedback", "feedback", "thumbs up and down: messages, label",
           lambda s: _has_turns(s, "messages", "conversations") and "label" in s and f.is_label(s["label"]),
           _chat_label_row),
    Format("feedback", "feedback", "thumbs up and down: prompt, completion, label",
           lambda s: _has("prompt", "completion", "label")(s) and f.is_label(s["label"]), _label_row),
    Format("ratings", "rating", "ratings: prompt, completion (or text) and a number per attribute",
           _has_score, _rating_row),
    Format("messages", "demonstration", "conversations: messages with role and content",
           lambda s: _has_turns(s, "messages"), _messages_row("messages"), as_query=_open_query),
    Format("sharegpt messages", "demonstration", "ShareGPT conversations: from and value",
           lambda s: _has_turns(s, "conversations"), _messages_row("conversations"), as_query=_open_query),
    Format("alpaca", "demonstration", "Alpaca rows: instruction, input, output",
           lambda s: _has("instruction", "output")(s) and "prompt" not in s, _alpaca_row,
           as_query=_instruction_query),
    Format("alpaca pairs and outputs", "preference", "Alpaca rows with pairs: instruction, input, chosen, rejected",
           lambda s: _has("instruction", "chosen", "rejected")(s) and "prompt" not in s, _alpaca_pair_row),
    Format("prompt and completion", "demonstration", "prompt and completion",
           _has("prompt", "completion"), _completion_row),
    Format("prompts", "query", "prompts, the other columns kept for rewards", _has("prompt"), _query_row),
    Format("instructions", "query", "instructions to answer",
           lambda s: "instruction" in s and "prompt" not in s,
           _instruction_query),
    Format("text", "demonstration", "plain text", _has("text"), _text_row),
]  # fmt: skip
CONVENTIONAL += [_with_gold(pairs) for pairs in CONVENTIONAL if pairs.kind == "preference"]
