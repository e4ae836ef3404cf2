"""`steersman judge`: a judge as label maker. Pairs or answers in, a labelled file out (RLAIF, arXiv 2212.08073).

prompt with two answers        -> prompt, chosen, rejected, agreement       (compared, in both orders)
prompt with responses          -> prompt, responses, ranks, grades          (each graded)
prompt with completion         -> prompt, completion, grade                 (graded)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from pydantic import Field

from steersman.config.sections import Section, key_names
from steersman.data import ROWS_TO_EXAMPLES, ROWS_TO_TOKENS, BadRows, DataConfig, Row, RowError, section_rows
from steersman.data import fields as f
from steersman.data.examples import Content, Preference, is_empty, same_form
from steersman.data.shapes import examples, recognise
from steersman.data.sources import FORMATS
from steersman.judge import Judge, JudgeConfig, open_judge
from steersman.judge.scored import as_text
from steersman.run.files.ledger import Ledger, Rows
from steersman.run.run_config import STEPS_ONLY, RunConfig
from steersman.types import SteersmanError

PAIRS = (("chosen", "rejected"), ("first", "second"), ("response1", "response2"))
"""Columns that hold two answers to compare; those of the first that the row has are taken."""


class LabelRecipe(Section):
    """Labels for a file of pairs, of several answers a prompt, or of single answers."""

    data: DataConfig
    judge: JudgeConfig
    ties: Literal["drop", "keep"] = Field(
        default="drop", description="tied pairs. drop: leave out; keep: with agreement 0.5"
    )
    run: RunConfig = RunConfig()

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return key_names(data=(*ROWS_TO_EXAMPLES, *ROWS_TO_TOKENS), run=("micro_tokens", *STEPS_ONLY))


@dataclass(slots=True)
class LabelItem:
    """A row to be judged; `pair` says that its two answers are compared, else all are graded."""

    prompt: Content
    answers: list[Content]
    pair: bool
    row: Row

    def texts(self) -> list[str]:
        """The answers as the judge reads them: one reply by its words, several turns by who said them."""
        return [
            str(answer[0]["content"]) if not isinstance(answer, str) and len(answer) == 1 else as_text(answer)
            for answer in self.answers
        ]


def run(recipe: LabelRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Leaves labelled.jsonl in the run folder, and returns the summary."""
    with Ledger("judge", recipe, resume=resume, rounds=0) as ledger:
        judge = open_judge(recipe.judge, ledger.path, stopping=lambda: bool(ledger.signal), device=ledger.device)
        left_out = BadRows(recipe.data.on_bad_row)
        asked = list(_asked(recipe.data, left_out))
        if not asked:
            raise SteersmanError(f"{recipe.data.path}: no row to judge ({left_out.sentence})")
        about = recipe.judge.model_dump(mode="json", exclude_defaults=True, exclude={"endpoint": {"key_env", "url"}})
        # Asked anew by a resumed run too: the replies are in the cache, and the counts are the same.
        rows = _labelled(recipe, judge, asked)
        ledger.table("labelled", lambda: rows, judge=about, made_from=recipe.data.path)
        if not rows:
            raise SteersmanError(f"{recipe.data.path}: {_none_labelled(judge, len(asked))}")
        if left_out.counts:
            ledger.log.note(left_out.sentence)
        for item in _failed(judge, asked):
            ledger.log.note(f"{item.row.file} row {item.row.number}: not labelled, for a question on it got no reply")
        stats = {"data/asked": len(asked), "data/labelled": len(rows), **judge.stats()}
        decided = [r for r in rows if r.get("agreement") == 1.0]
        if decided and all("chosen" in a.row.data for a in asked):
            stats["judge/agrees_with_data"] = sum(r["chosen_was"] == "chosen" for r in decided) / len(decided)
        ledger.finish_round(0, stats, [])
        return ledger.summary({"labelled": str(ledger.path / "labelled.jsonl"), **stats})
    return ledger.summary({})


def _asked(config: DataConfig, left_out: BadRows) -> Iterator[LabelItem]:
    for count, row in enumerate(section_rows(config, left_out)):
        if config.limit is not None and count >= config.limit:
            return
        row.data = row.data | {name: row.data[own] for name, own in config.columns.items() if own in row.data}
        row.names = row.names | config.columns
        try:
            yield _one(row)
        except RowError as error:
            left_out.add(error)


