"""Judgements -> rows that `sft`, `kto`, `dpo` and `reward` read, mixed with older ones at stated shares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from steersman.config.sections import Section
from steersman.people.filters import item_key, prompt_key, shares
from steersman.people.judgements import Judgement
from steersman.types import SteersmanError

Rows = list[dict[str, Any]]
Kind = Literal["sft", "kto", "pairs"]


class MixConfig(Section):
    """Shares of what a turn trains on; they are of rows, and what is missing is not made up by copies."""

    new: float = Field(default=0.7, gt=0, le=1, description="share of this turn's judgements; all of them are used")
    earlier: float = Field(default=0.3, ge=0, lt=1, description="share of earlier turns' judgements")
    anchor: float = Field(default=0.0, ge=0, lt=1, description="share of rows of your own files, in `anchors`")
    anchors: dict[Kind, str] = Field(
        default_factory=dict, description="sft, kto, pairs: file in the shape of that table, such as general chats"
    )


def lessons(rows: Sequence[Judgement], kind: Kind) -> Rows:
    """The rows of one kind, each with the ids of the judgements that it comes from.

    sft    a correction, and an answer with a thumb up, where most thumbs on it are up
    kto    thumbs; a chosen answer is up and the other down; of two bad ones both are down; a correction is up
    pairs  chosen and rejected with the raters' agreement, one an item; a correction against what it corrects
    """
    made = {"sft": _sft, "kto": _kto, "pairs": _pairs}[kind](rows)
    seen: dict[str, dict[str, Any]] = {}
    for row in made:
        seen.setdefault(json.dumps({k: v for k, v in row.items() if k != "judgements"}), row)
    return list(seen.values())


def _sft(rows: Sequence[Judgement]) -> Rows:
    share, out = shares(rows), list[dict[str, Any]]()
    for one in rows:
        answer = one.correction or (one.answers[0] if one.label and share[item_key(one)] > 0.5 else "")
        if answer.strip():
            out.append({"prompt": one.prompt, "completion": answer, "judgements": [one.id]})
    return out


def _kto(rows: Sequence[Judgement]) -> Rows:
    out: Rows = []
    for one in rows:
        labels = [(one.answers[0], one.label)] if one.choice is None else _sides(one)
        if one.correction.strip():
            labels = [*labels, (one.correction, True)]
        out += [
            {"prompt": one.prompt, "completion": answer, "label": label, "judgements": [one.id]}
            for answer, label in labels
            if answer.strip()
        ]
    return out


def _sides(one: Judgement) -> list[tuple[str, bool]]:
    if one.choice == "tie":
        return []
    up = {"first": (True, False), "second": (False, True)}.get(one.choice or "", (False, False))
    return list(zip(one.answers, up, strict=True))


def _pairs(rows: Sequence[Judgement]) -> Rows:
    share, by_item = shares(rows), dict[str, list[Judgement]]()
    for one in rows:
        if one.choice is not None and one.answers[0].strip() != one.answers[1].strip():
            by_item.setdefault(item_key(one), []).append(one)
    out: Rows = []
    for key, found in by_item.items():
        first, second = sorted(found[0].answers)
        won = share[key]
        if won != 0.5:
            chosen, rejected = (first, second) if won > 0.5 else (second, first)
            ids = [one.id for one in found]
            agreement = max(won, 1 - won)
            out.append(_pair(found[0], chosen, rejected, agreement, ids))
    for one in rows:
        if one.correction.strip():
            worse = one.answers[1] if one.choice == "second" else one.answers[0]
            if worse.strip() != one.correction.strip():
                out.append(_pair(one, one.correction, worse, 1.0, [one.id]))
    return [row for row in out if row["chosen"].strip() and row["rejected"].strip()]


def _pair(one: Judgement, chosen: str, rejected: str, agreement: float, ids: list[str]) -> dict[str, Any]:
    told = {"prompt": one.prompt, "chosen": chosen, "rejected": rejected, "agreement": agreement}
    return told | {"judgements": ids}


def mix_rows(new: Rows, earlier: Rows, anchor: Rows, config: MixConfig, seed: int) -> Rows:
    """All new rows with as many of the others as the shares say, drawn by a hash; each row says its `source`."""
    if config.anchor and not anchor:
        raise SteersmanError("mix.anchor is above 0, but mix.anchors names no file with rows for what is trained")
    out = [{**row, "source": "new"} for row in new]
    for source, rows, share in (("earlier", earlier, config.earlier), ("anchor", anchor, config.anchor)):
        count = round(len(new) * share / config.new)
        drawn = sorted(rows, key=lambda row: _draw(row, seed))[:count]
        out += [{**row, "source": source} for row in drawn]
    return sorted(out, key=lambda row: _draw(row, seed))


def is_held_out(one: Judgement, share: float) -> bool:
    """Whether a judgement is never learned from: by its prompt alone, so that a prompt stays on its side for ever."""
    digest = hashlib.sha256(prompt_key(one.prompt).encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _draw(row: dict[str, Any], seed: int) -> str:
    text = json.dumps([seed, {k: v for k, v in row.items() if k != "source"}], ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
