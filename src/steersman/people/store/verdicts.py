"""What a verdict of each task holds, checked before it is stored.

    thumb    {"up": bool, "reasons": [text], "correction": text}     the last two where given
    compare  {"choice": 0 or 1} | {"choice": "tie"} | {"choice": "both_bad"}
    rank     {"ranks": [rank of each answer]}                        from 0, the best; equal ranks are ties
    rate     {"scores": {attribute: 1 .. number of its anchors}}
    mark     {"spans": [{"start": int, "end": int, "label": text}]}  characters of the answer; none: nothing to mark
    review   {"accept": bool, "correction": text}
    any      {"skip": reason}

Answers go by their number in the item, never by the side on which they were shown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

from steersman.guards.untrusted import LONE_SURROGATE
from steersman.types import SteersmanError

TASKS = ("compare", "rank", "rate", "mark", "review")
"""What a queue may ask; `thumb` is given in chats."""
LONGEST_TEXT = 50_000
"""Characters of a correction."""
MOST_SPANS = 500

Verdict = dict[str, Any]


def checked(task: str, verdict: Any, answers: list[str], settings: dict[str, Any]) -> Verdict:
    """The verdict with what it may hold and nothing else; raises SteersmanError where it is none of the task's."""
    if not isinstance(verdict, dict):
        raise SteersmanError(f"{task}: a verdict is an object")
    if "skip" in verdict:
        return {"skip": _text(verdict["skip"], "skip")[:500]}
    return _CHECKS[task](verdict, answers, settings)


def agrees(task: str, gold: Verdict, verdict: Verdict) -> bool:
    """Whether a verdict is the known one; of ratings and spans, whether each is within one step or overlaps."""
    if "skip" in verdict:
        return False
    if task == "rate":
        return all(abs(verdict["scores"].get(name, -9) - score) <= 1 for name, score in gold["scores"].items())
    if task == "mark":
        return len(gold["spans"]) == len(verdict["spans"]) and all(
            any(_overlap(a, b) for b in verdict["spans"]) for a in gold["spans"]
        )
    key = {"compare": "choice", "rank": "ranks", "review": "accept", "thumb": "up"}[task]
    return verdict[key] == gold[key]


def _overlap(a: Verdict, b: Verdict) -> bool:
    return a["start"] < b["end"] and b["start"] < a["end"] and a["label"] == b["label"]


def _thumb(verdict: Verdict, answers: list[str], settings: dict[str, Any]) -> Verdict:
    out: Verdict = {"up": _bool(verdict, "up")}
    reasons = verdict.get("reasons") or []
    if not isinstance(reasons, list) or len(reasons) > 20:
        raise SteersmanError("thumb: reasons must be a short list")
    if reasons:
        out["reasons"] = [_text(r, "reasons")[:500] for r in reasons]
    return out | _correction(verdict)


def _compare(verdict: Verdict, answers: list[str], settings: dict[str, Any]) -> Verdict:
    choice = verdict.get("choice")
    if isinstance(choice, bool) or choice not in (0, 1, "tie", "both_bad"):
        raise SteersmanError("compare: choice must be 0, 1, tie or both_bad")
    return {"choice": choice}


def _rank(verdict: Verdict, answers: list[str], settings: dict[str, Any]) -> Verdict:
    ranks = verdict.get("ranks")
    if not isinstance(ranks, list) or len(ranks) != len(answers) or not all(_is_int(r) for r in ranks):
        raise SteersmanError(f"rank: every one of the {len(answers)} answers needs a rank")
    order = sorted(set(ranks))  # 1, 1, 3 and 0, 0, 1 say the same
    return {"ranks": [order.index(r) for r in ranks]}


def _rate(verdict: Verdict, answers: list[str], settings: dict[str, Any]) -> Verdict:
    scores, anchors = verdict.get("scores"), settings["attributes"]
    if not isinstance(scores, dict) or set(scores) != set(anchors):
        raise SteersmanError(f"rate: every attribute needs a score: {', '.join(anchors)}")
    for name, score in scores.items():
        if not _is_int(score) or not 1 <= score <= len(anchors[name]):
            raise SteersmanError(f"rate: {name} must be a whole number from 1 to {len(anchors[name])}")
    return {"scores": {name: scores[name] for name in anchors}}


def _mark(verdict: Verdict, answers: list[str], settings: dict[str, Any]) -> Verdict:
    spans, labels = verdict.get("spans"), settings["labels"]
    if not isinstance(spans, list) or len(spans) > MOST_SPANS:
        raise SteersmanError(f"mark: spans must be a list of at most {MOST_SPANS}")
    out = []
    for span in spans:
        if not isinstance(span, dict):
            raise SteersmanError("mark: a span is an object with start, end and label")
        start, end, label = span.get("start"), span.get("end"), span.get("label")
        if not (_is_int(start) and _is_int(end) and 0 <= start < end <= len(answers[0])):
            raise SteersmanError(f"mark: a span needs 0 <= start < end <= {len(answers[0])}")
        if label not in labels:
            raise SteersmanError(f"mark: a span's label must be one of {', '.join(labels)}")
        out.append({"start": start, "end": end, "label": label})
    return {"spans": sorted(out, key=lambda s: (s["start"], s["end"]))}


def _review(verdict: Verdict, answers: list[str], settings: dict[str, Any]) -> Verdict:
    return {"accept": _bool(verdict, "accept")} | _correction(verdict)


def _correction(verdict: Verdict) -> Verdict:
    text = _text(verdict.get("correction") or "", "correction")
    if len(text) > LONGEST_TEXT:
        raise SteersmanError(f"correction: {len(text):,} characters; {LONGEST_TEXT:,} are the most")
    return {"correction": text} if text.strip() else {}


def _bool(verdict: Verdict, key: str) -> bool:
    if not isinstance(verdict.get(key), bool):
        raise SteersmanError(f"{key} must be true or false")
    return verdict[key]


def _is_int(got: Any) -> TypeGuard[int]:
    return isinstance(got, int) and not isinstance(got, bool) and abs(got) < 1 << 31


def _text(got: Any, key: str) -> str:
    if not isinstance(got, str):
        raise SteersmanError(f"{key} must be text")
    return storable(got)


def storable(text: str) -> str:
    """The text without what a database does not take: NUL, and halves of surrogate pairs (as U+FFFD)."""
    odd = "\0" in text or LONE_SURROGATE.search(text)
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8") if odd else text


_CHECKS: dict[str, Callable[[Verdict, list[str], dict[str, Any]], Verdict]] = {
    "thumb": _thumb, "compare": _compare, "rank": _rank, "rate": _rate, "mark": _mark, "review": _review,
}  # fmt: skip
