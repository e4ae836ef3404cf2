"""Prompts drawn by difficulty: the expected gradient over every batch, weighted, beside the exact one."""

from __future__ import annotations

import torch
from torch import Tensor

from steersman.algorithms import Algorithm
from steersman.tabular.oracle import OracleBatch, exact_gradient, expected_gradient, relative_deviation
from steersman.tabular.token_mdp import TokenMDP
from steersman.verify.gradient import arbitrary_critic, batch_loss, unbiased

CHANCES = (0.6, 0.3, 0.1)
"""How often each of three prompts is drawn; all count alike in J."""


def example() -> tuple[TokenMDP, Tensor]:
    """Three prompts with seven answers each, and the logits of some policy."""
    mdp = TokenMDP.random(3, 2, 0.0, seed=4, prompts=len(CHANCES))
    generator = torch.Generator().manual_seed(5)
    return mdp, torch.randn(mdp.next_state.shape, generator=generator, dtype=torch.float64)


def check_curriculum(algorithm: Algorithm) -> float:
    """The relative deviation of a method's expected gradient from the exact one of J, in which all prompts count
    alike: without its named biases, on prompts drawn by `CHANCES` with the weight 1 / (N q)."""
    mdp, policy = example()
    algorithm = unbiased(algorithm).model_copy(update={"beta": mdp.beta})
    exact, size = -exact_gradient(mdp, policy), 2
    mdp.prompt_prob = torch.tensor(CHANCES, dtype=torch.float64)
    weight = 1 / (len(CHANCES) * mdp.prompt_prob)
    rescale = size / (size - 1) if algorithm.own_in_baseline else 1.0

    plain = batch_loss(algorithm, mdp, policy)

    def loss(batch: OracleBatch) -> Tensor:
        batch.trajectory.weight = weight[mdp.prompt[batch.rows]]
        return plain(batch)

    leaf = policy.detach().requires_grad_()
    found = expected_gradient(
        mdp, leaf, loss, [leaf], size=size if algorithm.group else 1, count=1 if algorithm.group else size,
        kl=algorithm.kl_in == "reward", value=arbitrary_critic(mdp), stacked=False,
    )  # fmt: skip
    return relative_deviation(rescale * found, exact)
