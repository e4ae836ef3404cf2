"""Is a method's gradient estimator unbiased over episodes of two turns, with a world that answers at random?"""

from __future__ import annotations

import torch
from torch import Tensor

from steersman.advantage.gae import gae
from steersman.algorithms import Algorithm
from steersman.tabular.token_mdp import TokenMDP
from steersman.tabular.two_turns import TwoTurns
from steersman.types import Trajectory
from steersman.verify.gradient import GradientCheck, arbitrary_critic, check_gradient


def check_turns(algorithm: Algorithm, seed: int = 5) -> GradientCheck:
    """The method's expected gradient over every batch of episodes, the world's answers included.

    The policy's own logits alone are differentiated; the world's are fixed. A method that compares the samples of a
    prompt is tried both ways, episode with episode and turn with turn; the worse of the two is told.
    """
    ways = (False,) if algorithm.turns_refused() else (False, True)
    found = [_checked(algorithm, TwoTurns(seed=seed, by_turn=way), seed) for way in ways]
    return GradientCheck(max(x.shipped for x in found), max(x.core for x in found), min(x.cosine for x in found))


def _checked(algorithm: Algorithm, game: TwoTurns, seed: int) -> GradientCheck:
    rng = torch.Generator().manual_seed(seed)
    own = torch.randn(game.next_state.shape, generator=rng, dtype=torch.float64).requires_grad_()
    return check_gradient(algorithm, game, lambda: game.logits(own), [own])


def discount_counts_turns(mdp: TokenMDP, logits: Tensor) -> float:
    """E[A | a] + V = E[r_1 + gamma r_2 | a] at the first turn, whatever the critic, with r_k all that turn k is paid.

    The language of `mdp` lends its logits; the game is one of two turns.
    """
    game, gamma = TwoTurns(seed=5, beta=0.0), 0.6
    traj = game.trajectory(game.logits(logits), gamma=gamma, value=arbitrary_critic(game))
    return float((_first_turn(game, logits, traj) - _earned(game, logits, gamma)).abs().max())


def cut_turns_bootstrap(mdp: TokenMDP, logits: Tensor) -> float:
    """The same where every episode that goes on is cut after its first turn, the world's answer included, and the
    exact critic stands for the second."""
    game, gamma = TwoTurns(seed=5, beta=0.0), 0.6
    made = game.logits(logits)
    traj = game.trajectory(made, gamma=gamma, value=arbitrary_critic(game))
    assert traj.value is not None
    exact, _ = game.evaluate(made)  # the last level is the policy's alone: no discount inside it
    goes_on = traj.mask.sum(1) == 2
    traj.mask, traj.value = traj.mask.clone(), traj.value.clone()
    traj.mask[:, 1:] = False
    traj.value[:, 1] = torch.cat([exact, exact.new_zeros(1)])[game.path[:, 2]]
    traj.discount[:, 0] = gamma * goes_on.to(traj.discount)
    return float((_first_turn(game, logits, traj) - _earned(game, logits, gamma)).abs().max())


def _first_turn(game: TwoTurns, logits: Tensor, traj: Trajectory) -> Tensor:
    """E[A_1 + V | a_1] by GAE with lam = 1, over all episodes `[V]`."""
    assert traj.value is not None
    return _given_first(game, logits, gae(traj, 1.0).adv[:, 0] + traj.value[:, 0])


def _earned(game: TwoTurns, logits: Tensor, gamma: float) -> Tensor:
    """E[r_1 + gamma r_2 | a_1] from the rewards of the language, without a trajectory."""
    return _given_first(game, logits, game.reward[:, :2].sum(1) + gamma * game.reward[:, 2])


def _given_first(game: TwoTurns, logits: Tensor, x: Tensor) -> Tensor:
    """E[x | a_1], for each first token `[V]`."""
    prob, first = game.sequence_prob(game.logits(logits)), game.sequences[:, 0]
    total, often = torch.zeros(2, int(first.max()) + 1, dtype=torch.float64).unbind(0)
    return total.index_add(0, first, prob * x) / often.index_add(0, first, prob)
