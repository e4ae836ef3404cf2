"""Steps of environments side by side, collected as rows: one for each episode or fragment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steersman.control.envs import Worlds
from steersman.types import SteersmanError

LONGEST = 100_000
"""An episode that is to be learned from whole may not be longer than this many steps."""
CUT = 10_000
"""Steps after which an episode that is only looked at is cut, where the environment names no limit of its own."""

Act = Callable[[Tensor], Tensor]
"""Observations [N, D] to actions [N] or [N, A], in the policy's own units."""


@dataclass(slots=True)
class Experience:
    """What was seen and done. Row b is one episode or a fragment of one, left-aligned; `length` [B] its steps.

    `obs` has one column more than there are steps: the column at a row's length is the observation after its last
    step. `terminated` [B] says that the row's last step ended its episode; a row that a time limit or the end of
    the collection cut is not terminated. `returns` and `lengths` are of the episodes that ended, in the rewards
    that the environment gave, whole, also where their earlier steps lie in earlier experience. `begun` [B] says at
    which step of the collection a row begins: step t of row b was taken at begun[b] + t, in all copies at once.
    """

    obs: Float[Tensor, "B T+1 D"]
    action: Tensor
    reward: Float[Tensor, "B T"]
    length: Int[Tensor, " B"]
    begun: Int[Tensor, " B"]
    terminated: Bool[Tensor, " B"]
    returns: list[float]
    lengths: list[int]

    @property
    def mask(self) -> Bool[Tensor, "B T"]:
        return torch.arange(self.reward.shape[1]) < self.length[:, None]

    def discount(self, gamma: float) -> Float[Tensor, "B T"]:
        """gamma * (1 - terminated), 0 in the padding."""
        last = torch.arange(self.reward.shape[1]) == self.length[:, None] - 1
        return gamma * (self.mask & ~(last & self.terminated[:, None])).float()


def collect(worlds: Worlds, act: Act, steps: int) -> Experience:
    """`steps` steps of every copy, begun where the last collection stopped; rows are split where episodes end."""
    tape = _Tape(worlds)
    for _ in range(steps):
        tape.step(act)
    return tape.experience()


def collect_episodes(worlds: Worlds, act: Act, episodes: int) -> Experience:
    """Exactly `episodes` whole episodes, all begun here.

    Every episode that is begun is played to its end, so short ones are not drawn more often than long ones. Copies
    with nothing left to begin go on, unrecorded, until the last one is done.

    Raises SteersmanError for an episode of more than `LONGEST` steps.
    """
    tape = _Tape(worlds)

    def step(live: np.ndarray) -> np.ndarray:
        tape.live = live
        ended = tape.step(act)
        if (live & (worlds.steps >= LONGEST)).any():
            raise SteersmanError(
                f"an episode has no end after {LONGEST:,} steps, and rollout.episodes asks for whole ones; set it to "
                "null if the method has a critic, or give the environment a limit (--env_options.max_episode_steps; "
                "an environment of your own has to say truncated)"
            )
        return ended

    _play(worlds, episodes, step)
    return tape.experience()


@dataclass(slots=True)
class Played:
    """What is kept of episodes that nothing learns from: of each its return, in the rewards that the environment
    gave, and its steps. `cut` of them had no end when they were cut, and count as far as they went."""

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    cut: int = 0


def play_episodes(worlds: Worlds, act: Act, episodes: int, stopping: Callable[[], bool]) -> Played | None:
    """Exactly `episodes` episodes, all begun here, as `collect_episodes` chooses them; None once `stopping` says so.

    An episode that has not ended after `longest(worlds)` steps is cut there.
    """
    played, limit = Played(), longest(worlds)

    def step(live: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            _, _, terminated, truncated = worlds.step(act(worlds.obs))
        ended = terminated | truncated
        over = ended | (worlds.steps >= limit)
        for i in np.flatnonzero(over & live):
            played.returns.append(float(worlds.returns[i]))
            played.lengths.append(int(worlds.steps[i]))
            played.cut += int(not ended[i])
        worlds.begin(over)
        return over

    return played if _play(worlds, episodes, step, stopping) else None


def longest(worlds: Worlds) -> int:
    """The most steps of an episode that is looked at."""
    return worlds.own_limit or CUT


def _play(
    worlds: Worlds,
    episodes: int,
    step: Callable[[np.ndarray], np.ndarray],
    stopping: Callable[[], bool] = lambda: False,
) -> bool:
    """Has `step` called until `episodes` episodes, begun here, are over; False where `stopping` ended it before.

    `step` is given the copies whose episodes count, and says in which copies one is over.
    """
    worlds.begin(worlds.steps > 0)
    live = np.arange(worlds.count) < episodes
    begun = int(live.sum())
    while live.any():
        if stopping():
            return False
        over = step(live)
        for i in np.flatnonzero(over & live):
            live[i] = begun < episodes
            begun += int(live[i])
    return True


class _Tape:
    """Records steps of all copies, then cuts the recording into rows."""

    def __init__(self, worlds: Worlds) -> None:
        self.worlds, self.live = worlds, np.ones(worlds.count, dtype=bool)
        self.frames: list[tuple[Tensor, Tensor, Tensor, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self.returns: list[float] = []
        self.lengths: list[int] = []

    def step(self, act: Act) -> np.ndarray:
        worlds, obs = self.worlds, self.worlds.obs
        with torch.no_grad():
            action = act(obs)
        after, reward, terminated, truncated = worlds.step(action)
        ended = terminated | truncated
        self.frames.append((obs, action.cpu(), after, reward, terminated, ended, self.live.copy()))
        for i in np.flatnonzero(ended & self.live):
            self.returns.append(float(worlds.returns[i]))
            self.lengths.append(int(worlds.steps[i]))
        if ended.any():
            worlds.begin(ended)
        return ended

    def experience(self) -> Experience:
        obs, action, after, reward, terminated, ended, live = zip(*self.frames, strict=True)
        ends, alive = np.stack(ended), np.stack(live)
        rows = [row for i in range(self.worlds.count) for row in _rows(ends[:, i], alive[:, i], i)]
        B, T = len(rows), max(stop - start for _, start, stop in rows)
        obs, action, after = torch.stack(obs), torch.stack(action), torch.stack(after)
        reward, over = torch.from_numpy(np.stack(reward)).float(), torch.from_numpy(np.stack(terminated))
        out = Experience(
            obs=torch.zeros(B, T + 1, obs.shape[-1]),
            action=torch.zeros(B, T, *action.shape[2:], dtype=action.dtype),
            reward=torch.zeros(B, T),
            length=torch.tensor([stop - start for _, start, stop in rows]),
            begun=torch.tensor([start for _, start, _ in rows]),
            terminated=torch.stack([over[stop - 1, i] for i, _, stop in rows]),
            returns=self.returns,
            lengths=self.lengths,
        )
        for b, (i, start, stop) in enumerate(rows):
            n = stop - start
            out.obs[b, :n], out.obs[b, n] = obs[start:stop, i], after[stop - 1, i]
            out.action[b, :n], out.reward[b, :n] = action[start:stop, i], reward[start:stop, i]
        return out


def _rows(ended: np.ndarray, live: np.ndarray, i: int) -> list[tuple[int, int, int]]:
    """(copy, first step, one past the last step) of each episode or fragment that was live."""
    stops = [int(t) + 1 for t in np.flatnonzero(ended)]
    if not stops or stops[-1] < len(ended):
        stops.append(len(ended))
    starts = [0, *stops[:-1]]
    return [(i, start, stop) for start, stop in zip(starts, stops, strict=True) if live[start]]
