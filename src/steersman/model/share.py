"""Several models on one frozen base: each has adapters of its own, and a head where it gives numbers.

A twin is a second tree of modules over the same tensors. It costs no weights, and nothing has to be switched: every
model computes what it would compute alone, in whatever order, with checkpointing too.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers as hf
from torch import nn

from steersman.model.adapters import adapted_folder, is_adapters, put_adapters, same_place
from steersman.model.encoder_decoder import is_pair
from steersman.model.load import load_reward
from steersman.model.meaning import Meaning
from steersman.model.offload import let_stay
from steersman.model.policy import Policy
from steersman.model.probe import model_name
from steersman.model.scalar import ScalarModel, fresh_head
from steersman.model.source import find
from steersman.types import SteersmanError


class SharedBase:
    """The trunk of a causal policy, taken before it has adapters, and scalar models on it.

    The trunk's weights must be frozen by whoever adds adapters (`Policy.adapt`, `ScalarModel.adapt`).

    Raises SteersmanError for an encoder-decoder, a family without a sequence classifier, one whose classifier has
    another trunk, and a policy that has adapters already.
    """

    def __init__(self, policy: Policy) -> None:
        model: Any = policy.model
        if policy.adapters is not None:
            raise SteersmanError(
                f"share base: {model_name(model)} has adapters already; name the model that they were trained on"
            )
        if is_pair(model) or type(model.config) not in hf.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise SteersmanError(
                f"share base: {model_name(model)} has no sequence classifier on its trunk, so a critic or reward "
                "model can not stand on it; use `share: none`, or critic.init: shared"
            )
        self.tokenizer, self.path = policy.tokenizer, str(model.name_or_path)
        self._classifier = _skeleton(model, outputs=1)
        self._trunk = _twin(model.base_model, model.config)
        if type(getattr(self._classifier, model.base_model_prefix, None)) is not type(self._trunk):
            raise SteersmanError(
                f"share base: the classifier of {model_name(model)} has another trunk; `share: none`"
            )
        self._model = model

    def fresh(self) -> ScalarModel:
        """A scalar model with a head of zeros; its adapters are still to come."""
        return self._on_base(Meaning())

    def scalar_model(self, folder: str, *, trainable: bool) -> ScalarModel:
        """The scalar model whose adapters and head lie in the folder.

        Raises SteersmanError unless they were trained on this base and give one number.
        """
        found = adapted_folder(folder)
        if not same_place(found.base, self.path):
            raise SteersmanError(f"{folder}: its adapters are on {found.base}, not on the shared base {self.path}")
        if len(found.meaning.attributes) > 1:
            raise SteersmanError(f"{folder}: a model of several attributes can not share a base; save it merged")
        scalar = self._on_base(found.meaning)
        put_adapters(scalar, folder)
        return scalar if trainable else scalar.requires_grad_(False)

    def reward(self, path: str, device: torch.device | str) -> Any:
        """A frozen reward model: on this base if the path holds adapters on it, else whole."""
        source, local = find(path)
        if local and is_adapters(source) and same_place(adapted_folder(source).base, self.path):
            return self.scalar_model(source, trainable=False)
        return load_reward(path, device=device, trainable=False)

    def _on_base(self, meaning: Meaning) -> ScalarModel:
        config = copy.deepcopy(self._classifier.config)
        Meaning.forget(config)
        meaning.write(config)
        model = copy.deepcopy(self._classifier)
        model.config = config
        weight = next(self._model.get_output_embeddings().parameters())
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        for name, module in list(model.named_children()):
            if name != model.base_model_prefix:
                module.to_empty(device=self._model.device).to(dtype)
        setattr(model, model.base_model_prefix, _twin(self._trunk, config))
        fresh_head(model)
        return ScalarModel(model.eval(), self.tokenizer)


def frozen_copy(policy: Policy) -> Policy:
    """The policy as it is now, frozen: what is trained is copied, and all the rest are the same tensors, so that it
    costs no more than the adapters. It stays where it is (`keep_away`). The weights must not lie in pieces."""
    same: list[Any] = [p for p in policy.parameters() if not p.requires_grad]
    same += [*policy.buffers(), policy.tokenizer]
    copied = copy.deepcopy(policy, {id(x): x for x in same}).requires_grad_(False)
    let_stay(copied)
    return copied


def _skeleton(model: Any, outputs: int) -> Any:
    """The family's sequence classifier without weights."""
    config = copy.deepcopy(model.config)
    config.num_labels = outputs
    with torch.device("meta"):
        found = hf.AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    found.name_or_path = model.name_or_path
    return found


def _twin(trunk: nn.Module, config: Any) -> nn.Module:
    """The trunk's modules once more, with the same parameters and buffers, and with this config."""
    shared: dict[int, Any] = {id(x): x for x in (*trunk.parameters(), *trunk.buffers())}
    theirs: Any = trunk.config
    return copy.deepcopy(trunk, shared | {id(theirs): config})
