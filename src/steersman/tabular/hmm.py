"""Hidden Markov models with discrete observations: forward-backward, Viterbi, Baum-Welch, in log space.

Written here because it is short and the usual library is in limited maintenance and needs scikit-learn.
Source: Rabiner, "A tutorial on hidden Markov models", Proceedings of the IEEE 77 (1989), eqs. 19-40.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steersman.tabular.markov import stochastic
from steersman.types import SteersmanError


@dataclass(slots=True)
class Posterior:
    """What a sequence of observations says of the hidden states.

    `state` [T, K] is Pr(state at t | all observations), `pair` [T-1, K, K] Pr(states at t and t+1 | all),
    `filtered` [T, K] Pr(state at t | observations up to t), `log_likelihood` log Pr(observations) in nats.
    """

    state: Float[Tensor, "T K"]
    pair: Float[Tensor, "T-1 K K"]
    filtered: Float[Tensor, "T K"]
    log_likelihood: Float[Tensor, ""]


class HMM:
    """`start` [K], `transition` [K, K] from row to column, `emission` [K, M] symbol probabilities per state.

    Raises SteersmanError for shapes that do not fit or rows that are no distributions.
    """

    def __init__(self, start: Tensor, transition: Tensor, emission: Tensor):
        K = len(start)
        if transition.shape != (K, K) or emission.ndim != 2 or len(emission) != K:
            raise SteersmanError(
                f"start {list(start.shape)}, transition {list(transition.shape)} and emission "
                f"{list(emission.shape)} do not fit: expected [K], [K, K] and [K, M]"
            )
        self.start = stochastic(start, "start")
        self.transition = stochastic(transition, "transition")
        self.emission = stochastic(emission, "emission")

    def _log_parts(self, observations: Int[Tensor, " T"]) -> tuple[Tensor, Tensor, Tensor]:
        M = self.emission.shape[1]
        if observations.ndim != 1 or not len(observations):
            raise SteersmanError(f"observations are one row of symbols, got shape {list(observations.shape)}")
        if int(observations.min()) < 0 or int(observations.max()) >= M:
            raise SteersmanError(f"observations must lie in 0..{M - 1}, the symbols of the emission table")
        return self.start.log(), self.transition.log(), self.emission.log().T[observations]

    def forward_backward(self, observations: Int[Tensor, " T"]) -> Posterior:
        """Smoothed and filtered state probabilities and the likelihood.

        alpha_t(j) = b_j(o_t) sum_i alpha_{t-1}(i) a_ij,   beta_t(i) = sum_j a_ij b_j(o_{t+1}) beta_{t+1}(j)

        Raises SteersmanError when the model gives the observations probability 0.
        """
        start, step, emit = self._log_parts(observations)
        alpha = [start + emit[0]]
        for e in emit[1:]:
            alpha.append(torch.logsumexp(alpha[-1][:, None] + step, 0) + e)
        beta = [torch.zeros_like(start)]
        for e in emit[1:].flip(0):
            beta.insert(0, torch.logsumexp(step + e + beta[0], 1))
        a, b = torch.stack(alpha), torch.stack(beta)
        total = torch.logsumexp(a[-1], 0)
        if total.isneginf():
            raise SteersmanError("the observations are impossible under this model (probability 0)")
        pair = a[:-1, :, None] + step + (emit + b)[1:, None, :] - total
        return Posterior((a + b - total).exp(), pair.exp(), torch.softmax(a, -1), total)

    def viterbi(self, observations: Int[Tensor, " T"]) -> tuple[Int[Tensor, " T"], Float[Tensor, ""]]:
        """(the most probable path of hidden states, log Pr(path, observations) in nats)."""
        start, step, emit = self._log_parts(observations)
        best, came_from = start + emit[0], []
        for e in emit[1:]:
            reach, back = (best[:, None] + step).max(0)
            came_from.append(back)
            best = reach + e
        logp, state = best.max(0)
        if logp.isneginf():
            raise SteersmanError("the observations are impossible under this model (probability 0)")
        path = [state]
        for back in reversed(came_from):
            path.insert(0, back[path[0]])
        return torch.stack(path), logp

    def sample(self, steps: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(hidden states [T], observations [T]) of one run."""
        states = [torch.multinomial(self.start, 1, generator=generator)]
        while len(states) < steps:
            states.append(torch.multinomial(self.transition[states[-1][0]], 1, generator=generator))
        hidden = torch.cat(states)
        return hidden, torch.multinomial(self.emission[hidden], 1, generator=generator).squeeze(1)


def baum_welch(
    model: HMM, sequences: Sequence[Int[Tensor, " T"]], iterations: int = 100, tolerance: float = 1e-8
) -> tuple[HMM, list[float]]:
    """Fit by expectation-maximisation from `model` on.

    Each step replaces every probability by its expected relative frequency under the posterior; the
    log-likelihood never falls. Stops when it rises by less than `tolerance` nats. A state that is never
    visited keeps its rows. Returns the fitted model and the log-likelihood before each step, and of the result.

    Raises SteersmanError when there is no sequence, or one is impossible under the model.
    """
    if not sequences:
        raise SteersmanError("Baum-Welch needs at least one sequence of observations")
    history: list[float] = []
    for _ in range(iterations + 1):
        posteriors = [model.forward_backward(obs) for obs in sequences]
        history.append(float(sum(p.log_likelihood for p in posteriors)))
        if len(history) > iterations or (len(history) > 1 and history[-1] - history[-2] < tolerance):
            break
        start = torch.stack([p.state[0] for p in posteriors]).mean(0)
        moves = torch.stack([p.pair.sum(0) for p in posteriors]).sum(0)
        symbols = torch.zeros_like(model.emission.T)
        for obs, p in zip(sequences, posteriors, strict=True):
            symbols.index_add_(0, obs, p.state)
        model = HMM(start / start.sum(), _frequency(moves, model.transition), _frequency(symbols.T, model.emission))
    return model, history


def _frequency(count: Tensor, before: Tensor) -> Tensor:
    total = count.sum(-1, keepdim=True)
    return torch.where(total > 0, count / total.where(total > 0, 1.0), before)
