"""Which judgements may teach: not those of whoever did not read, and not those on which people disagree."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from pydantic import Field

from steersman.config.sections import Section
from steersman.data.examples import Content
from steersman.people.judgements import Judgement


class FilterConfig(Section):
    """When a judgement is left out, and when a rater is."""

    fastest: float = Field(
        default=0.5,
        ge=0,
        description="leave out judgements made in fewer seconds than this, too fast to have been read; 0: none",
    )
    gold_share: float = Field(
        default=0.7, ge=0, le=1, description="a rater with a smaller share of gold items right is left out"
    )
    gold_least: int = Field(
        default=3, ge=1, description="`gold_share` applies to raters of at least this many gold items"
    )
    one_sided: float = Field(
        default=0.95, gt=0.5, le=1, description="a rater who pressed the same side (or tie) more often is left out"
    )
    one_sided_least: int = Field(
        default=20, ge=2, description="`one_sided` applies to raters of at least this many choices"
    )
    agreement: float = Field(
        default=0.6, ge=0.5, le=1, description="items of several raters with a smaller majority are left out"
    )


def sift(rows: Sequence[Judgement], config: FilterConfig) -> tuple[list[Judgement], list[tuple[Judgement, str]]]:
    """The judgements that may teach, and the others each with its reason; order is kept.

    Gold items measure raters and teach nothing. Of one rater's judgements of one item the last counts. The end of an
    answer that the length limit cut is none to be learned: only a thumb down for it counts, with its correction.
    """
    bad = dict(_raters(rows, config))
    last = {(one.user, item_key(one)): one.id for one in rows}
    kept, left_out = list[Judgement](), list[tuple[Judgement, str]]()
    for one in rows:
        reason = bad.get(one.user)
        if one.expected is not None:
            reason = "gold item"
        elif reason is None and last[one.user, item_key(one)] != one.id:
            reason = "judged again later"
        elif reason is None and one.seconds is not None and one.seconds < config.fastest:
            reason = "too fast to have been read"
        elif reason is None and one.cut and (one.choice is not None or one.label):
            reason = "answer cut by the length limit"
        if reason is None:
            kept.append(one)
        else:
            left_out.append((one, reason))
    split = {key for key, share in shares(kept).items() if max(share, 1 - share) < config.agreement}
    several = Counter(item_key(one) for one in kept)
    left_out += [(one, "raters disagree") for one in kept if item_key(one) in split and several[item_key(one)] > 1]
    out = {id(one) for one, _ in left_out}
    return [one for one in kept if id(one) not in out], left_out


def _raters(rows: Iterable[Judgement], config: FilterConfig) -> Iterable[tuple[str, str]]:
    gold, pressed = defaultdict[str, list[bool]](list), defaultdict[str, Counter[str | None]](Counter)
    for one in rows:
        if one.expected is not None:
            gold[one.user].append(not one.gold_failed)
        elif one.choice is not None:
            pressed[one.user][one.side] += 1
    for user, said in pressed.items():
        n, most = said.total(), max((count for side, count in said.items() if side is not None), default=0)
        if n >= config.one_sided_least and most / n > config.one_sided:
            yield user, "rater always says the same"
    for user, right in gold.items():
        if len(right) >= config.gold_least and sum(right) / len(right) < config.gold_share:
            yield user, "rater failed gold items"


def item_key(one: Judgement) -> str:
    """The same for the same prompt with the same answers, whichever stood first."""
    return json.dumps([prompt_key(one.prompt), sorted(one.answers)], ensure_ascii=False)


def prompt_key(prompt: Content) -> str:
    """The same for the same prompt, as a text or as a chat of this one turn of the user's."""
    text = prompt if isinstance(prompt, str) else prompt[0]["content"]
    is_text = prompt in (text, [{"role": "user", "content": text}])
    return json.dumps(text if is_text else prompt, ensure_ascii=False)


def shares(rows: Iterable[Judgement]) -> dict[str, float]:
    """Of each item the mean share of its answer that sorts first (of a thumb, the share of thumbs up)."""
    found = defaultdict[str, list[float]](list)
    for one in rows:
        turned = one.choice is not None and one.answers[0] > one.answers[1]
        found[item_key(one)].append(1 - one.share if turned else one.share)
    return {key: sum(values) / len(values) for key, values in found.items()}
