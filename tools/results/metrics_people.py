"""How well automatic metrics agree with people: docs/results/metrics-and-people.md, ratings of Novikova et al. 2017.

    python tools/results/metrics_people.py ../shared/data/nlg_human_ratings/emnlp_data_medians.part1.csv

Three data sets of system outputs (BAGEL, SFHotel, SFRestaurant), each rated 1 to 6 by people for informativeness,
naturalness and quality (medians). The file has no human references: metrics that need some are those that its authors
recorded; metrics of steersman read the meaning representation or the text alone. A coefficient is taken within each
data set and averaged by rows, so that differences between data sets are no agreement. Intervals draw meaning
representations with replacement, since outputs for the same one are not independent.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import kendalltau, rankdata

from steersman.metrics import metric

STORY = str(Path(__file__).resolve().parents[2] / "src/steersman/assets/story-model")
RATINGS = ("informativeness", "naturalness", "quality")
RECORDED = {
    "TER": "TER", "Bleu_1": "BLEU-1", "Bleu_2": "BLEU-2", "Bleu_3": "BLEU-3", "Bleu_4": "BLEU-4",
    "ROUGE_L": "ROUGE-L", "NIST": "NIST", "LEPOR": "LEPOR", "CIDEr": "CIDEr", "METEOR": "METEOR",
    "sim.mr.sys": "similarity to MR",
}  # fmt: skip
LOWER = {"TER", "perplexity"}
DRAWS = 200


def slots(mr: str) -> list[list[str]]:
    """The table of a meaning representation: [slot, value] pairs, and what kind of act it is."""
    act, _, inside = mr.partition("(")
    pairs = re.findall(r"([\w ]+)=('[^']*'|[^,;)']+)", inside)
    found = [[name.strip(), value.strip("' ")] for name, value in pairs]
    return [[n, v] for n, v in found if re.search(r"\w", v)] or [["act", act.strip("? ")]]


def own(data: pd.DataFrame) -> dict[str, list[float]]:
    """Scores of steersman's metrics: of the text alone, or against what it was to say."""
    texts = data.sys_ref.tolist()
    tables = [slots(mr) for mr in data.mr]
    said = [" ".join(value for _, value in table) for table in tables]
    full = [" ".join(f"{name} {value}" for name, value in table) for table in tables]
    encoded = {
        f"BERTScore {part} to MR": metric("bertscore", {"part": part}) for part in ("precision", "recall", "f1")
    }
    return {
        "concept coverage of slots": metric("concept_coverage").score(texts, concepts=said),
        "token F1 to slots": metric("token_f1").score(texts, said),
        "ROUGE-L to slots": metric("rougeL").score(texts, said),
        "chrF to slots": metric("chrf").score(texts, said),
        "METEOR to slots": metric("meteor").score(texts, said),
        **{name: made.score(texts, full) for name, made in encoded.items()},
        "perplexity": metric("perplexity", {"path": STORY, "unit": "nats"}).score(texts),
        "VADER sentiment": metric("vader_sentiment").score(texts),
        "distinct-1": metric("distinct", {"n": 1}).score(texts),
        "distinct-2": metric("distinct").score(texts),
        "length": metric("length").score(texts),
    }


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    a, b = rankdata(x), rankdata(y)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


def kendall(x: np.ndarray, y: np.ndarray) -> float:
    tau = float(kendalltau(x, y).statistic)
    return 0.0 if np.isnan(tau) else tau


