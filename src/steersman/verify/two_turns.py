"""Is a method's gradient estimator unbiased over episodes of two turns, with a world that answers at random?"""

from __future__ import annotations

import torch

from steersman.algorithms import Algorithm
from steersman.tabular.two_turns import TwoTurns
from steersman.verify.gradient import GradientCheck, check_gradient


def check_turns(algorithm: Algorithm, seed: int = 5) -> GradientCheck:
    """The method's expected gradient over every batch of episodes, the world's answers included.

    The policy's own logits alone are differentiated; the world's are fixed.
    """
    game = TwoTurns(seed=seed)
    rng = torch.Generator().manual_seed(seed)
    own = torch.randn(game.next_state.shape, generator=rng, dtype=torch.float64).requires_grad_()
    return check_gradient(algorithm, game, lambda: game.logits(own), [own])