def _one(row: Row) -> LabelItem:
    columns = next((p for p in PAIRS if p[0] in row.data and p[1] in row.data), None)
    if columns is not None:
        return _pair(row, columns)
    prompt = f.instruction(row) if "instruction" in row.data else f.prompt(row)
    several = "responses" in row.data
    if several:
        given = [x if isinstance(x, str) else f.turns(row, "responses", x) for x in f.listing(row, "responses")]
    else:
        given = [f.content(row, "completion")]
    prompt, answers = same_form(prompt, *given)
    if any(is_empty(answer) for answer in answers):
        raise row.fault("empty completion", "an answer is empty", "responses" if several else "completion")
    if several and len(answers) < 2:
        raise row.fault("single-item ranking", "a ranking needs two responses at least", "responses")
    return LabelItem(prompt, answers, False, row)


def _pair(row: Row, columns: tuple[str, str]) -> LabelItem:
    """Two answers, in any shape that pairs to train on may have."""
    named = dict(zip(PAIRS[0], columns, strict=True))
    read = replace(
        row,
        data={c: x for c, x in row.data.items() if c not in columns} | {c: row.data[own] for c, own in named.items()},
        names=row.names | {c: row.names.get(own, own) for c, own in named.items()},
    )
    shape = recognise([read], "preference", [form for form in FORMATS if form.regroup is None])
    (example,) = cast(Sequence[Preference], examples(shape, read))
    return LabelItem(example.prompt, [example.chosen, example.rejected], True, row)


def _labelled(recipe: LabelRecipe, judge: Judge, asked: list[LabelItem]) -> Rows:
    pairs = [a for a in asked if a.pair]
    compared = judge.compare([(a.prompt, *a.texts()) for a in pairs], [a.row.data for a in pairs])  # type: ignore
    singles = [(a, answer) for a in asked if not a.pair for answer in a.texts()]
    graded = iter(judge.grade([(a.prompt, x) for a, x in singles], [a.row.data for a, _ in singles]))
    told: dict[int, dict[str, Any]] = {}
    for a, outcome in zip(pairs, compared, strict=True):
        if outcome is not None and (outcome.share != 0.5 or recipe.ties == "keep"):
            first = outcome.share >= 0.5
            names = next(p for p in PAIRS if p[0] in a.row.data and p[1] in a.row.data)
            told[id(a)] = {
                "prompt": a.prompt, "chosen": a.answers[not first], "rejected": a.answers[first],
                "agreement": 0.5 if outcome.share == 0.5 else 1.0, "chosen_was": names[not first],
                "consistent": outcome.consistent,
            }  # fmt: skip
    for a in asked:
        if a.pair:
            continue
        grades = [next(graded) for _ in a.answers]
        if "responses" not in a.row.data and grades[0] is not None:
            told[id(a)] = {"prompt": a.prompt, "completion": a.answers[0], "grade": grades[0]}
        elif "responses" in a.row.data and None not in grades:
            ranks = [sum(other > g for other in grades if other is not None) for g in grades if g is not None]
            told[id(a)] = {"prompt": a.prompt, "responses": a.answers, "ranks": ranks, "grades": grades}
    return [told[id(a)] | {"file": a.row.file, "row": a.row.number} for a in asked if id(a) in told]


def _failed(judge: Judge, asked: list[LabelItem]) -> list[LabelItem]:
    """The rows with a question that got no reply."""
    failed = {(q.prompt, q.first) for q in judge.failed}
    return [a for a in asked if any((as_text(a.prompt), text) in failed for text in a.texts())]


def _none_labelled(judge: Judge, asked: int) -> str:
    """What the judge said of so many rows that none of them got a label."""
    counts = judge.counts
    told = {
        "replies without a verdict or grade": counts["unparsable"],
        "questions without a reply": counts["failed"],
        "questions that were not asked": counts["unjudged"],
        "pairs on which it said the other thing in the other order": counts["contradictions"],
        "ties (ties: keep labels them)": counts["ties"] - counts["contradictions"],
    }
    why = ", ".join(f"{count} {what}" for what, count in told.items() if count)
    where = f"; its replies are in {judge.cache.path}" if judge.cache.path else ""
    return f"the judge labelled none of {asked} rows: {why}{where}"
