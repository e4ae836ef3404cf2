"""Steps in time of state-space layers, within their limits where one token is decoded, as where a text is read whole.

Mamba 2 (arXiv 2405.21060) turns what it reads into a step dt = softplus(x + bias) for each head, clamped to
`time_step_limit`. transformers (5.23) clamps where a text is read whole and not where one token follows a state, so
that a sampled token would have another probability than in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from steersman.model.fast.own_forward import over_names

UPDATE = "mamba2_selective_state_update"
"""What transformers' files of families with Mamba 2 layers call the form for one token."""


@contextmanager
def clamped_time_steps(model: nn.Module) -> Iterator[None]:
    """While open, the model's Mamba 2 layers keep their limits for one token too; no other model's do."""
    mixers: list[Any] = []
    try:
        for mixer in model.modules():
            limits = getattr(mixer, "time_step_limit", None)
            forward = None if limits is None else _limited_forward(type(mixer), *limits)
            if forward is not None:
                mixer.forward = partial(forward, mixer)
                mixers.append(mixer)
        yield
    finally:
        for mixer in mixers:
            vars(mixer).pop("forward", None)


@cache
def _limited_forward(kind: type, low: float, high: float) -> Callable[..., Any] | None:
    """The class's forward with limits for one token; None where it has no such form."""
    forward: Any = kind.forward  # type: ignore[attr-defined]
    return over_names(forward, {UPDATE: lambda update: partial(_limited_update, update, low, high)})


def _limited_update(
    update: Callable[..., Tensor],
    low: float,
    high: float,
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    *parts: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool,
    **more: Any,
) -> Tensor:
    """`update`, the form for one token, given the steps [B, heads, width] that the whole form computes."""
    assert dt_softplus
    dt = nn.functional.softplus(dt + dt_bias.to(dt.dtype)).clamp(low, high)
    return update(state, x, dt, *parts, dt_bias=None, dt_softplus=False, **more)
