"""Who adds up the ranks' gradients, clips them and updates the weights: steersman with PyTorch, or DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from steersman.distributed.pieces import full_tensor
from steersman.distributed.ranks import ranks
from steersman.update.kinds import restore
from steersman.update.zero import ZeroCutWeights, ZeroWholeWeights


class UpdateEngine(Protocol):
    """One model's updates over the ranks."""

    def step(self) -> float:
        """Adds up the ranks' gradients, clips and updates; gives the norm before clipping. Where that is not finite
        nothing is changed."""
        ...

    def zero_grad(self) -> None:
        """Forgets the gradients, whatever has been made of them."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer keeps, as PyTorch's own gives it on one process. All ranks ask."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts it back, whichever engine gave it; the weights are there already, or come before the next step."""
        ...


def engine_of(parameters: Sequence[nn.Parameter], optimizer: Any, max_grad_norm: float) -> UpdateEngine:
    """The engine of `parallel.mode` for `optimizer`, which has these parameters; alone it is always PyTorch.

    Raises SteersmanError where DeepSpeed does not serve them.
    """
    if ranks().deepspeed:
        kind = ZeroCutWeights if ranks().sharded else ZeroWholeWeights
        return kind(parameters, optimizer, max_grad_norm)
    return TorchEngine(parameters, optimizer, max_grad_norm)


class TorchEngine:
    """Replicas, FSDP2's pieces, and a process that is alone: every rank updates what it holds."""

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: Any, max_grad_norm: float) -> None:
        self.parameters, self.optimizer, self.max_grad_norm = parameters, optimizer, max_grad_norm

    def step(self) -> float:
        ranks().sum_gradients(self.parameters)
        norm = float(full_tensor(nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)))
        if math.isfinite(norm):
            self.optimizer.step()
        return norm

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self.optimizer, state)
