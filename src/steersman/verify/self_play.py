"""Rounds of self-play on the token MDP, each descended to rest on infinite data, beside the game's equilibrium.

The preference here has no reward behind it: y may beat z, z beat w, and w beat y. The equilibrium regularised by tau
nats to the first policy mu is the one policy with pi(y) ~ mu(y) exp(P(y beats pi) / tau).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from steersman.loss.preference import PairLogp, dpo, ipo, reference_answer, sppo
from steersman.tabular.population import descend
from steersman.tabular.preference_check import FixedPoint
from steersman.tabular.token_mdp import TokenMDP

ROUNDS = 30


def example() -> tuple[TokenMDP, Float[Tensor, "N N"]]:
    """One prompt, fifteen answers, and how often each beats each: no order, and no Bradley-Terry."""
    mdp = TokenMDP.random(3, 3, 0.5, seed=1)
    generator = torch.Generator().manual_seed(0)
    lead = torch.randn(len(mdp), len(mdp), generator=generator, dtype=torch.float64)
    return mdp, torch.sigmoid(2 * (lead - lead.T))


def equilibrium(mdp: TokenMDP, beats: Tensor, tau: float) -> Float[Tensor, " N"]:
    """pi(y) ~ mu(y) exp(P(y beats pi) / tau), by repeated averaging of its logarithm: no descent, no loss."""
    start = mdp.sequence_logp_ref.sum(-1)
    logp = start
    for _ in range(4000):
        target = torch.log_softmax(start + beats @ logp.exp() / tau, 0)
        logp = torch.log_softmax(0.95 * logp + 0.05 * target, 0)
    return logp


def play(
    mdp: TokenMDP,
    loss: Callable[[PairLogp], Tensor],
    chosen: Float[Tensor, "N N"] | None,
    *,
    share: float = 0.0,
    given: Float[Tensor, " N"] | None = None,
    explore: float | None = None,
    rounds: int = ROUNDS,
) -> Float[Tensor, "S V"]:
    """The policy after some rounds. Each draws pairs of its own answers, labelled by `chosen[i, j]`, how often i
    beats j; or pairs of an answer of the data (`given`, its distribution) and one of its own; or, with `explore`,
    pairs of one of its own and one of the first policy, whose log-probability times `explore` is added to the loss.
    The reference is the last policy, mixed with the first one by `share`."""
    first = mdp.sequence_logp_ref.sum(-1)
    logits, N = mdp.logp_ref, len(mdp)
    w, l = (x.flatten() for x in torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij"))  # noqa: E741
    length = mdp.length.double()
    for _ in range(rounds):
        last = mdp.sequence_logp(logits).sum(-1).detach()
        own, reference = last.exp(), (1 - share) * last + share * first
        from_first = torch.zeros_like(own[w])  # how often the chosen answer of such a pair is the first policy's
        if given is not None:
            prob = given[w] * own[l]
        elif explore is not None:
            assert chosen is not None
            both = own[w] * first.exp()[l], first.exp()[w] * own[l]
            prob = (both[0] + both[1]) * chosen[w, l]
            from_first = both[1] / (both[0] + both[1])
        else:
            assert chosen is not None
            prob = 2 * own[w] * own[l] * chosen[w, l]  # both orders are listed

        def expected(
            x: Tensor, prob: Tensor = prob, reference: Tensor = reference, from_first: Tensor = from_first
        ) -> Tensor:
            logp = mdp.sequence_logp(x).sum(-1)
            pair = PairLogp(logp[w], logp[l], length[w], length[l], reference[w], reference[l])
            bonus = (explore or 0.0) * reference_answer(pair, from_first, 1 - from_first)
            return (prob * (loss(pair) + bonus)).sum()

        logits = descend(expected, logits, steps=200)
    return logits


def check_nash(world: tuple[TokenMDP, Tensor], beta: float = 2.0, share: float = 0.25) -> FixedPoint:
    mdp, beats = world
    logits = play(mdp, lambda pair: ipo(pair, beta=beta)[0], beats, share=share)
    deviation = _distance(mdp, logits, equilibrium(mdp, beats, beta * share))
    statement = "rounds of ipo, reference mixed: the equilibrium, pi ~ pi_0 exp(P(y beats pi) / (beta share))"
    return _row(mdp, "nash", "2312.00886", statement, logits, deviation)


def check_sppo_rounds(world: tuple[TokenMDP, Tensor], beta: float = 5.0) -> FixedPoint:
    """No answer is unbeaten, so that the last policy circles; what no rival beats is the mean over the rounds. A
    round of descent is compared with the step that it should be, and the step is then taken 2,000 times."""
    mdp, beats = world
    first = mdp.sequence_logp_ref.sum(-1)

    def step(logp: Tensor, beta: float) -> Tensor:
        return torch.log_softmax(logp + (beats @ logp.exp() - 0.5) / beta, 0)

    logits = play(mdp, lambda pair: sppo(pair, beta=beta)[0], beats, rounds=1)
    deviation = _distance(mdp, logits, step(first, beta))
    logp, mean = first, torch.zeros(len(mdp), dtype=torch.float64)
    for _ in range(2000):
        mean += logp.exp() / 2000
        logp = step(logp, 2.0)
    rival = float((beats @ mean).max()) - 0.5
    statement = "a round is multiplicative weights on win rates; no rival beats the mean over rounds by 0.01"
    return _row(mdp, "sppo rounds", "2405.00675", statement, logits, deviation if rival < 0.01 else rival)


def check_spin(world: tuple[TokenMDP, Tensor]) -> FixedPoint:
    mdp, _ = world
    given = mdp.closed_form()[0].exp()
    logits = play(mdp, lambda pair: dpo(pair, beta=1.0)[0], None, given=given, rounds=12)
    statement = "rounds of dpo, the data's answers chosen: the data's own distribution"
    return _row(mdp, "spin", "2401.01335", statement, logits, _distance(mdp, logits, given.log()))


def check_xpo(
    world: tuple[TokenMDP, Tensor], beta: float = 0.5, explore: float = 0.05, rounds: int = ROUNDS
) -> FixedPoint:
    """The judge has a reward here. Where the rounds rest, pairs are of one answer of pi and one of pi_0; the logit of
    answer i moves DPO's mean loss by beta (implied - true wins of i), and the bonus by alpha (pi_0(i) - pi(i)):

        beta sum_j (pi(i) pi_0(j) + pi_0(i) pi(j)) (sigma(m_ij) - P(i beats j)) = alpha (pi(i) - pi_0(i))
    """
    mdp, _ = world
    first, reward = mdp.sequence_logp_ref.sum(-1), mdp.total_reward
    beats = torch.sigmoid(reward[:, None] - reward[None])
    logits = play(mdp, lambda pair: dpo(pair, beta=beta)[0], beats, share=1.0, explore=explore, rounds=rounds)
    logp = mdp.sequence_logp(logits).sum(-1)
    implicit, pi, start = beta * (logp - first), logp.exp(), first.exp()
    met = pi[:, None] * start[None] + start[:, None] * pi[None]
    excess = beta * (met * (torch.sigmoid(implicit[:, None] - implicit[None]) - beats)).sum(1)
    statement = "rounds of dpo with explore: the excess of implied over true wins, times beta, is alpha (pi - pi_0)"
    return _row(mdp, "xpo", "2405.21046", statement, logits, float((excess - explore * (pi - start)).abs().max()))


def _distance(mdp: TokenMDP, logits: Tensor, logp: Tensor) -> float:
    """Total variation between the policy and a distribution over answers."""
    return float((mdp.sequence_logp(logits).sum(-1).exp() - logp.exp()).abs().sum() / 2)


def _row(mdp: TokenMDP, name: str, source: str, statement: str, logits: Tensor, deviation: float) -> FixedPoint:
    """`gap` is KL to the first policy, in nats."""
    return FixedPoint(name, f"arXiv {source}", statement, float(mdp.kl(logits)), deviation)


CHECKS: dict[str, Callable[[tuple[TokenMDP, Tensor]], FixedPoint]] = {
    "nash": check_nash,
    "sppo rounds": check_sppo_rounds,
    "spin": check_spin,
    "xpo": check_xpo,
}
