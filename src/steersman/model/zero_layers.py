"""A model that DeepSpeed's ZeRO 3 has cut, put together layer by layer while it is read.

DeepSpeed's own engine puts the weights of a module together where its `forward` is called from the model's. The loops
here call `logp` and `hidden` instead, and read the output layer's weight outside any module, so these hooks do it: a
layer is whole while it runs, forward or backward, and what lies in no layer (embedding, last norm, output layer) from
the call of a method that reads it until a backward pass is through with it.

A backward pass needs a weight no more once its gradient is added up. A frozen one has none: it stays until two more
layers have begun, since a layer may be called for before the one after it has ended (T5's first layer makes the
positions' bias that all share).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from steersman.distributed.zero_pieces import cut, put_together, take_apart

Weights = list[nn.Parameter]


class LayerByLayer:
    """The hooks on one model, whose weights it cuts over the ranks; `runs` are the methods that read them."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], runs: Sequence[str] = ()) -> None:
        cut(model)
        own = [list(layer.parameters()) for layer in layers]
        inside = {id(p) for weights in own for p in weights}
        self.all = list(model.parameters())
        self.rest = [p for p in self.all if id(p) not in inside]
        self.kept = False
        """Whether all weights are to stay whole for now."""
        self._backward: list[Weights] = []
        """The layers that a backward pass has come to last; none outside of one."""
        for layer, weights in zip(layers, own, strict=True):
            layer.register_forward_pre_hook(partial(self._begins, weights))
            layer.register_forward_hook(partial(self._ends, weights), with_kwargs=True)
        for parameter in self.all:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda added: take_apart([added]))
        for name in runs:
            setattr(model, name, self._around(getattr(model, name)))

    def keep(self) -> None:
        """Puts all weights together, until `release`."""
        put_together(self.all)
        self.kept = True

    def release(self) -> None:
        """Takes all weights apart that are together."""
        self.kept = False
        take_apart(self.all)

    def _around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def reading(*args: Any, **kwargs: Any) -> Any:
            put_together(self.rest)
            return run(*args, **kwargs)

        return reading

    def _begins(self, weights: Weights, _layer: nn.Module, _inputs: Any) -> None:
        put_together(weights)

    def _ends(self, weights: Weights, _layer: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        """The layer has run; one that a backward pass runs again, for its activations, is needed a moment longer."""
        if self._backward:
            return
        given = {id(x) for x in (*inputs, *named.values())}
        for x in output if isinstance(output, tuple) else (output,):
            if isinstance(x, Tensor) and x.requires_grad and id(x) not in given:
                x.register_hook(partial(self._comes_to, weights))
        if not self.kept:
            take_apart(weights)

    def _comes_to(self, weights: Weights, _gradient: Tensor) -> None:
        """A backward pass has come to a layer."""
        if not self._backward:
            torch.autograd.Variable._execution_engine.queue_callback(self._over)
        if not any(weights is one for one in self._backward):
            self._backward.append(weights)
        if len(self._backward) > 2:
            take_apart(self._backward.pop(0))
        put_together(weights)

    def _over(self) -> None:
        self._backward.clear()
        take_apart(self.all)
