"""What a correction for stale samples leaves: bias and spread of the gradient, by listing every answer.

The policy climbs the exact gradient of J. Its answers come from the version `lag` steps ago, or, mixed, begin with
that version and end with the present one, as where weights arrive while an answer is being written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.loss.correction import Correction
from steersman.loss.policy import reinforce
from steersman.tabular.oracle import exact_gradient
from steersman.tabular.token_mdp import TokenMDP

STEPS = 8
LAGS = (1, 4, 8)
RATES = (0.3, 1.0)
CORRECTIONS = {
    "none": Correction("none"),
    "decoupled (AReaL)": Correction("decoupled"),
    "token truncated (TIS)": Correction("token_truncated", 2.0),
    "token masked (IcePop)": Correction("token_masked", 2.0, 0.5),
    "sequence, uncut": Correction("sequence_truncated", torch.inf),
    "sequence truncated": Correction("sequence_truncated", 2.0),
    "sequence masked (MIS)": Correction("sequence_masked", 2.0),
    "geometric masked": Correction("geometric_masked", 1.5, 0.67),
    "k3 masked": Correction("k3_masked", 0.1),
}


@dataclass(frozen=True, slots=True)
class StalenessRow:
    """One correction at one lag and rate: lengths of the bias and of the standard deviation, over that of the exact
    gradient."""

    correction: str
    lag: int
    rate: float
    mixed: bool
    bias: float
    deviation: float


def example() -> TokenMDP:
    """Fifteen answers of one to three tokens with a score at their end, no KL."""
    return TokenMDP.random(3, 3, 0.0, seed=2)


def stale_table() -> list[StalenessRow]:
    """Every correction at every lag and rate, by whole answers of one version and by mixed ones."""
    mdp, rows = example(), []
    for rate in RATES:
        versions = climb(mdp, rate)
        for lag in (0, *LAGS):
            for mixed in (False, True) if lag else (False,):
                behaviour = mixture(mdp, versions[-1 - lag], versions[-1]) if mixed else versions[-1 - lag]
                for name, correction in CORRECTIONS.items():
                    found = measure(mdp, versions[-1], behaviour, correction)
                    rows.append(StalenessRow(name, lag, rate, mixed, *found))
    return rows


def climb(mdp: TokenMDP, rate: float) -> list[Tensor]:
    """The policies of `STEPS` steps of exact gradient ascent, the reference first."""
    versions = [mdp.logp_ref.clone()]
    for _ in range(STEPS):
        versions.append(versions[-1] + rate * exact_gradient(mdp, versions[-1]).reshape(versions[-1].shape))
    return versions


def mixture(mdp: TokenMDP, old: Tensor, new: Tensor) -> Tensor:
    """The first token by the old version, the others by the new one."""
    made = new.clone()
    made[mdp.levels[0]] = old[mdp.levels[0]]
    return made


def measure(mdp: TokenMDP, policy: Tensor, behaviour: Tensor, correction: Correction) -> tuple[float, float]:
    """(bias, standard deviation) of one answer's gradient, drawn from `behaviour`."""
    logits = policy.clone().requires_grad_()
    logp, drawn = mdp.sequence_logp(logits), mdp.sequence_prob(behaviour)
    weight = correction.weight(logp, mdp.sequence_logp(behaviour), mdp.mask)
    adv = (mdp.total_reward - mdp.expected_reward(policy))[:, None].expand_as(logp)
    per_answer = torch.where(mdp.mask, weight * reinforce(logp, adv), 0.0).sum(-1)
    each = torch.stack([torch.autograd.grad(x, logits, retain_graph=True)[0].flatten() for x in per_answer])
    mean, exact = drawn @ each, -exact_gradient(mdp, policy)
    spread = (drawn * (each - mean).square().sum(-1)).sum().sqrt()
    return float((mean - exact).norm() / exact.norm()), float(spread / exact.norm())


def claims(rows: list[StalenessRow]) -> Iterator[tuple[str, bool]]:
    """What is said of the corrections, and whether it holds at every lag and rate."""
    at = {(r.correction, r.lag, r.rate, r.mixed): r for r in rows}
    keys = sorted({(r.lag, r.rate, r.mixed) for r in rows if r.lag})

    def bias(name: str) -> list[float]:
        return [at[name, *key].bias for key in keys]

    yield "without a lag every correction is exact", all(r.bias < 1e-12 for r in rows if r.lag == 0)
    yield "the uncut product over the answer is exact at any lag", max(bias("sequence, uncut")) < 1e-12
    yield "no correction is biased at every lag", min(bias("none")) > 1e-3
    far = (LAGS[-1], RATES[-1], False)
    left = [at[name, *far].bias for name in ("sequence truncated", "decoupled (AReaL)", "none")]
    yield (
        "far from the sampler, less bias is left by sequence, then token weights, than by none",
        left == sorted(left),
    )
    cut = [at[name, *far].bias for name in ("sequence, uncut", "sequence truncated", "sequence masked (MIS)")]
    yield "where the bound of the product binds, it costs bias, and masking more than cutting", cut == sorted(cut)
    for rate in RATES:
        grows = [at["none", lag, rate, False].bias for lag in LAGS]
        yield f"without correction the bias grows with the lag at rate {rate:g}", grows == sorted(grows)
    for lag in LAGS:
        slow, fast = (at["none", lag, rate, False].bias for rate in RATES)
        yield f"and with the rate at lag {lag}", slow < fast
    bound = zip(*(
        [at[name, *key].deviation for key in keys] for name in ("sequence truncated", "sequence, uncut")
    ), strict=True)  # fmt: skip
    yield "a bound on the product never raises the spread", all(a <= b + 1e-12 for a, b in bound)
