"""Gymnasium's toy-text environments as Markov decision processes. The one module here that knows Gymnasium."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from steersman.tabular.mdp import MDP
from steersman.types import SteersmanError


def from_gymnasium(env: Any, discount: float) -> MDP:
    """The process behind FrozenLake, Taxi, CliffWalking, or any environment with a table `P`.

    `env` is an environment or the name of one. A transition that terminates leads to one more state, the last,
    that is never left: some of these tables go on after the end. Step limits are not part of the process.

    Raises SteersmanError for an environment that has no table.
    """
    if isinstance(env, str):
        import gymnasium

        env = gymnasium.make(env)
    table = getattr(env.unwrapped, "P", None)
    if not isinstance(table, dict):
        raise SteersmanError(
            f"{env.unwrapped} has no transition table P: only tabular environments such as FrozenLake-v1, "
            "Taxi and CliffWalking can be read as a process"
        )
    S, A = len(table), len(table[0])
    P = np.zeros((S + 1, A, S + 1))
    R = np.zeros((S + 1, A))
    P[S, :, S] = 1
    for s, choices in table.items():
        for a, outcomes in choices.items():
            for prob, after, reward, terminated in outcomes:
                P[s, a, S if terminated else after] += prob
                R[s, a] += prob * reward
    begin = getattr(env.unwrapped, "initial_state_distrib", None)
    start = np.full(S, 1 / S) if begin is None else np.asarray(begin, dtype=np.float64)
    return MDP(torch.from_numpy(P), torch.from_numpy(R), discount, torch.from_numpy(np.append(start, 0.0)))
