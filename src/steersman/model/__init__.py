"""Language models in their roles: policy, reference, critic, reward model."""

from steersman.model.load import load_policy, load_scalar
from steersman.model.lora import LoraConfig
from steersman.model.policy import Logp, Policy
from steersman.model.save import save
from steersman.model.scalar import ScalarModel, SharedCritic
from steersman.model.scratch import fresh_policy

__all__ = [
    "Logp",
    "LoraConfig",
    "Policy",
    "ScalarModel",
    "SharedCritic",
    "fresh_policy",
    "load_policy",
    "load_scalar",
    "save",
]
