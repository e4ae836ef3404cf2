"""Formats that single data sets made known: transcripts, trees, votes, and judgements kept by file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from steersman.data import fields as f
from steersman.data.examples import (
    Content,
    Feedback,
    Message,
    Preference,
    Ranking,
    Rating,
    assistant,
    is_empty,
    preference,
    ranking,
)
from steersman.data.formats import CONVENTIONAL
from steersman.data.rows import BadRows, Row, RowError
from steersman.data.shapes import Format

_SPEAKERS = {"user": "user", "agent": "assistant", "api": "tool"}
_RATED = re.compile(r"[^\t\n]+\t-?\d+(\.\d+)?\t[^\t\n]+$")
_BREAK = re.compile(r"<br\s*/?>")
_TURN = re.compile(r"\n\n(Human|Assistant):")


def transcript(row: Row, column: str) -> tuple[list[Message], str]:
    """A "\\n\\nHuman: ...\\n\\nAssistant: ..." transcript as (turns before the last reply, the last reply)."""
    whole = f.text(row, column)
    pieces = _TURN.split(whole if whole.startswith("\n\n") else "\n\n" + whole)
    turns: list[Message] = [
        {"role": f.ROLES[role.lower()], "content": body.strip()}
        for role, body in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if pieces[0].strip() or len(turns) < 2:
        raise row.fault("no transcript", 'the text is no transcript of "Human:" and "Assistant:" turns', column)
    if turns[-1]["role"] != "assistant":
        raise row.fault("no reply at the end", "the transcript does not end with the assistant's reply", column)
    return turns[:-1], turns[-1]["content"]


def _transcript_pair(row: Row) -> Preference:
    prompt, chosen = transcript(row, "chosen")
    other, rejected = transcript(row, "rejected")
    if prompt != other:
        raise row.fault(
            "transcripts differ before the last reply",
            "chosen and rejected must share everything up to the last reply; these part earlier",
            "chosen",
        )
    return preference(row, f.with_system(row, prompt), chosen, rejected)


def prompt_of_file(file: str) -> str:
    """The debate that a ukp_convarg1 file is about: "topic_side" in words."""
    topic, _, side = Path(file).name.removesuffix(".gz").rsplit(".", 1)[0].partition("_")
    return f"{topic.strip('-').replace('-', ' ')}: {side.strip('-').replace('-', ' ')}"


def _argument(row: Row, column: str) -> str:
    return "\n".join(line.strip() for line in _BREAK.split(f.text(row, column))).strip()


def _debate_pair(row: Row) -> Preference:
    better = f.text(row, "label")
    if better not in ("a1", "a2"):
        raise row.fault("wrong type", f"must be a1 or a2, not {better[:40]!r}", "label")
    worse = "a2" if better == "a1" else "a1"
    row.names = row.names | {"chosen": better, "rejected": worse}
    return preference(row, prompt_of_file(row.file), _argument(row, better), _argument(row, worse))


def _debate_rankings(rows: Iterable[Row], bad: BadRows) -> Iterable[Row]:
    """One row per file, with all of its arguments; of an argument given twice, the first place counts."""
    by_file: dict[str, Row] = {}
    for row in rows:
        whole = by_file.setdefault(row.file, Row({"items": []}, row.file, 1, "line"))
        if row.data["argument"] in (item.data["argument"] for item in whole.data["items"]):
            bad.note("answer given twice", row.where("argument"))
        else:
            whole.data["items"].append(row)
    return by_file.values()


def _debate_ranking(row: Row) -> Ranking:
    items: list[Row] = row.data["items"]
    answers: list[Content] = [_argument(item, "argument") for item in items]
    return ranking(row, prompt_of_file(row.file), answers, [f.number(item, "rank") for item in items])


def _voted_pair(row: Row) -> Preference:
    """Answers with the votes of several raters: 1 or 2 names the better one, 0 is a tie."""
    votes = {c: f.number(row, c) for c in row.data if c.startswith("annotator")}
    for column, vote in votes.items():
        if vote not in (0, 1, 2):
            raise row.fault("out of range", f"a vote must be 1, 2 or 0 for a tie, not {vote:g}", column)
    cast = tuple({1: 1.0, 2: 0.0, 0: 0.5}[int(v)] for v in votes.values())
    share = sum(cast) / len(cast)
    first, second = f.text(row, "response1"), f.text(row, "response2")
    prompt = f.instruction(row)
    columns = ("response1", "response2")
    if share < 0.5:
        first, second, columns, share = second, first, columns[::-1], 1 - share
        cast = tuple(1 - v for v in cast)
    row.names = row.names | dict(zip(("chosen", "rejected"), columns, strict=True))
    return preference(row, prompt, first, second, agreement=share, votes=cast)


def _tree_rankings(rows: Iterable[Row], bad: BadRows) -> Iterable[Row]:
    """One row for every message with ranked replies, the path to it as the prompt."""
    for row in rows:
        try:
            yield from list(_branch(row, f.value(row, "prompt"), []))
        except RowError as error:
            bad.add(error)


def _branch(row: Row, node: dict[str, Any], path: list[Message]) -> Iterable[Row]:
    path = [*path, f.turn(row, "prompt", node, None, len(path))]
    replies = node.get("replies") or []
    ranked = [r for r in replies if r.get("rank") is not None and f.ROLES.get(r.get("role")) == "assistant"]
    if len(ranked) > 1:
        data = {"prompt": path, "responses": [r.get("text") for r in ranked], "ranks": [r["rank"] for r in ranked]}
        yield Row(data, row.file, row.number, row.unit)
    for reply in replies:
        if str(reply.get("text") or "").strip():
            yield from _branch(row, reply, path)


def _tree_ranking(row: Row) -> Ranking:
    for answer in row.data["responses"]:
        if not isinstance(answer, str) or not answer.strip():
            raise row.fault("empty completion", "a reply in the tree has no text", "prompt")
    return ranking(row, row.data["prompt"], row.data["responses"], row.data["ranks"])


def _rewarded_turn(row: Row) -> Feedback:
    """A dialogue and one generated agent turn, both as JSON text, with a reward of 0 or 1."""
    context = f.json_text(row, "context")
    if not isinstance(context, list) or not context:
        raise row.fault("empty prompt", "the dialogue has no turn", "context")
    prompt = [_agent_turn(row, "context", t) for t in context]
    reply = _agent_turn(row, "generation", f.json_text(row, "generation"))["content"]
    if is_empty(reply):
        raise row.fault("empty completion", "the generated turn is empty", "generation")
    return Feedback(prompt, assistant(reply), f.label(row, "reward"), row)


def _agent_turn(row: Row, column: str, item: Any) -> Message:

    if not isinstance(item, dict) or item.get("role") not in _SPEAKERS:
        raise row.fault("unknown role", f"every turn must have a role among {', '.join(_SPEAKERS)}", column)
    if "text" in item:
        body = str(item["text"])
    else:  # an API call or its response, shown to the model as JSON
        body = json.dumps({k: v for k, v in item.items() if k != "role"}, ensure_ascii=False)
    return {"role": _SPEAKERS[item["role"]], "content": body}


def _rated_line(row: Row) -> Rating:
    """`name <tab> mean rating <tab> text`: lines of vaderSentiment's ground truth."""
    pieces = f.text(row, "text").split("\t")
    if len(pieces) != 3:
        raise row.fault("wrong number of fields", f"{len(pieces)} fields between tabs, expected 3", "text")
    if is_empty(pieces[2]):
        raise row.fault("empty completion", "the text is empty", "text")
    row.data = row.data | {"id": pieces[0]}
    return Rating("", pieces[2], {"rating": f.number(row, "text", pieces[1])}, row)


