"""The routers of a mixture of experts, and the loss that keeps its experts in equal use.

transformers says of each family which modules are routers, and which of their outputs are the logits of the choice
(`_can_record_outputs`). Hooks take these while a batch is read with gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers as hf
from jaxtyping import Float, Int
from torch import Tensor, nn

from steersman.types import SteersmanError

COEFFICIENT = "router_aux_loss_coef"
"""The config field of families whose routers were trained by this loss."""


class Routers:
    """What the routers of one model say of the tokens that it reads.

    While `listening` is open, reads with gradients are listened to, and `loss` is of all of them so far. Reads
    without gradients, as of a reference or of held-out data, are not.

    Raises SteersmanError where the model has no routers of which transformers tells the logits.
    """

    def __init__(self, source: str, model: Any) -> None:
        self.source, self.top = source, _experts_per_token(source, model.config)
        self._routers = _routers(source, model)
        self._open = False
        self._forget()

    @property
    def listens(self) -> bool:
        """Whether what is read now counts."""
        return self._open and torch.is_grad_enabled()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While open, reads count; what was read is forgotten at the end, with its graph."""
        self._open = True
        try:
            yield
        finally:
            self._open = False
            self._forget()

    def _forget(self) -> None:
        self._rows = 0
        self._chosen: Tensor | float = 0.0
        self._likely: Tensor | float = 0.0

    @contextmanager
    def reading(self, places: Int[Tensor, " n"], total: int) -> Iterator[None]:
        """While open the model reads `total` tokens, flattened, of which those at `places` count: not the padding.

        Hooks only keep the logits, and everything that is computed from them is computed afterwards: a layer that
        runs again for its backward pass must save what it saved the first time, and runs without these hooks.
        """
        said: list[Tensor] = []
        handles = [m.register_forward_hook(partial(_note, said, index)) for m, index in self._routers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for logits in said:
            if logits.ndim != 2 or len(logits) != total or logits.shape[-1] <= self.top:
                raise SteersmanError(
                    f"train.router_loss: the routers of {self.source} give logits of shape {list(logits.shape)} for "
                    f"{total} tokens, each of which passes {self.top} experts, which is not understood; remove it"
                )
            chosen, likely = _use(logits[places], self.top)
            self._chosen, self._likely = self._chosen + chosen, self._likely + likely
            self._rows += len(places)

    def loss(self) -> Float[Tensor, ""]:
        """E sum_e f_e P_e over the E experts of a layer: f_e is the share of tokens that have expert e among their
        `top`, and P_e the router's probability of it, both means over tokens and layers; f_e has no gradient. In
        perfectly equal use it is `top`.

        Source: Switch Transformer, 2101.03961, eq. 4-6, for several choices per token, as in transformers'
        `load_balancing_loss_func`: means run over all layers before the product. As there, P is a softmax and the
        choices are the largest logits, also in families that weigh experts by a sigmoid or add a bias when they
        choose. Departure: softmax and sums are at least in float32.

        Raises SteersmanError where nothing was read.
        """
        if not isinstance(self._chosen, Tensor) or not isinstance(self._likely, Tensor):
            raise SteersmanError(f"train.router_loss: no router of {self.source} was asked for a token; remove it")
        chosen, likely = self._chosen / self._rows, self._likely / self._rows
        return len(chosen) * (chosen * likely).sum()


def require_routers(source: str, config: Any) -> None:
    """Raises SteersmanError where a model of this config has no routers that can be read; reads no weights."""
    _experts_per_token(source, config)
    if type(config) in hf.MODEL_FOR_CAUSAL_LM_MAPPING:  # of a family with code of its own the model itself tells
        with torch.device("meta"):
            _routers(source, hf.AutoModelForCausalLM.from_config(config, trust_remote_code=False))


def _experts_per_token(source: str, config: Any) -> int:
    """How many experts a token passes. Raises SteersmanError where the family is not trained by such a loss."""
    text = config.get_text_config(decoder=True)
    top = getattr(text, "num_experts_per_tok", None)
    if getattr(text, COEFFICIENT, None) is None or not isinstance(top, int) or config.is_encoder_decoder:
        raise SteersmanError(
            f"train.router_loss: {source} is no causal mixture of experts whose routers are balanced by a loss (the "
            f"config of a model of type '{config.model_type}' has no {COEFFICIENT} and num_experts_per_tok); remove "
            "train.router_loss"
        )
    return top


def _routers(source: str, model: nn.Module) -> list[tuple[nn.Module, int]]:
    """The routers, and which of their outputs are the logits. Raises SteersmanError where there are none."""
    found: dict[int, tuple[nn.Module, int]] = {}
    for part in model.modules():
        told = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits", [])
        for recorder in told if isinstance(told, list) else [told]:
            if isinstance(recorder, type | str):  # a block, which gives more than a router's logits
                continue
            where = f".{recorder.layer_name}." if recorder.layer_name else "."
            for name, module in part.named_modules():
                if isinstance(module, recorder.target_class) and where in f".{name}.":
                    found[id(module)] = module, recorder.index
    if not found:
        raise SteersmanError(
            f"train.router_loss: {source} has no layer with a router whose logits transformers tells "
            f"({type(model).__name__}); remove train.router_loss"
        )
    return list(found.values())


def _note(said: list[Tensor], index: int, _router: nn.Module, _inputs: Any, output: Any) -> None:
    said.append(output[index] if isinstance(output, tuple) else output)


def _use(logits: Float[Tensor, "n E"], top: int) -> tuple[Float[Tensor, " E"], Float[Tensor, " E"]]:
    """How often each expert is among a token's `top`, and the sum of its probabilities."""
    probability = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    chosen = torch.zeros_like(probability).scatter_(-1, probability.topk(top, -1).indices, 1.0)
    return chosen.sum(0), probability.sum(0)
