"""Language models in their roles: policy, reference, critic, reward model."""

from steersman.model.attributes import AttributeModel, GatedModel, Gating
from steersman.model.bottleneck import BottleneckModel, latent_names
from steersman.model.ensemble import EnsembleModel, head_names
from steersman.model.load import load_policy, load_reward, load_scalar, load_tokenizer
from steersman.model.lora import LoraConfig
from steersman.model.meaning import Meaning, step_ends
from steersman.model.policy import Logp, Policy
from steersman.model.save import save
from steersman.model.scalar import Headed, ScalarModel, SharedCritic
from steersman.model.scratch import fresh_policy
from steersman.model.shape import SIZES, Shape, shape_of
from steersman.model.shard import in_their_pieces, place, place_head, whole_weights
from steersman.model.share import SharedBase

__all__ = [
    "SIZES",
    "AttributeModel",
    "BottleneckModel",
    "EnsembleModel",
    "GatedModel",
    "Gating",
    "Headed",
    "Logp",
    "LoraConfig",
    "Meaning",
    "Policy",
    "ScalarModel",
    "Shape",
    "SharedBase",
    "SharedCritic",
    "fresh_policy",
    "head_names",
    "in_their_pieces",
    "latent_names",
    "load_policy",
    "load_reward",
    "load_scalar",
    "load_tokenizer",
    "place",
    "place_head",
    "save",
    "shape_of",
    "step_ends",
    "whole_weights",
]
