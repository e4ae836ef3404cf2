"""REINFORCE with a learned baseline, Sutton and Barto (2018), section 13.4: Monte-Carlo return minus V."""

from steersman.advantage.gae import Advantage, gae
from steersman.algorithms.reinforce import REINFORCE
from steersman.types import Trajectory


class REINFORCEBaseline(REINFORCE):
    """REINFORCE whose baseline is a critic; unbiased whatever the critic says."""

    name = "reinforce-baseline"
    title = "REINFORCE + critic"
    paper = "Sutton & Barto 2018, 13.4"
    critic = True
    baseline = "none"

    def advantage(self, traj: Trajectory) -> Advantage:
        return gae(traj, lam=1.0)
