"""The last layer's feed-forward part, done only where its states are read.

After the last attention no token looks at another, so a state that nobody reads needs no feed-forward layer: those of
prompts, and of a reward model all but the last. In a model of 8 layers that is up to a twelfth of the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from steersman.model.probe import close, device_of, quiet

MAX_SHARE_READ = 0.8
"""Where more than this share of the states is read, all are made."""


@contextmanager
def narrowed(part: nn.Module | None, places: Int[Tensor, " n"], total: int) -> Iterator[None]:
    """While open, `part` sees these of the `total` places of its input, flattened, and gives zeros in all others."""
    if part is None or not 0 < len(places) <= MAX_SHARE_READ * total:
        yield
        return
    whole, own = part.forward, vars(part).get("forward")

    def forward(x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        some = whole(flat.index_select(0, places)[None])[0]
        return some.new_zeros(len(flat), some.shape[-1]).index_copy_(0, places, some).unflatten(0, x.shape[:-1])

    part.forward = forward
    try:
        yield
    finally:
        if own is None:
            del part.forward
        else:
            part.forward = own


def last_feed_forward(trunk: Any, rows: int) -> nn.Module | None:
    """The last layer's feed-forward part, where narrowing it changes no state that is read; None where it would.

    `rows` is the size of the vocabulary.
    """
    count = getattr(trunk.config.get_text_config(), "num_hidden_layers", None)
    stacks = (m for m in trunk.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    part = getattr(next(stacks, [None])[-1], "mlp", None)
    return part if isinstance(part, nn.Module) and _same(trunk, part, rows) else None


def _same(trunk: Any, part: nn.Module, rows: int) -> bool:
    device = device_of(trunk)
    ids = (torch.arange(12, device=device) * 5 + 3).remainder(rows).view(2, 6)
    places = torch.tensor([1, 4, 11], device=device)
    with quiet(trunk):
        whole = trunk(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        try:
            with narrowed(part, places, ids.numel()):
                found = trunk(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        except (TypeError, ValueError, AttributeError, RuntimeError, LookupError):
            return False  # it takes or gives more than states
    others = torch.ones(len(whole), dtype=torch.bool, device=device).index_fill(0, places, False)
    return close(found[places], whole[places]) and not close(found[others], whole[others])
