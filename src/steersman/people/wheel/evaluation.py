"""A candidate beside the model that serves, on prompts whose judgements neither has learned from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from steersman.data import DataConfig, Query, Row, layout
from steersman.data.examples import Content
from steersman.flywheel.players import Player
from steersman.ops.masked import masked_sum
from steersman.ops.text import ngrams, perplexity, words
from steersman.people.filters import item_key, prompt_key, shares
from steersman.people.judgements import Judgement
from steersman.statistics.estimates import Array, Estimate, bootstrap, ranked_share, share
from steersman.types import Tokens

Rows = list[dict[str, Any]]
BATCH = 16
"""Answers read at once."""


def queries(rows: Sequence[Judgement], count: int) -> list[Query]:
    """The first `count` different prompts."""
    found: dict[str, Content] = {}
    for one in rows:
        found.setdefault(prompt_key(one.prompt), one.prompt)
    return [Query(p, Row({"prompt": p}, "judgements", i)) for i, p in enumerate(list(found.values())[:count], 1)]


@torch.no_grad()
def answer_logp(player: Player, data: DataConfig, asked: Sequence[tuple[Content, str]]) -> list[float]:
    """log-probability (nats) of each given answer with its end, as this model would be trained on it."""
    laid, out = layout(player.policy, data), list[float]()
    for start in range(0, len(asked), BATCH):
        ids = [laid.answer(*item) for item in asked[start : start + BATCH]]
        tokens = Tokens.from_ids([p for p, _, _ in ids], [r for _, r, _ in ids], [m for _, _, m in ids])
        logp = player.policy.logp(tokens).logp
        out += masked_sum(logp, tokens.mask.to(logp.device), dim=-1).tolist()
    return out


def read(players: Sequence[Player], data: DataConfig, rows: Sequence[Judgement]) -> Rows:
    """Each held-out answer with its log-probability under the candidate and under the model that serves."""
    asked = [(one, i) for one in rows for i in range(len(one.answers)) if one.answers[i].strip()]
    texts = [(one.prompt, one.answers[i]) for one, i in asked]
    told = []
    for player in players:
        told.append(answer_logp(player, data, texts))
        player.release()
    return [
        {"id": one.id, "answer": i, "logp": a, "logp_current": b}
        for (one, i), a, b in zip(asked, *told, strict=True)
    ]  # fmt: skip


def human_metrics(rows: Sequence[Judgement], readings: Rows) -> dict[str, Estimate]:
    """How far what the candidate learned is what people say: g(y) = log pi(y|x) - log pi_current(y|x).

    human/pairs     share of items that people decided with g(chosen) > g(rejected), a tie counting half
    human/thumbs    P(g of an answer with a thumb up > g of one with a thumb down)
    human/accuracy  the first of them that there are judgements for

    Intervals are those of `share` and `ranked_share`, by prompt. Source of g: arXiv 2305.18290, eq. 5 (the implicit
    reward, beta = 1).
    """
    gain = {(r["id"], r["answer"]): r["logp"] - r["logp_current"] for r in readings}
    first_won, seen, won, clusters = shares(rows), set[str](), list[float](), list[str]()
    thumbs, liked, asked = list[float](), list[float](), list[str]()
    for one in rows:
        key = item_key(one)
        if one.choice is None:
            if (one.id, 0) in gain:
                thumbs.append(gain[one.id, 0])
                liked.append(float(bool(one.label)))
                asked.append(prompt_key(one.prompt))
            continue
        both = [gain.get((one.id, i)) for i in np.argsort(one.answers, kind="stable")]
        if key not in seen and first_won[key] != 0.5 and None not in both:
            seen.add(key)
            lead = (both[0] - both[1]) * (1 if first_won[key] > 0.5 else -1)  # type: ignore
            won.append(0.5 if lead == 0 else float(lead > 0))
            clusters.append(prompt_key(one.prompt))
    found: dict[str, Estimate] = {}
    if won:
        found["human/pairs"] = share(np.array(won), _places(clusters))
    if len(set(liked)) == 2:
        found["human/thumbs"] = ranked_share(np.array(thumbs), np.array(liked), _places(asked))
    if found:
        found["human/accuracy"] = next(iter(found.values()))
    return found


def with_logp(player: Player, data: DataConfig, rows: Rows) -> Rows:
    """Answers with their log-probability under the model that serves."""
    told = answer_logp(player, data, [(row["prompt"], row["completion"]) for row in rows])
    player.release()
    return [{**row, "logp_current": x} for row, x in zip(rows, told, strict=True)]


def guard_metrics(candidate: Rows, current: Rows) -> dict[str, Estimate]:
    """The candidate's answers beside those of the model that serves, as ratios; 1 is no change.

    length       tokens
    distinct     distinct pairs of words / all pairs, within answers
    perplexity   of the answers under the model that serves, per token
    ended        share of answers that came to an end by themselves, and one is added to both counts

    Intervals resample prompts.
    """
    mine, theirs = ({row["index"]: row for row in rows} for rows in (candidate, current))
    both = [(mine[i], theirs[i]) for i in mine if i in theirs]
    columns = [np.array([_numbers(pair[side]) for pair in both]) for side in (0, 1)]
    if not both:
        return {}

    def ratio(top: int, bottom: int | None) -> Estimate:
        def of(a: Array, b: Array) -> float:
            values = [x[:, top].sum() / (len(x) if bottom is None else max(x[:, bottom].sum(), 1)) for x in (a, b)]
            return float(values[0] / values[1]) if values[1] > 0 else float("nan")

        return bootstrap(of, columns)

    def perplexities(a: Array, b: Array) -> float:
        nll = [-x[:, 3].sum() / max(x[:, 0].sum(), 1) for x in (a, b)]
        return perplexity(float(nll[0] - nll[1]))

    def ended(a: Array, b: Array) -> float:
        return float((a[:, 4].sum() + 1) / (b[:, 4].sum() + 1))

    return {
        "length": ratio(0, None), "distinct": ratio(1, 2), "perplexity": bootstrap(perplexities, columns),
        "ended": bootstrap(ended, columns),
    }  # fmt: skip


def _numbers(row: dict[str, Any]) -> tuple[float, ...]:
    """Tokens, distinct and all pairs of words, log-probability, whether it ended."""
    grams = ngrams(words(row["completion"]), 2)
    return row["tokens"], len(set(grams)), len(grams), row["logp_current"], float(row["finish"] != "length")


def _places(names: Sequence[str]) -> Array:
    return np.unique(names, return_inverse=True)[1]
