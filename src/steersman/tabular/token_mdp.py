"""The exact oracle: a language of a few tokens in which every answer is known by enumeration, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steersman.tabular.language import Language
from steersman.types import SteersmanError, Trajectory

Score = Callable[[tuple[int, ...], tuple[int, ...]], float]


@dataclass(slots=True)
class Pairs:
    """All ordered pairs of different answers to one prompt.

    `first`, `second` [M] number the sequences, `weight` [M] says how often the pair is shown (adds up to 1),
    `prefer` [M] is the probability that the first is preferred.
    """

    first: Int[Tensor, " M"]
    second: Int[Tensor, " M"]
    weight: Float[Tensor, " M"]
    prefer: Float[Tensor, " M"]


class TokenMDP(Language):
    """A language with a reward, a reference policy and a price beta on leaving it.

    J(pi) = E_{x ~ rho, y ~ pi(.|x)} [ r(x, y) - beta log(pi(y|x) / pi_ref(y|x)) ]
    r(x, y) = score(x, y) + sum_t token_reward(s_t, y_t)

    `score` is a tensor over the N complete sequences or a function of (prompt ids, response ids), the end token
    included where it came. `token_reward` [S, V] adds a reward per step. `logits_ref` [S, V] is the reference
    (default: uniform). `beta` >= 0 in reward units per nat.

    `cut` says what reaching the horizon without the end token is to an estimator: "truncate" leaves the
    discount at gamma, so that it bootstraps from the value after the last step, "terminate" makes it 0. The
    world itself stops there either way, so that value is 0 and both are exact.

    Raises SteersmanError for tensors of the wrong shape, a reward that is not finite, or a negative beta.
    """

    def __init__(
        self,
        vocab: int,
        horizon: int,
        score: Tensor | Score,
        logits_ref: Tensor | None = None,
        beta: float = 0.0,
        *,
        eos: int = 0,
        prompts: int | Sequence[Sequence[int]] = 1,
        prompt_prob: Tensor | None = None,
        token_reward: Tensor | None = None,
        cut: Literal["truncate", "terminate"] = "truncate",
    ):
        super().__init__(vocab, horizon, eos=eos, prompts=prompts, prompt_prob=prompt_prob)
        self.beta, self.cut = beta, cut
        self.score = (score if isinstance(score, Tensor) else self._score_all(score)).to(torch.float64)
        if self.score.shape != (len(self),) or not self.score.isfinite().all():
            raise SteersmanError(
                f"the score must be {len(self)} finite numbers, one for every complete sequence; "
                f"got shape {list(self.score.shape)}"
            )
        if beta < 0:
            raise SteersmanError(f"beta {beta} is negative: it is the price of leaving the reference")
        zeros = torch.zeros(self.next_state.shape, dtype=torch.float64)
        self.logp_ref = torch.log_softmax(zeros if logits_ref is None else logits_ref.double(), -1)
        self.sequence_logp_ref = self.gather(self.logp_ref)
        if self.logp_ref.isnan().any():
            raise SteersmanError("logits_ref holds NaN, or a prefix after which every token is forbidden")
        at_end = torch.where(self.ending >= 0, self.score[self.ending], zeros)
        self.step_reward = at_end if token_reward is None else at_end + token_reward
        self.reward = self.gather(self.step_reward)
        self.total_reward = self.reward.sum(-1)
        if not self.total_reward.isfinite().all():
            raise SteersmanError("token_reward holds numbers that are not finite")

    def _score_all(self, score: Score) -> Tensor:
        answers = [tuple(row[:n].tolist()) for row, n in zip(self.sequences, self.length, strict=True)]
        rows = [score(self.prompts[int(k)], y) for k, y in zip(self.prompt, answers, strict=True)]
        return torch.tensor(rows, dtype=torch.float64)

    @classmethod
    def random(
        cls,
        vocab: int = 3,
        horizon: int = 3,
        beta: float = 0.0,
        *,
        seed: int = 0,
        prompts: int = 1,
        per_token: bool = False,
        cut: Literal["truncate", "terminate"] = "truncate",
    ) -> TokenMDP:
        """A language whose scores and reference logits (and rewards per token) are standard normal."""
        shape = Language(vocab, horizon, prompts=prompts)
        rng = torch.Generator().manual_seed(seed)
        score = torch.randn(len(shape), generator=rng, dtype=torch.float64)
        logits_ref = torch.randn(shape.next_state.shape, generator=rng, dtype=torch.float64)
        extra = torch.randn(shape.next_state.shape, generator=rng, dtype=torch.float64) if per_token else None
        return cls(vocab, horizon, score, logits_ref, beta, prompts=prompts, token_reward=extra, cut=cut)

    # What a policy is worth -------------------------------------------------------------------------------

    def expectation(self, logits: Float[Tensor, "S V"], f: Float[Tensor, " N"]) -> Float[Tensor, ""]:
        """E[f(x, y)] under the policy; sequences that it never makes count 0, whatever f is there."""
        prob = self.sequence_prob(logits)
        return (prob * torch.where(prob > 0, f, torch.zeros_like(f))).sum()

    def expected_reward(self, logits: Float[Tensor, "S V"]) -> Float[Tensor, ""]:
        """E[r(x, y)]."""
        return self.expectation(logits, self.total_reward)

    def kl(self, logits: Float[Tensor, "S V"]) -> Float[Tensor, ""]:
        """E_x KL(pi(.|x) || pi_ref(.|x)) over whole sequences, in nats."""
        return self.expectation(logits, self._log_ratio(logits).sum(-1))

    def entropy(self, logits: Float[Tensor, "S V"]) -> Float[Tensor, ""]:
        """E_x of the entropy of pi(.|x) over whole sequences, in nats."""
        logp = self.sequence_logp(logits)
        return -self.expectation(logits, torch.where(logp.isinf(), 0.0, logp).sum(-1))

    def objective(self, logits: Float[Tensor, "S V"], gamma: float = 1.0) -> Float[Tensor, ""]:
        """J(pi) = E[ sum_t gamma^t (r_t - beta log(pi/pi_ref)_t) ], differentiable; t counts from 0."""
        reward = self.reward
        if self.beta > 0:
            reward = reward - self.beta * self._log_ratio(logits)
        discount = gamma ** torch.arange(self.horizon, dtype=torch.float64)
        return self.expectation(logits, (discount * reward).sum(-1))

    def _log_ratio(self, logits: Tensor) -> Float[Tensor, "N T"]:
        # A token that the policy never takes has no ratio; 0 there keeps -inf - -inf out of the gradients.
        logp = self.sequence_logp(logits)
        return torch.where(logp.isinf(), 0.0, logp - self.sequence_logp_ref)

    def evaluate(
        self, logits: Float[Tensor, "S V"], gamma: float = 1.0, kl: bool = True
    ) -> tuple[Float[Tensor, " S"], Float[Tensor, "S V"]]:
        """(V^pi, Q^pi), differentiable.

        Q(s, a) = r(s, a) - beta log(pi(a|s) / pi_ref(a|s)) + gamma V(s'),   V(s) = sum_a pi(a|s) Q(s, a)

        The KL term is part of the step's reward, as the estimators see it; `kl=False` leaves it out.
        """
        logp = torch.log_softmax(logits, -1)
        prob, reward = logp.exp(), self.step_reward
        if kl and self.beta > 0:
            reward = reward - self.beta * torch.where(logp.isinf(), 0.0, logp - self.logp_ref)

        def backup(q: Tensor, level: slice) -> Tensor:
            return (prob[level] * torch.where(prob[level] > 0, q, 0.0)).sum(-1)

        return self._backward(reward, backup, gamma)

    def _backward(
        self, reward: Tensor, backup: Callable[[Tensor, slice], Tensor], gamma: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """From the last level to the first: Q = reward + gamma V(next), V = backup(Q); 0 after the end."""
        value, q = [reward.new_zeros(1)], []
        for level in reversed(self.levels):
            # value holds the levels below this one and one 0 at the end: numbers shift by where they start
            q.insert(0, reward[level] + gamma * torch.cat(value)[self.next_state[level] - level.stop])
            value.insert(0, backup(q[0], level))
        return torch.cat(value)[:-1], torch.cat(q)

    # The optimum ------------------------------------------------------------------------------------------

    def optimal_values(self) -> tuple[Float[Tensor, " S"], Float[Tensor, "S V"]]:
        """(V*, Q*) of the KL-regularised objective.

        Q*(s, a) = r(s, a) + V*(s'),   V*(s) = beta log sum_a pi_ref(a|s) exp(Q*(s, a) / beta)

        At beta = 0, V* is the maximum over the tokens that the reference allows: the limit beta -> 0.
        """

        def backup(q: Tensor, level: slice) -> Tensor:
            ref = self.logp_ref[level]
            if self.beta > 0:
                return self.beta * torch.logsumexp(ref + q / self.beta, -1)
            return torch.where(ref.isinf(), -torch.inf, q).amax(-1)

        return self._backward(self.step_reward, backup)

    def soft_value(self, beta: float) -> Float[Tensor, " K"]:
        """beta log E_{y ~ pi_ref(.|x)} exp(r(x, y) / beta) of each prompt, for a `beta` above 0 of one's own: V*(x)
        where it is the language's."""
        weight = self.sequence_logp_ref.sum(-1) + self.total_reward / beta
        own = self.prompt == torch.arange(len(self.prompts))[:, None]
        return beta * torch.logsumexp(torch.where(own, weight, -torch.inf), -1)

    def closed_form(self) -> tuple[Float[Tensor, " N"], Float[Tensor, " K"]]:
        """(log pi*(y|x), beta log Z(x)), straight from the definition over sequences.

        pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x). At beta = 0 the limit: the reference restricted to the
        sequences of largest reward, and that reward in the place of beta log Z.

        Source: arXiv 2305.18290, eq. 4.
        """
        logp_ref = self.sequence_logp_ref.sum(-1)
        own = self.prompt == torch.arange(len(self.prompts))[:, None]
        if self.beta > 0:
            value = self.soft_value(self.beta)
            return logp_ref + (self.total_reward - value[self.prompt]) / self.beta, value
        allowed = torch.where(logp_ref.isinf(), -torch.inf, self.total_reward)
        best = torch.where(own, allowed, -torch.inf).amax(-1)
        # sums of rewards per token may tie up to rounding
        weight = torch.where(allowed >= best[self.prompt] - 1e-12, logp_ref, -torch.inf)
        return weight - torch.logsumexp(torch.where(own, weight, -torch.inf), -1)[self.prompt], best

    def pi_star(self) -> Float[Tensor, "S V"]:
        """The optimal policy as per-token log-probabilities, factored from the closed form over sequences."""
        return torch.log_softmax(self.factor(self.closed_form()[0]), -1)

    def j_star(self) -> Float[Tensor, ""]:
        """J* = E_x[ beta log Z(x) ]: what no policy can exceed."""
        return (self.prompt_prob * self.closed_form()[1]).sum()

    # What estimators and losses are given -----------------------------------------------------------------

    def trajectory(
        self,
        logits: Float[Tensor, "S V"],
        rows: Int[Tensor, " B"] | None = None,
        *,
        gamma: float = 1.0,
        kl: bool = True,
        value: Tensor | None = None,
        group: Int[Tensor, " B"] | None = None,
    ) -> Trajectory:
        """The given sequences (default: all N of them) as the experience of a policy with these logits.

        reward_t = r_t - beta (logp_t - logp_ref_t) (`kl=False` leaves the second term out), the score arriving
        with the last token. `value` is a table over states [S], or [N, T+1] for every column of every sequence;
        by default the exact V^pi of the same reward and gamma. It is 0 after the last step, also where the
        sequence was cut, because nothing follows there. `group` is the prompt's number by default. Nothing
        carries a gradient.
        """
        logits = logits.detach()
        rows = torch.arange(len(self)) if rows is None else rows
        logp = self.sequence_logp(logits)
        reward = self.reward - self.beta * self._log_ratio(logits) if kl else self.reward
        if value is None:
            value = self.evaluate(logits, gamma, kl)[0]
        value = self.along(value, rows) if value.ndim == 1 else value[rows]
        last = torch.arange(self.horizon) == self.length[:, None] - 1
        ends = self.terminated if self.cut == "truncate" else torch.ones_like(self.terminated)
        discount = gamma * (self.mask & ~(last & ends[:, None])).double()
        return Trajectory(
            mask=self.mask[rows],
            reward=reward[rows],
            discount=discount[rows],
            logp_old=logp[rows],
            logp_ref=self.sequence_logp_ref[rows],
            value=value.detach(),
            group=self.prompt[rows] if group is None else group,
            score=self.total_reward[rows],
        )

    def preference_pairs(self) -> Pairs:
        """Every ordered pair of different answers, drawn from the reference, judged by Bradley-Terry.

        weight(x, y1, y2) is proportional to pi_ref(y1|x) pi_ref(y2|x) within a prompt and adds up to rho(x);
        p(y1 > y2) = sigmoid(r(x, y1) - r(x, y2)). A prompt with one possible answer has no pairs.
        """
        first, second = torch.nonzero(
            (self.prompt[:, None] == self.prompt) & ~torch.eye(len(self), dtype=torch.bool), as_tuple=True
        )
        logp = self.sequence_logp_ref.sum(-1)
        weight = (logp[first] + logp[second]).exp()
        total = torch.zeros_like(self.prompt_prob).index_add(0, self.prompt[first], weight)
        weight = weight / total[self.prompt[first]] * self.prompt_prob[self.prompt[first]]
        return Pairs(first, second, weight, torch.sigmoid(self.total_reward[first] - self.total_reward[second]))
