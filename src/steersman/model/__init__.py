"""Language models in their roles: policy, reference, critic, reward model."""

from steersman.model.adapter_files import saved_lora
from steersman.model.attributes import AttributeModel, GatedModel, Gating
from steersman.model.bottleneck import BottleneckModel, latent_names
from steersman.model.context import context_length
from steersman.model.ensemble import EnsembleModel, head_names
from steersman.model.general import GENERAL, GeneralPreferenceModel, plane_names
from steersman.model.load import load_policy, load_reward, load_scalar, load_tokenizer
from steersman.model.lora import LoraConfig
from steersman.model.meaning import Meaning, step_ends
from steersman.model.offload import at_hand, bytes_to_come, keep_away
from steersman.model.policy import Logp, Policy
from steersman.model.routers import Routers
from steersman.model.save import save
from steersman.model.scalar import Headed, ScalarModel, SharedCritic
from steersman.model.scratch import fresh_policy
from steersman.model.shape import SIZES, Adapted, Shape, adapted, attributes_of, shape_of
from steersman.model.shard import as_local_shards, place, place_head, whole_state, whole_weights
from steersman.model.share import SharedBase, frozen_copy
from steersman.model.tables import stacked_vectors, tables_and_adapters

__all__ = [
    "GENERAL",
    "SIZES",
    "Adapted",
    "AttributeModel",
    "BottleneckModel",
    "EnsembleModel",
    "GatedModel",
    "Gating",
    "GeneralPreferenceModel",
    "Headed",
    "Logp",
    "LoraConfig",
    "Meaning",
    "Policy",
    "Routers",
    "ScalarModel",
    "Shape",
    "SharedBase",
    "SharedCritic",
    "adapted",
    "as_local_shards",
    "at_hand",
    "attributes_of",
    "bytes_to_come",
    "context_length",
    "fresh_policy",
    "frozen_copy",
    "head_names",
    "keep_away",
    "latent_names",
    "load_policy",
    "load_reward",
    "load_scalar",
    "load_tokenizer",
    "place",
    "place_head",
    "plane_names",
    "save",
    "saved_lora",
    "shape_of",
    "stacked_vectors",
    "step_ends",
    "tables_and_adapters",
    "whole_state",
    "whole_weights",
]
