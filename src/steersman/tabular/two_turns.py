"""A game of two turns, every course of it known: the policy acts, the world answers at random, and again the policy.

It is a language of three steps in which the second token is the world's. The world may also end the game there. The
policy is given what a loop makes of an episode: one row, with a hole in the mask where the world spoke.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steersman.tabular.token_mdp import TokenMDP
from steersman.types import Trajectory


class TwoTurns(TokenMDP):
    """States of two tokens' length are the policy's, those of one the world's, with the logits `world` [S, V].

    What the world pays for its answer is paid to the action before it, and its token takes no time: gamma counts once
    a turn. With `by_turn` the turns are numbered, for baselines that compare turn with turn.
    """

    def __init__(self, vocab: int = 3, beta: float = 0.5, *, seed: int = 0, by_turn: bool = False):
        self.by_turn = by_turn
        rng = torch.Generator().manual_seed(seed)
        base = TokenMDP.random(vocab, 3, beta, seed=seed, per_token=True)
        self.world = torch.randn(base.next_state.shape, generator=rng, dtype=torch.float64)
        answers = base.state_length[:, None] == 1
        logits_ref = torch.where(answers, self.world, base.logp_ref)
        super().__init__(
            vocab, 3, base.score, logits_ref, beta, token_reward=torch.randn(
                base.next_state.shape, generator=rng, dtype=torch.float64
            ),
        )  # fmt: skip

    def logits(self, own: Float[Tensor, "S V"]) -> Float[Tensor, "S V"]:
        """The policy's logits, with the world's where it answers."""
        return torch.where(self.state_length[:, None] == 1, self.world, own)

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
        """As of any language, with the world's token under a False mask and its pay at the action before."""
        traj = super().trajectory(logits, rows, gamma=gamma, kl=kl, value=value, group=group)
        ended = traj.mask.sum(1) == 2
        traj.reward[:, 0] += traj.reward[:, 1]
        traj.discount[ended, 0] = 0.0
        traj.mask = traj.mask.clone()
        traj.mask[:, 1] = False
        if self.by_turn:
            traj.turn = torch.tensor([0, 0, 1]).expand(traj.mask.shape)
        # what stands under the mask must be read by nobody
        for x in (traj.reward, traj.discount, traj.logp_old, traj.logp_ref, traj.value):
            if x is not None:
                x[:, 1] = 50.0
        return traj
