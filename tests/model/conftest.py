"""A tokenizer, a ragged batch, and folders that hold a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from model_inputs import ragged, word_tokenizer
from tiny_models import FAMILIES, PAIR_FAMILIES, tiny_model
from transformers import PreTrainedTokenizerFast

from steersman.types import Tokens


@pytest.fixture(params=[*FAMILIES, *PAIR_FAMILIES])
def family(request) -> str:
    """Both styles: causal and encoder-decoder."""
    return request.param


@pytest.fixture
def live_model(family):
    return tiny_model(family)


@pytest.fixture
def tokens() -> Tokens:
    return Tokens.from_ids(**ragged())


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture
def model_folder(tmp_path):
    """A function that writes a tiny model of a family, with tokenizer, and gives the folder."""

    words = word_tokenizer()

    def write(family: str = "llama", tokenizer: Any | None = words, model: Any = None) -> Path:
        folder = tmp_path / f"{family}-model"
        (model or tiny_model(family)).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder

    return write
