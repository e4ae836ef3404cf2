"""Is a method's gradient estimator unbiased? Its expectation over every possible batch, beside the exact one.

Two answers for each method. As shipped: its own advantage, loss and averaging on the batch that it would draw.
Core: the same code with the biases that it names switched off (whitening, division by a deviation or a random
length, a KL term in the loss, the sample inside its own baseline, a mask), which must leave the exact gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from steersman.advantage.by_turn import by_turn
from steersman.advantage.returns import episode_return
from steersman.algorithms import Algorithm, Coefficients
from steersman.loss.reduce import denominator, reduce, token_weight
from steersman.ops.distributions import top_p_mask
from steersman.tabular.oracle import OracleBatch, Table, exact_gradient, expected_gradient, relative_deviation
from steersman.tabular.token_mdp import TokenMDP
from steersman.types import Trajectory
from steersman.update.on_policy import policy_loss
from steersman.update.returned import advantage_of

SIZE = 2
"""Answers per prompt of a group method, and prompts per batch of the others, in the enumeration."""

OFF = {
    "average": "episode", "kl_in": "reward", "kl_estimator": "k1", "whiten": False, "lam": 1.0, "scale": "none",
    "mask_top_p": 1.0, "reweigh": False, "keep": 1.0, "length_alpha": None, "imitate": 0.0, "cov_share": 0.0, "k": 1,
}  # fmt: skip
"""The settings that switch a named bias off, whichever of them a method has."""


@dataclass(slots=True)
class GradientCheck:
    """Largest relative deviation from the exact gradient, as shipped and with the named biases switched off.

    `cosine` is that of the shipped estimator's expectation with the exact gradient: a method that standardises
    its advantages changes the gradient's size on purpose, and what matters then is where it points.
    """

    shipped: float
    core: float
    cosine: float


def example() -> tuple[TokenMDP, Tensor]:
    """Fifteen sentences of one to three words, rewards per token and per sentence, and the logits of some policy."""
    mdp = TokenMDP.random(3, 3, 0.5, seed=2, per_token=True)
    generator = torch.Generator().manual_seed(3)
    return mdp, torch.randn(mdp.next_state.shape, generator=generator, dtype=torch.float64)


def check_gradient(
    algorithm: Algorithm, mdp: TokenMDP, policy: Table, params: Sequence[Tensor] | None = None, size: int = SIZE
) -> GradientCheck:
    """The method's expected gradient at a policy, by enumerating every batch that it could draw.

    `policy` is a table of logits [S, V], or a function that makes them from `params`, such as a transformer's. A
    batch is one prompt with `size` answers for group methods, `size` prompts for the others. The critic is a table
    of arbitrary numbers and lam is 1 in the core, so that nothing leans on its being right.
    """
    algorithm = algorithm.model_copy(update={"beta": mdp.beta})
    found, exact = _expected_and_exact(algorithm, mdp, policy, params, size)
    core, core_exact = _expected_and_exact(unbiased(algorithm), mdp, policy, params, size)
    # subtracting a group's mean, the sample included, scales the gradient by (G - 1) / G
    rescale, scale = size / (size - 1) if algorithm.own_in_baseline else 1.0, algorithm.gradient_scale()
    return GradientCheck(
        relative_deviation(found / scale, exact),
        relative_deviation(rescale * core / scale, core_exact),
        float(torch.cosine_similarity(found, exact, 0)),
    )


def expected(algorithm: Algorithm) -> tuple[Tensor, Tensor]:
    """The method's expected gradient in the example, as shipped and with the named biases switched off."""
    mdp, policy = example()
    algorithm = algorithm.model_copy(update={"beta": mdp.beta})
    shipped, _ = _expected_and_exact(algorithm, mdp, policy, None, SIZE)
    return shipped, _expected_and_exact(unbiased(algorithm), mdp, policy, None, SIZE)[0]


def unbiased(algorithm: Algorithm) -> Algorithm:
    """The method with every setting of OFF that it has and reads."""
    has = type(algorithm).model_fields.keys() - set(algorithm.unread)
    return algorithm.model_copy(update={k: v for k, v in OFF.items() if k in has})


def _expected_and_exact(
    algorithm: Algorithm, mdp: TokenMDP, policy: Table, params: Sequence[Tensor] | None, size: int
) -> tuple[Tensor, Tensor]:
    """The gradient that is descended, and minus the exact one of J, both at the policy that is sampled from."""
    now = masked(algorithm, policy.detach() if isinstance(policy, Tensor) else policy().detach(), mdp.eos)

    def limited() -> Tensor:
        made = policy if isinstance(policy, Tensor) else policy()
        return made.masked_fill(now.isinf(), -torch.inf)

    if params is None:
        assert isinstance(policy, Tensor)
        policy = policy.detach().requires_grad_()
        params = [policy]
    found = expected_gradient(
        mdp,
        limited,
        batch_loss(algorithm, mdp, now),
        params,
        size=size if algorithm.group else 1,
        count=1 if algorithm.group else size,
        kl=algorithm.kl_in == "reward",
        value=arbitrary_critic(mdp),
        stacked=False,
    )
    return found, -exact_gradient(mdp, limited, params)


def masked(algorithm: Algorithm, logits: Tensor, end: int) -> Tensor:
    """The policy that a method samples from; NLPO's is limited to the top-p set of the masking policy and the end
    token."""
    mask = algorithm.sampling_mask()
    if mask is None:
        return logits
    allowed = top_p_mask(logits, mask.top_p, mask.min_tokens)
    allowed[:, end] = True
    return logits.masked_fill(~allowed, -torch.inf)


def arbitrary_critic(mdp: TokenMDP) -> Tensor:
    """Values `[S]` that have nothing to do with the problem."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(len(mdp.states), generator=generator, dtype=torch.float64)


def batch_loss(algorithm: Algorithm, mdp: TokenMDP, logits: Tensor) -> Callable[[OracleBatch], Tensor]:
    """The number whose gradient the method descends, for one draw of a batch."""
    coef = Coefficients(beta=mdp.beta, beta_old=1.0)
    of_prompt = prompt_baseline(algorithm, mdp, logits)

    def loss(batch: OracleBatch) -> Tensor:
        traj = batch.trajectory
        if of_prompt is not None:
            traj.baseline = of_prompt[mdp.prompt[batch.rows]]
        elif algorithm.baseline == "moving":
            traj.baseline = torch.full_like(traj.reward[:, 0], 0.3)
        return loss_given(
            algorithm, by_turn(partial(advantage_of, algorithm, finite=False), traj).adv, batch.logp, traj, coef
        )

    return loss


def prompt_baseline(algorithm: Algorithm, mdp: TokenMDP, logits: Tensor) -> Tensor | None:
    """What a method compares the answers to each prompt with, exactly, `[K]`: the greedy answer's return, or the
    optimal value; None for other methods."""
    wanted = algorithm.optimal_value()
    if wanted is not None:
        return mdp.soft_value(wanted.beta)
    return episode_return(mdp.trajectory(logits, mdp.greedy(logits))) if algorithm.baseline == "greedy" else None


def loss_given(algorithm: Algorithm, adv: Tensor, logp: Tensor, traj: Trajectory, coef: Coefficients) -> Tensor:
    """The policy's loss on one whole batch, as one number."""
    per_step = policy_loss(algorithm, logp, traj, adv, coef)
    weight = token_weight(traj.mask, algorithm.average, dtype=logp.dtype)
    return reduce(per_step, weight, denominator(traj.mask, algorithm.average))


def gap(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference between two tensors of one shape."""
    return float((a - b).abs().max())
