"""Language models in their roles: policy, reference, critic, reward model."""

from steersman.model.attributes import AttributeModel, GatedModel, Gating
from steersman.model.load import load_policy, load_reward, load_scalar, load_tokenizer
from steersman.model.lora import LoraConfig
from steersman.model.meaning import Meaning, step_ends
from steersman.model.policy import Logp, Policy
from steersman.model.save import save
from steersman.model.scalar import Headed, ScalarModel, SharedCritic
from steersman.model.scratch import fresh_policy
from steersman.model.share import SharedBase

__all__ = [
    "AttributeModel",
    "GatedModel",
    "Gating",
    "Headed",
    "Logp",
    "LoraConfig",
    "Meaning",
    "Policy",
    "ScalarModel",
    "SharedBase",
    "SharedCritic",
    "fresh_policy",
    "load_policy",
    "load_reward",
    "load_scalar",
    "load_tokenizer",
    "save",
    "step_ends",
]