def agreement(data: pd.DataFrame, score: np.ndarray, rating: str, rng: np.random.Generator) -> dict[str, list[float]]:
    """Both coefficients with the ends of their 95% intervals: within data sets, averaged by rows."""
    groups = [data.index[data.dataset == name].to_numpy() for name in sorted(data.dataset.unique())]
    clusters = [[np.array(rows) for rows in data.loc[g].groupby("mr").indices.values()] for g in groups]
    y = data[rating].to_numpy()
    out = {}
    for name, coefficient in (("spearman", spearman), ("kendall", kendall)):

        def over(parts: list[np.ndarray], coefficient=coefficient) -> float:
            values = [coefficient(score[rows], y[rows]) for rows in parts]
            return float(np.average(values, weights=[len(rows) for rows in parts]))

        draws = []
        for _ in range(DRAWS):
            parts = []
            for rows, inside in zip(groups, clusters, strict=True):
                picked = rng.integers(len(inside), size=len(inside))
                parts.append(rows[np.concatenate([inside[i] for i in picked])])
            draws.append(over(parts))
        out[name] = [over(groups), *np.quantile(draws, [0.025, 0.975]).tolist()]
    return out


def by_pairs(data: pd.DataFrame, score: np.ndarray, rng: np.random.Generator) -> list[float]:
    """Share of pairs of outputs for one meaning representation in which the metric names the one people rated higher
    (sum of the three ratings; ties of people are left out, a tie of the metric counts half), with its interval."""
    total = data[list(RATINGS)].sum(axis=1).to_numpy()
    clusters = []
    for _, rows in data.groupby(["dataset", "mr"]).indices.items():
        agreed = [
            0.5 if score[i] == score[j] else float((score[i] > score[j]) == (total[i] > total[j]))
            for n, i in enumerate(rows) for j in rows[n + 1 :] if total[i] != total[j]
        ]  # fmt: skip
        if agreed:
            clusters.append((sum(agreed), len(agreed)))
    counts = np.array(clusters)
    weights = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=1000) @ counts
    low, high = np.quantile(weights[:, 0] / weights[:, 1], [0.025, 0.975])
    return [float(counts[:, 0].sum() / counts[:, 1].sum()), float(low), float(high), int(counts[:, 1].sum())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ratings")
    parser.add_argument("--out", default="docs/results/metrics-and-people.json")
    args = parser.parse_args()
    start = time.time()
    data = pd.read_csv(args.ratings)
    scores = {f"{label} (recorded)": data[column].tolist() for column, label in RECORDED.items()} | own(data)
    rng = np.random.default_rng(0)
    rows = {}
    for name, values in scores.items():
        sign = -1.0 if name.removesuffix(" (recorded)") in LOWER else 1.0
        score = sign * np.array(values)
        rows[name] = {rating: agreement(data, score, rating, rng) for rating in RATINGS}
        rows[name]["pairs"] = by_pairs(data, score, rng)
        rows[name]["turned"] = sign < 0
        print(
            f"{name:32s}", *(f"{rows[name][r]['spearman'][0]:6.3f}" for r in RATINGS), f"{rows[name]['pairs'][0]:.3f}"
        )
    between = {
        f"{a}/{b}": agreement(data, data[a].to_numpy(), b, rng)["spearman"]
        for a, b in (("informativeness", "naturalness"), ("informativeness", "quality"), ("naturalness", "quality"))
    }
    found = {
        "date": datetime.date.today().isoformat(),
        "rows": len(data),
        "draws": DRAWS,
        "seconds": round(time.time() - start),
        "between_ratings": between,
        "metrics": rows,
    }
    Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def table(found: dict) -> str:
    """The page's table, best agreement on quality first."""
    lines = [
        "| metric | informativeness ρ | naturalness ρ | quality ρ | quality τ | pairs |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    order = sorted(found["metrics"].items(), key=lambda item: -item[1]["quality"]["spearman"][0])
    for name, row in order:
        cells = [cell(row[rating]["spearman"]) for rating in RATINGS]
        lines.append(f"| {name} | {' | '.join(cells)} | {cell(row['quality']['kendall'])} | {cell(row['pairs'])} |")
    return "\n".join(lines)


def cell(triple: list[float]) -> str:
    return f"{triple[0]:.2f} [{triple[1]:.2f}, {triple[2]:.2f}]"


if __name__ == "__main__":
    main()
