"""How many tokens a model has positions for."""

from __future__ import annotations

from typing import Any


def context_length(model: Any, *, decoder: bool = False) -> int | None:
    """Longest sequence that a transformers model has positions for, in tokens; None where it names no limit.

    With `decoder` the limit of an encoder-decoder's decoder, else that of its encoder.

    RoBERTa and its kin count positions from behind the padding index, whose own row of the table is for padding: of
    514 rows, with padding index 1, a text has 512.
    """
    config = model.config.get_text_config(decoder=True if decoder else None)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    tables = [module for name, module in model.named_modules() if name.split(".")[-1] == "position_embeddings"]
    padding = [getattr(table, "padding_idx", None) for table in tables]
    return positions - max((index + 1 for index in padding if index is not None), default=0)
