"""Look at runs: their numbers with links to the rows behind them, their tables, answers side by side over steps."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

from starlette.responses import Response

from steersman.people.collect.runs import SAMPLES, Run, beside, find_runs, matches, rewards
from steersman.people.collect.visit import Visit

PAGE = 50
SHOWN_STEPS = 60
"""Newest steps whose numbers are shown."""
TEXTS = ("completion", "chosen", "rejected", "answer", "output", "correction", "text")
MOST_COLUMNS = 6


def runs(visit: Visit) -> Response:
    """Every run with what it holds."""
    found = _runs(visit)
    rows = [(run, run.last_step()) for run in found.values()]
    return visit.page("look_runs.html", rows=rows, root=str(visit.site.runs or ""))


def run(visit: Visit) -> Response:
    """One run: numbers by step, each with a link to what it was counted from."""
    one = _run(visit, visit.arg("run"))
    if one is None:
        return visit.error_page("404", 404)
    sampled = set(one.sampled_steps()) if SAMPLES in one.tables else set[int]()
    metrics = one.metrics()
    shown = [row for row in metrics if len(row) > 2 or row.get("step") in sampled][-SHOWN_STEPS:]
    names = list(dict.fromkeys(k for row in shown for k in row if k not in ("step", "seconds")))
    table = [
        (name, [(row.get(name), one.behind(name, _whole(row.get("step")), sampled)) for row in shown])
        for name in names
    ]
    steps = [row.get("step") for row in shown]
    return visit.page("look_run.html", run=one, steps=steps, table=table, sampled=sorted(sampled))


def rows(visit: Visit) -> Response:
    """Rows of a table that hold the words, of one step where asked, by a reward where asked."""
    asked = visit.request.query_params
    one = _run(visit, visit.arg("run"))
    table, words, order = asked.get("table", SAMPLES), asked.get("q", "").strip()[:300], asked.get("order", "")
    if one is None or table not in one.tables:
        return visit.error_page("404", 404)
    step, first = asked.get("step", ""), max(_whole(asked.get("from", "")), 0)
    found = (row for row in one.rows(table) if matches(row, words) and (not step or str(row.get("step")) == step))
    if order:
        found = iter(sorted(found, key=lambda row: rewards(row).get(order, float("-inf"))))
    shown = list(islice(found, first, first + PAGE + 1))
    more = first + PAGE if len(shown) > PAGE else None
    return visit.page(
        "look_rows.html", run=one, table=table, rows=[_parts(row) for row in shown[:PAGE]], q=words,
        step=step, order=order, orders=sorted({name for row in shown for name in rewards(row)}), more=more,
    )  # fmt: skip


def side_by_side(visit: Visit) -> Response:
    """Held-out answers of one run or several to the same prompt, one column a step."""
    asked = visit.request.query_params
    found = _runs(visit)
    names = list(dict.fromkeys(name for name in asked.getlist("run") if name in found))
    chosen = [found[name] for name in names if SAMPLES in found[name].tables]
    columns, prompts = beside(chosen)
    wanted = [c for c in asked.getlist("column") if c in columns] or _ends(columns)
    words = asked.get("q", "").strip()[:300]
    shown = [
        (prompt, [(answers[c], rewards(answers[c])) if c in answers else None for c in wanted])
        for prompt, answers in prompts
        if matches({"prompt": prompt, "answers": list(answers.values())}, words)
    ]
    return visit.page(
        "look_beside.html", all_runs=[n for n, r in found.items() if SAMPLES in r.tables], names=names,
        columns=columns, wanted=wanted, prompts=shown[:PAGE], count=len(shown), q=words,
    )  # fmt: skip


def _ends(columns: list[str]) -> list[str]:
    """The first and last step of each run, at most MOST_COLUMNS."""
    by_run: dict[str, list[str]] = {}
    for column in columns:
        by_run.setdefault(column.rpartition(": ")[0], []).append(column)
    ends = [c for some in by_run.values() for c in dict.fromkeys((some[0], some[-1]))]
    return ends[:MOST_COLUMNS]


def _runs(visit: Visit) -> dict[str, Run]:
    return {} if visit.site.runs is None else find_runs(visit.site.runs)


def _run(visit: Visit, name: str) -> Run | None:
    return _runs(visit).get(name)


def _parts(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the page shows it: prompt, texts by name, and what is left."""
    prompt = row.get("prompt", row.get("messages"))
    if isinstance(prompt, list):
        turns = [t for t in prompt if isinstance(t, dict) and isinstance(t.get("content"), str)]
        prompt = "\n\n".join(f"{t.get('role', '')}: {t['content']}" for t in turns)
    texts = [(name, row[name]) for name in TEXTS if isinstance(row.get(name), str)]
    for name in ("answers", "responses"):
        listed = row.get(name)
        if isinstance(listed, list):
            texts += [(f"{name} {i}", text) for i, text in enumerate(listed) if isinstance(text, str)]
    told = {"prompt", "messages", "answers", "responses", *TEXTS}
    rest = {k: v for k, v in row.items() if k not in told}
    return {
        "prompt": None if prompt is None else str(prompt),
        "texts": texts,
        "rest": json.dumps(rest, ensure_ascii=False),
    }


def _whole(text: Any) -> int:
    try:
        return int(str(text)[:9])
    except ValueError:
        return -1
