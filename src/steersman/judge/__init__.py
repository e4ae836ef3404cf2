"""Judges: an endpoint, a local model or a reward compares two answers or grades one."""

from steersman.judge.config import EndpointConfig, JudgeConfig, LocalConfig
from steersman.judge.judge import Comparison, Judge, open_judge

__all__ = ["Comparison", "EndpointConfig", "Judge", "JudgeConfig", "LocalConfig", "open_judge"]
