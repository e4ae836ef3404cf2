"""Collection on a hand-made environment whose every number is known, and on real ones."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from steersman.advantage.gae import gae
from steersman.advantage.returns import return_to_go
from steersman.control.envs import Normaliser, Worlds, maker
from steersman.control.experience import Experience, collect, collect_episodes
from steersman.types import SteersmanError, Trajectory


class Counter(gym.Env):
    """Counts its steps. Observation (episode's length, step); reward 10 * length + step.

    Odd-numbered lengths terminate, even ones are truncated. Lengths follow from the seed of the reset.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Discrete(3, start=5)
    lengths: tuple[int, ...] = (2, 3, 5, 4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.t = self.lengths[int(self.np_random.integers(len(self.lengths)))], 0
        return np.array([self.length, 0.0]), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        assert self.t < self.length, "stepped after its end"
        self.t += 1
        end = self.t == self.length
        odd = self.length % 2 == 1
        return np.array([self.length, self.t], float), 10.0 * self.length + self.t, end and odd, end and not odd, {}


def zeros(obs: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(obs), dtype=torch.int64)


@pytest.fixture
def worlds() -> Worlds:
    return Worlds(Counter, 3, 0, "test")


def whole(seen: Experience, b: int) -> bool:
    """Whether the row reaches its episode's end."""
    return float(seen.obs[b, seen.length[b], 1]) == float(seen.obs[b, 0, 0])


def test_rows_hold_each_step_once_and_the_episodes_own_last_observation(worlds):
    seen = collect(worlds, zeros, 17)
    assert int(seen.length.sum()) == 3 * 17 == int(seen.mask.sum())
    for b, n in enumerate(seen.length.tolist()):
        length, first = seen.obs[b, 0].tolist()
        assert torch.equal(seen.obs[b, : n + 1, 0], torch.full((n + 1,), length)), "a row mixes two episodes"
        assert torch.equal(seen.obs[b, : n + 1, 1], first + torch.arange(n + 1.0)), "a step is missing or doubled"
        assert torch.equal(seen.reward[b, :n], 10 * length + seen.obs[b, 1 : n + 1, 1])
        assert bool(seen.terminated[b]) == (whole(seen, b) and length % 2 == 1)
        assert torch.equal(seen.reward[b, n:], torch.zeros(seen.reward.shape[1] - n))
    finished = [b for b in range(len(seen.length)) if whole(seen, b)]
    assert sorted(seen.lengths) == sorted(int(seen.obs[b, 0, 0]) for b in finished)
    assert sorted(seen.returns) == sorted(sum(10.0 * n + t for t in range(1, n + 1)) for n in seen.lengths)


def test_next_collection_goes_on_where_the_last_one_stopped():
    together, apart = Worlds(Counter, 3, 0, "test"), Worlds(Counter, 3, 0, "test")
    all_at_once = collect(together, zeros, 12)
    parts = [collect(apart, zeros, 5), collect(apart, zeros, 7)]
    for i in ("obs", "reward"):
        many = sum(float(getattr(p, i)[:, : p.reward.shape[1]][p.mask].double().sum()) for p in parts)
        once = getattr(all_at_once, i)[:, : all_at_once.reward.shape[1]][all_at_once.mask].double().sum()
        assert many == float(once)
    assert sorted(all_at_once.returns) == sorted(parts[0].returns + parts[1].returns), "a return lost its first part"


def test_truncation_bootstraps_and_termination_does_not(worlds):
    """Against a loop in float64 over each row, with V(obs) = 100 * length + step."""
    gamma, lam = 0.9, 0.8
    seen = collect(worlds, zeros, 17)
    value = 100 * seen.obs[..., 0] + seen.obs[..., 1]
    traj = Trajectory(seen.mask, seen.reward, seen.discount(gamma), torch.zeros_like(seen.reward), value=value)
    adv, ret = gae(traj, lam)
    assert {bool(t) for t in seen.terminated} == {True, False}
    for b, n in enumerate(seen.length.tolist()):
        v = [100 * x + y for x, y in seen.obs[b, : n + 1].tolist()]
        if bool(seen.terminated[b]):
            v[n] = 0.0
        carry, monte_carlo = 0.0, v[n]
        for t in reversed(range(n)):
            r = float(seen.reward[b, t])
            carry = r + gamma * v[t + 1] - v[t] + gamma * lam * carry
            monte_carlo = r + gamma * monte_carlo
            assert float(adv[b, t]) == pytest.approx(carry, rel=1e-5)
            assert float(ret[b, t]) == pytest.approx(carry + v[t], rel=1e-5)
            assert float(return_to_go(traj)[b, t]) == pytest.approx(monte_carlo, rel=1e-5)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_same_transitions_as_gymnasiums_own_autoreset(mode):
    """CartPole by the library's autoreset, phantom steps and final_obs handled by hand, gives the same episodes."""
    make = maker("CartPole-v1", {"max_episode_steps": 15})
    worlds = Worlds(make, 2, 3, "test")
    first = worlds.obs.clone()
    seen = collect(worlds, zeros, 30)
    vector = SyncVectorEnv([make] * 2, autoreset_mode=mode)
    obs, _ = vector.reset(seed=[worlds_seed(3, i) for i in range(2)])
    assert np.array_equal(obs.astype(np.float32), first.numpy())
    rows: list[list[np.ndarray]] = [[obs[0]], [obs[1]]]
    over, terminated_at = [False, False], [False, False]
    for _ in range(15):
        obs, _, terminated, truncated, info = vector.step(np.zeros(2, dtype=np.int64))
        for i in range(2):
            if over[i]:
                continue
            end = bool(terminated[i] or truncated[i])
            rows[i].append(info["final_obs"][i] if end and mode is AutoresetMode.SAME_STEP else obs[i])
            over[i], terminated_at[i] = end, bool(terminated[i])
    ours = {0: 0, 1: int((seen.obs[:, 0] == first[1]).all(-1).nonzero()[0])}
    for i, b in ours.items():
        n = int(seen.length[b])
        assert over[i]
        assert np.array_equal(np.array(rows[i], dtype=np.float32), seen.obs[b, : n + 1].numpy())
        assert bool(seen.terminated[b]) == terminated_at[i]


def worlds_seed(seed: int, i: int) -> int:
    from steersman.run.seed import sub_seed

    return sub_seed(seed, "test", "episode", i, 0)


@pytest.mark.parametrize(("copies", "episodes"), [(3, 7), (4, 2), (1, 3), (3, 3)])
def test_whole_episodes_are_exactly_as_many_as_asked_and_end(copies, episodes):
    worlds = Worlds(Counter, copies, 1, "test")
    for _ in range(2):
        seen = collect_episodes(worlds, zeros, episodes)
        assert len(seen.length) == episodes == len(seen.returns)
        assert all(whole(seen, b) and float(seen.obs[b, 0, 1]) == 0 for b in range(episodes))


def test_episodes_are_not_chosen_by_their_length():
    """Of the first episodes to end the short ones are too many; of those begun they are not."""
    worlds = Worlds(Counter, 20, 2, "test")
    lengths = [n for _ in range(60) for n in collect_episodes(worlds, zeros, 20).lengths]
    assert np.mean(lengths) == pytest.approx(np.mean(Counter.lengths), abs=0.12)


def test_state_round_trip_plays_episodes_again():
    for name, count in (("CartPole-v1", 3), ("Pendulum-v1", 2)):
        worlds = Worlds(maker(name, {}), count, 0, "test")
        act = noise(worlds, 0)
        collect(worlds, act, 37)
        again = Worlds(maker(name, {}), count, 0, "test")
        again.load_state_dict(worlds.state_dict())
        assert torch.equal(worlds.obs, again.obs)
        a, b = collect(worlds, noise(worlds, 1), 50), collect(again, noise(again, 1), 50)
        assert torch.equal(a.obs, b.obs)
        assert torch.equal(a.reward, b.reward)
        assert a.returns == b.returns


def noise(worlds: Worlds, seed: int):
    generator = torch.Generator().manual_seed(seed)
    if isinstance(worlds.action_space, spaces.Discrete):
        return lambda obs: torch.randint(worlds.actions, (len(obs),), generator=generator)
    return lambda obs: torch.randn(len(obs), worlds.actions, generator=generator)


def test_actions_are_scaled_to_the_box_and_clipped():
    worlds = Worlds(maker("Pendulum-v1", {}), 2, 0, "test")  # torque in [-2, 2]
    assert worlds._given(torch.tensor([[0.5], [7.0]])).tolist() == [[1.0], [2.0]]


def test_discrete_observations_are_one_hot():
    worlds = Worlds(maker("FrozenLake-v1", {}), 2, 0, "test")
    assert worlds.obs.tolist() == [[1.0] + [0.0] * 15] * 2


def test_normaliser_is_mean_and_variance_of_all_it_saw():
    torch.manual_seed(0)
    data = torch.randn(500, 3) * torch.tensor([1.0, 10.0, 0.1]) + 5
    normaliser = Normaliser(3)
    assert torch.equal(normaliser(data), data)
    for part in data.split([100, 1, 399]):
        normaliser.update(part)
    torch.testing.assert_close(normaliser.mean.float(), data.mean(0))
    torch.testing.assert_close(
        normaliser(data), (data - data.mean(0)) / data.std(0, correction=0), rtol=1e-4, atol=1e-4
    )
    level = torch.tensor([100.1, -1000.7, 3.3, 1e6, 0.0]).expand(300, 5)
    constant = Normaliser(5)
    for part in level.split([100, 1, 199]):
        constant.update(part)
    torch.testing.assert_close(constant(level), torch.zeros(300, 5), rtol=0, atol=1e-5)
    other = Normaliser(3)
    other.load_state_dict(normaliser.state_dict())
    assert torch.equal(other(data), normaliser(data))


@pytest.mark.parametrize(
    ("observation", "action", "named"),
    [
        (spaces.Dict({"a": spaces.Discrete(2)}), spaces.Discrete(2), "observation space Dict"),
        (spaces.Discrete(2), spaces.MultiBinary(3), "action space MultiBinary"),
        (spaces.Discrete(2), spaces.Box(0, 5, (2,), np.int64), "action space Box"),
    ],
)
def test_spaces_that_can_not_be_taken_are_named(observation, action, named):
    class Odd(Counter):
        observation_space, action_space = observation, action

    with pytest.raises(SteersmanError, match=named):
        Worlds(Odd, 1, 0)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("CartPol-v1", {}, "CartPole-v1"),
        ("CartPole-v1", {"gravity_": 3}, "gravity_"),
        ("no_such_module:Env-v0", {}, "no_such_module"),
    ],
)
def test_environments_that_can_not_be_made_are_named(name, options, said):
    with pytest.raises(SteersmanError, match=said):
        maker(name, options)
