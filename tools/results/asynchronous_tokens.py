"""Learning from samples of older weights in the language of a few tokens, for each correction and each k.

    python tools/results/asynchronous_tokens.py --docs docs/results

A table of logits over four tokens and answers of up to four of them climbs a random reward by REINFORCE with the
batch's mean as baseline. Batch b is sampled by version max(0, b - k), and each step weighted as the correction says.
The expected reward is exact, by enumeration; the share of the way from the start to the best answer that was gone is
recorded after the last iteration and on average over all. 10 seeds, each with a reward and a random stream of its
own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from recording import over_seeds

from steersman.atomic import write_atomic
from steersman.loss.correction import Correction
from steersman.loss.policy import reinforce
from steersman.tabular.token_mdp import TokenMDP
from steersman.verify.staleness import CORRECTIONS

LAGS, RATES, SEEDS = (0, 1, 2, 4, 8), (1.0, 2.0), 10
ITERATIONS, ANSWERS = 60, 32


def learn(correction: Correction, lag: int, rate: float, seed: int) -> list[float]:
    """The share of the way to the best answer after each iteration."""
    mdp = TokenMDP.random(4, 4, 0.0, seed=seed)
    random = torch.Generator().manual_seed(seed)
    logits, versions, way = mdp.logp_ref.clone(), [], []
    start, best = mdp.expected_reward(logits), mdp.total_reward.max()
    for batch in range(ITERATIONS):
        versions.append(logits)
        behaviour = versions[max(0, batch - lag)]
        drawn = torch.multinomial(mdp.sequence_prob(behaviour), ANSWERS, replacement=True, generator=random)
        logits = logits.clone().requires_grad_()
        logp, mask, reward = mdp.sequence_logp(logits)[drawn], mdp.mask[drawn], mdp.total_reward[drawn]
        weight = correction.weight(logp.detach(), mdp.sequence_logp(behaviour)[drawn], mask)
        adv = (reward - reward.mean())[:, None].expand_as(logp)
        loss = torch.where(mask, weight * reinforce(logp, adv), 0.0).sum() / ANSWERS
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - rate * gradient).detach()
        way.append(float((mdp.expected_reward(logits) - start) / (best - start)))
    return way


def table() -> list[dict[str, Any]]:
    rows = []
    for rate in RATES:
        for name, correction in CORRECTIONS.items():
            for lag in LAGS:
                ways = [learn(correction, lag, rate, seed) for seed in range(SEEDS)]
                end, mean = [way[-1] for way in ways], [sum(way) / len(way) for way in ways]
                rows.append(
                    {
                        "rate": rate, "correction": name, "lag": lag, "end": over_seeds(end),
                        "mean": over_seeds(mean),
                    }
                )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = table()
    write_atomic(given.docs / "asynchronous-tokens.json", json.dumps(found, indent=1) + "\n")
    for row in found:
        print(
            f"{row['rate']:<4} {row['correction']:<24} k={row['lag']}  {row['end']['mean']:.3f} "
            f"{row['mean']['mean']:.3f}"
        )


if __name__ == "__main__":
    main()
