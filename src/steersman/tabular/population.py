"""Infinite preference data on the token MDP, and descent on a loss's expectation over it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from steersman.loss.preference import AnswerLogp, PairLogp, as_batch, pair_logp
from steersman.tabular.token_mdp import TokenMDP

PairLoss = Callable[[PairLogp], Tensor]


class Population:
    """All pairs that could be shown, with their probability.

    `chosen`, `rejected` [M] number the sequences, `prob` [M] is how often the first is shown beside the second
    and preferred (adds up to 1), after a label was flipped with probability `flip`. `shown_prob` [N] is how often an
    answer is shown on its own, `of_prompt` [K, N] which answers belong to a prompt.
    """

    def __init__(self, mdp: TokenMDP, flip: float = 0.0):
        pairs = mdp.preference_pairs()
        self.mdp, self.chosen, self.rejected = mdp, pairs.first, pairs.second
        self.prefer = (1 - flip) * pairs.prefer + flip * (1 - pairs.prefer)
        self.weight = pairs.weight
        self.prob = 2 * pairs.weight * self.prefer  # both orders are listed: either may be the chosen one
        self.shown_prob = mdp.sequence_prob(mdp.logp_ref)
        self.of_prompt = mdp.prompt == torch.arange(len(mdp.prompts))[:, None]

    def pair(self, logits: Float[Tensor, "S V"]) -> PairLogp:
        """Every pair as the losses read it, divergences and the whole population included."""
        mdp, w, l = self.mdp, self.chosen, self.rejected  # noqa: E741
        logp, ref, kl = mdp.sequence_logp(logits), mdp.sequence_logp_ref, self.step_kl(logits)
        own = logp - self.step_collision(logits)
        chosen, rejected = (AnswerLogp(logp[at], mdp.mask[at], ref[at], kl[at], own[at]) for at in (w, l))
        pair = pair_logp(chosen, rejected, tails=True)
        return pair._replace(batch=as_batch(pair, self.prob))

    def answer_pair(self, logp: Float[Tensor, " N"]) -> PairLogp:
        """The same from log-probabilities of whole answers; without divergences."""
        length, ref = self.mdp.length.double(), self.mdp.sequence_logp_ref.sum(-1)
        w, l = self.chosen, self.rejected  # noqa: E741
        return PairLogp(logp[w], logp[l], length[w], length[l], ref[w], ref[l])

    def step_kl(self, logits: Float[Tensor, "S V"]) -> Float[Tensor, "N T"]:
        """KL(pi_ref || pi) at every step that a sequence walks through."""
        logp, ref = torch.log_softmax(logits, -1), self.mdp.logp_ref
        state = (ref.exp() * (ref - logp)).sum(-1)
        return torch.cat([state, state.new_zeros(1)])[self.mdp.path[:, :-1]]

    def step_collision(self, logits: Float[Tensor, "S V"]) -> Float[Tensor, "N T"]:
        """log sum_v pi(v)^2 at every step that a sequence walks through."""
        state = (2 * torch.log_softmax(logits, -1)).logsumexp(-1)
        return torch.cat([state, state.new_zeros(1)])[self.mdp.path[:, :-1]]

    def normal(self, weight: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """log pi(y|x) of the policy with pi(y|x) proportional to exp(weight) over the answers to x."""
        total = torch.where(self.of_prompt, weight, -torch.inf).logsumexp(-1)
        return weight - total[self.mdp.prompt]

    def expected(self, loss: PairLoss) -> Callable[[Tensor], Tensor]:
        """The loss's expectation as a function of the logits."""
        return lambda logits: (self.prob * loss(self.pair(logits))).sum()

    def log_ratio(self, logits: Float[Tensor, "S V"]) -> Float[Tensor, " N"]:
        """rho(y) = log pi(y|x) - log pi_ref(y|x) of whole sequences."""
        return (self.mdp.sequence_logp(logits) - self.mdp.sequence_logp_ref).sum(-1)

    def win_rate(self, prefer: Float[Tensor, " M"]) -> Float[Tensor, " N"]:
        """How often each answer is the chosen one among the pairs that show it first."""
        count = self.shown_prob.new_zeros(len(self.mdp))
        wins = count.index_add(0, self.chosen, self.weight * prefer)
        return wins / count.index_add(0, self.chosen, self.weight)

    def marginal(self, side: Tensor) -> Float[Tensor, " N"]:
        """How often each answer stands on this side (`chosen` or `rejected`) of a labelled pair."""
        return self.shown_prob.new_zeros(len(self.mdp)).index_add(0, side, self.prob)

    def distance(self, logits: Float[Tensor, "S V"], logp: Float[Tensor, " N"]) -> float:
        """E_x of the total variation between the policy and the answer log-probabilities (any scale)."""
        target = self.mdp.sequence_prob(self.mdp.factor(logp))
        return float((self.mdp.sequence_prob(logits) - target).abs().sum() / 2)

    def gap(self, logits: Float[Tensor, "S V"]) -> float:
        """J* - J of the KL-regularised reward."""
        return float(self.mdp.j_star() - self.mdp.objective(logits))


def descend(
    loss: Callable[[Tensor], Tensor], start: Float[Tensor, "S V"], *, steps: int = 800
) -> Float[Tensor, "S V"]:
    """Full-batch L-BFGS with a strong Wolfe line search, for smooth losses."""
    logits = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=steps, max_eval=2 * steps, history_size=60,
        tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(logits)
        value.backward()
        return value

    optimiser.step(closure)
    return logits.detach()


def descend_kinked(
    world: Population, loss: PairLoss, start: Float[Tensor, " N"], *, lr: float = 0.1, steps: int = 1000
) -> Float[Tensor, "S V"]:
    """Adam on a pair loss with kinks, where a line search stalls; the step size falls to a 100,000th.

    It moves one logit per answer (`start` are log-probabilities of answers): tokens that answers share would
    tie their kinks together. A short memory of squared gradients, because they jump at a kink.
    """
    theta = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([theta], lr=lr, betas=(0.9, 0.9))
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * 1e-5 ** (step / steps)
        (theta.grad,) = torch.autograd.grad((world.prob * loss(world.answer_pair(world.normal(theta)))).sum(), theta)
        optimiser.step()
    return world.mdp.factor(theta.detach())


def descend_frozen(
    loss: Callable[[Tensor, Tensor], Tensor],
    frozen: Callable[[Tensor], Tensor],
    start: Float[Tensor, "S V"],
    *,
    rounds: int = 30,
) -> Float[Tensor, "S V"]:
    """A zero of a semi-gradient: minimise with what carries no gradient held fixed, renew it, repeat.

    The limit is where the loss's own gradient (with its stop-gradients) vanishes, which is also where plain
    descent comes to rest. What is held is extrapolated from two rounds (Anderson's method; the secant rule for
    a single number), because the plain repetition can be slow.
    """
    held = frozen(start)
    logits, previous = start, None
    for _ in range(rounds):
        logits = descend(lambda x, held=held: loss(x, held), logits, steps=200)
        renewed = frozen(logits)
        residual = renewed - held
        if float(residual.abs().max()) < 1e-8:
            break
        held = renewed
        if previous is not None:
            change = residual - previous[1]
            held = renewed - (residual * change).sum() / (change**2).sum() * (renewed - previous[0])
        previous = renewed, residual
    return logits
