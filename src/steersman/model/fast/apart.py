"""A batch read by the compiled attention with its rows one behind the other, so that nothing in it is padding.

Norms, gates and linear layers treat each token by itself and do not ask in which row it stands; only attention does,
and the compiled one (`native.sequences`) is told where rows start. The trunk is given that in a mask's place. The
states are those of a padded batch, up to rounding; a test holds them to that.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor, nn

from steersman.model.fast.plain import plain
from steersman.model.layout import Layout, join
from steersman.model.probe import close, device_of, quiet
from steersman.native import library
from steersman.native.sequences import LONGEST, row_starts
from steersman.types import Tokens

TOKENS_PER_READ = 2048
"""Tokens of one read of the trunk: more make no product faster, and each read frees what it does not keep."""


def compiled_here(trunk: nn.Module) -> bool:
    """Whether the compiled attention may run here and now; it has first derivatives, in float32 and on a CPU."""
    return (
        library() is not None
        and not plain()
        and device_of(trunk).type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and next(trunk.parameters()).dtype is torch.float32
    )


def lines(length: Int[Tensor, " B"]) -> list[Int[Tensor, " b"]]:
    """The rows in their order, in groups of at most TOKENS_PER_READ tokens, or of one row."""
    groups: list[list[int]] = []
    total = 0
    for row, tokens in enumerate(length.tolist()):
        if not groups or total + tokens > TOKENS_PER_READ:
            groups.append([])
            total = 0
        groups[-1].append(row)
        total += tokens
    return [torch.tensor(group) for group in groups]


def line_up(tokens: Tokens) -> Layout:
    """All rows in one of the trunk's, in their order; each starts at position 0."""
    ids, positions = one_behind_another(join(tokens).ids, tokens.length)
    return Layout(ids[None], positions[None], starts(tokens.length), row_starts(tokens.length, tokens.length))


def one_behind_another(
    ids: Int[Tensor, "B T"], length: Int[Tensor, " B"]
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """The tokens within their rows' lengths, and their places in their rows."""
    column = torch.arange(ids.shape[1]).expand_as(ids)
    real = column < length[:, None]
    return ids[real], column[real]


def starts(length: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Where each of rows that lie one behind the other begins."""
    return length.cumsum(0) - length


def fits(trunk: nn.Module, tokens: Tokens) -> bool:
    """Whether rows of these lengths are seen whole, by the trunk's layers and by the compiled attention."""
    return int(tokens.length.max()) <= min(LONGEST, longest_seen(trunk))


def keeps_rows_apart(trunk: nn.Module, rows: int) -> bool:
    """Whether the trunk, told where rows start, gives each row's states as it would alone; tried on a few tokens.

    `rows` is the size of the vocabulary.
    """
    lengths = (7, 3, 5)
    ids = [[(5 * i + b + 3) % rows for i in range(n)] for b, n in enumerate(lengths)]
    tokens = Tokens.from_ids(ids, [[1]] * len(ids))
    if not fits(trunk, tokens):
        return False
    with quiet(trunk):
        padded = join(tokens)
        whole = trunk(input_ids=padded.ids, use_cache=False).last_hidden_state
        expected = whole[torch.arange(whole.shape[1]) < tokens.length[:, None]]
        line = line_up(tokens)
        try:
            found = trunk(
                input_ids=line.ids, use_cache=False, position_ids=line.positions, attention_mask=line.row_starts
            ).last_hidden_state[0]
        except (TypeError, ValueError, AttributeError, RuntimeError, LookupError):
            return False  # its attention is another, or it reads the mask itself
    return close(found, expected)


def longest_seen(trunk: nn.Module) -> float:
    """The most tokens of a row that each layer sees whole, by what the config says; 0 where a layer keeps a state."""
    config = trunk.config.get_text_config()  # type: ignore[operator, union-attr]
    kinds = set(getattr(config, "layer_types", None) or [])
    if not kinds <= {"full_attention", "sliding_attention"}:
        return 0
    return getattr(config, "sliding_window", None) or (0 if "sliding_attention" in kinds else math.inf)
