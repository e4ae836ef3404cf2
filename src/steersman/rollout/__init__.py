"""Generation: prompts in, samples with their behaviour log-probabilities out."""

from steersman.rollout.cache import kv_cache_bytes
from steersman.rollout.engine import Engine
from steersman.rollout.port import Generator
from steersman.rollout.sampling import Sampling

__all__ = ["Engine", "Generator", "Sampling", "kv_cache_bytes"]
