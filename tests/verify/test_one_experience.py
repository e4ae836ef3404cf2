"""Invariant 11: the same experience, met as Gymnasium steps or as tokens, gives the same advantages."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch
from gymnasium.wrappers import TimeLimit

from steersman.advantage.gae import gae, vtrace
from steersman.advantage.returns import return_to_go
from steersman.algorithms import ALGORITHMS
from steersman.control.envs import Worlds
from steersman.control.experience import collect_episodes
from steersman.tabular.token_mdp import TokenMDP
from steersman.train.experience import EpisodeRules, tokens_of, trajectory
from steersman.types import Prompt, Sample, Trajectory

MDP = TokenMDP.random(3, 3, seed=9, per_token=True)
LOGP = torch.log_softmax(MDP.logp_ref * 0.4, -1)
END = len(MDP.states)
CRITIC = torch.randn(END + 1, generator=torch.Generator().manual_seed(2))
GAMMA = 0.9


class Speaking(gym.Env):
    """The language as an environment: a state is a prefix, an action a token."""

    def __init__(self, terminates_at_horizon: bool, per_step: bool) -> None:
        self.observation_space = gym.spaces.Discrete(END + 1)
        self.action_space = gym.spaces.Discrete(MDP.vocab)
        self.terminates_at_horizon, self.per_step = terminates_at_horizon, per_step
        self.state, self.steps = 0, 0

    def reset(self, *, seed=None, options=None):
        self.state, self.steps = 0, 0
        return 0, {}

    def step(self, action):
        state, self.steps = self.state, self.steps + 1
        self.state = int(MDP.next_state[state, action])
        said_end = action == MDP.eos
        over = said_end or (self.terminates_at_horizon and self.steps == MDP.horizon)
        answer = int(MDP.ending[state, action])
        reward = float(MDP.step_reward[state, action])
        if not self.per_step:
            reward = float(MDP.score[answer]) if over else 0.0
        return self.state, reward, over, False, {}


def spoken(cut: str, per_step: bool) -> tuple[Trajectory, torch.Tensor, torch.Tensor]:
    """Episodes collected step by step, as the control loop does; the tokens chosen and the lengths."""
    worlds = Worlds(lambda: TimeLimit(Speaking(cut == "end", per_step), MDP.horizon), 3, 0, "test")
    rng = torch.Generator().manual_seed(5)

    def act(obs):
        state = obs.argmax(-1).clamp(max=END - 1)
        return torch.multinomial(LOGP[state].exp(), 1, generator=rng).flatten()

    seen = collect_episodes(worlds, act, 40)
    worlds.close()
    state = seen.obs.argmax(-1)
    after = torch.arange(state.shape[1]) >= seen.length[:, None]
    state = torch.where(after, END, state)
    logp = LOGP[state[:, :-1].clamp(max=END - 1)].gather(2, seen.action[..., None]).squeeze(-1).float()
    traj = Trajectory(
        mask=seen.mask,
        reward=seen.reward,
        discount=seen.discount(GAMMA),
        logp_old=torch.where(seen.mask, logp, 0.0),
        value=CRITIC[state],
    )
    return traj, seen.action, seen.length


def written(actions: torch.Tensor, lengths: torch.Tensor, cut: str, per_step: bool, name: str) -> Trajectory:
    """The same answers as samples of the rollout engine, through the language models' path."""
    samples, paths, steps = [], [], []
    for action, length in zip(actions.tolist(), lengths.tolist(), strict=True):
        ids, state, path, logp, reward = action[:length], 0, [], [], []
        for token in ids:
            path.append(state)
            logp.append(float(LOGP[state, token]))
            reward.append(float(MDP.step_reward[state, token]))
            answer, state = int(MDP.ending[state, token]), int(MDP.next_state[state, token])
        finish = "eos" if ids[-1] == MDP.eos else "length"
        samples.append(Sample(Prompt([0], "", index=0), ids, logp, finish))
        pad = MDP.horizon - length
        paths.append([*path, *[END] * (pad + 1)])
        steps.append(([*reward, *[0.0] * pad], float(MDP.score[answer])))
    tokens = tokens_of(samples)
    T = tokens.mask.shape[1]
    per_token = torch.tensor([r for r, _ in steps])[:, :T] if per_step else None
    score = per_token.sum(-1) if per_token is not None else torch.tensor([s for _, s in steps])
    value = CRITIC[torch.tensor(paths)][:, : T + 1]
    algorithm = ALGORITHMS[name](gamma=GAMMA)
    found = trajectory(samples, tokens, score, algorithm, per_token=per_token, rules=EpisodeRules(cut))
    found.value = value
    return found


CASES = [("end", False), ("end", True), ("bootstrap", False)]


@pytest.mark.parametrize(("cut", "per_step"), CASES)
def test_the_trajectories_are_the_same(cut, per_step):
    steps, actions, lengths = spoken(cut, per_step)
    tokens = written(actions, lengths, cut, per_step, "a2c")
    assert len(set(lengths.tolist())) == 3, "answers of every length"
    for field in ("mask", "reward", "logp_old"):
        torch.testing.assert_close(getattr(steps, field), getattr(tokens, field), rtol=1e-5, atol=1e-6)
    same = steps.mask
    torch.testing.assert_close(steps.discount[same], tokens.discount[same])
    cut_short = lengths == MDP.horizon
    assert (tokens.discount[cut_short, -1] == GAMMA).any() == (cut == "bootstrap")
    estimates = (
        return_to_go,
        lambda t: gae(t, 0.95).adv,
        lambda t: gae(t, 0.95).ret,
        lambda t: vtrace(t, t.logp_old - 0.1).adv,
    )
    for estimate in estimates:
        torch.testing.assert_close(estimate(steps), estimate(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("cut", "per_step"), CASES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_method_sees_the_same_advantages(name, cut, per_step):
    steps, actions, lengths = spoken(cut, per_step)
    tokens = written(actions, lengths, cut, per_step, name)
    algorithm = ALGORITHMS[name](gamma=GAMMA)
    if algorithm.baseline != "none":
        steps.baseline = tokens.baseline = torch.full((len(steps),), 0.3)
    a, b = algorithm.advantage(steps), algorithm.advantage(tokens)
    torch.testing.assert_close(a.adv, b.adv, rtol=1e-4, atol=1e-5)
    if a.ret is not None:
        torch.testing.assert_close(a.ret, b.ret, rtol=1e-4, atol=1e-5)