def _is_transcripts(seen: dict[str, Any]) -> bool:
    whole = [seen.get("chosen"), seen.get("rejected")]
    return "prompt" not in seen and all(isinstance(t, str) and "\n\nAssistant:" in t for t in whole)


FORMATS = [
    Format("debate pairs", "preference", "argument pairs: a1, a2, the more convincing; the prompt is the file name",
           lambda s: {"label", "a1", "a2"} <= s.keys(), _debate_pair),
    Format("debate rankings", "ranking", "ranked arguments, one ranking per file; the prompt is the file name",
           lambda s: {"#id", "rank", "argument"} <= s.keys(), _debate_ranking, regroup=_debate_rankings),
    Format("voted pairs", "preference", "two responses to an instruction with the votes of several raters",
           lambda s: {"instruction", "response1", "response2", "annotator1"} <= s.keys(), _voted_pair),
    Format("trees", "ranking", "conversation trees with ranked replies",
           lambda s: isinstance(s.get("prompt"), dict) and "replies" in s["prompt"],
           _tree_ranking, regroup=_tree_rankings),
    Format("rated lines", "rating", "lines of a name, a rating and a text, with tabs between them",
           lambda s: isinstance(s.get("text"), str) and bool(_RATED.match(s["text"])), _rated_line),
    Format("rewarded turns", "feedback", "dialogue turns with a reward of 0 or 1",
           lambda s: {"context", "generation", "reward"} <= s.keys(), _rewarded_turn),
    Format("transcripts", "preference",
           'pairs of "Human:" and "Assistant:" transcripts; the prompt is all before the last reply',
           _is_transcripts, _transcript_pair),
    *CONVENTIONAL,
]  # fmt: skip
"""All formats, the particular before the conventional; the first that fits is taken."""
