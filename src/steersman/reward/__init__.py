"""Rewards: functions of texts, reward models and weighted sums of them, and their shaping into token rewards."""

from steersman.reward.config import RewardConfig, RewardPart, ScoreShaping, build_reward
from steersman.reward.core import CallableReward, Reward, Scores, WeightedSum
from steersman.reward.metrics import MetricReward
from steersman.reward.models import ModelReward

__all__ = [
    "CallableReward",
    "MetricReward",
    "ModelReward",
    "Reward",
    "RewardConfig",
    "RewardPart",
    "ScoreShaping",
    "Scores",
    "WeightedSum",
    "build_reward",
]
