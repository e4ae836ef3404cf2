"""A model with fresh weights, from a few numbers."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from steersman.model.policy import Policy
from steersman.model.source import dropout_off, find, read_tokenizer, require_family
from steersman.types import SteersmanError


def fresh_policy(
    tokenizer_path: str,
    settings: dict[str, Any],
    *,
    seed: int,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    pack: int | None = None,
    trust_remote_code: bool = False,
) -> Policy:
    """A randomly initialised model: `settings` are its config's fields, `model_type` among them.

    Vocabulary size and the ids of special tokens are the tokenizer's unless given; an encoder-decoder's decoder
    starts with the pad token, or with the end token where the tokenizer has no pad. Raises SteersmanError for an
    unknown model type, field values that its class refuses, or a folder without a tokenizer.
    """
    tokenizer = read_tokenizer(*find(tokenizer_path, ("tokenizer_config.json",)), trust=trust_remote_code)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    merged = {"vocab_size": len(tokenizer), **special, **settings}
    model_type = merged.pop("model_type", None)
    if model_type is None:
        raise SteersmanError("model.scratch: give model_type, such as llama or gpt2, and the model's sizes")
    torch.manual_seed(seed)
    try:
        config = hf.AutoConfig.for_model(model_type, **merged)
        require_family("model.scratch", config)
        dropout_off(config)
        if config.is_encoder_decoder and "decoder_start_token_id" not in settings:
            starts = (config.pad_token_id, config.eos_token_id)
            config.decoder_start_token_id = next((i for i in starts if i is not None), None)
        auto = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
        model = auto.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError) as error:
        raise SteersmanError(f"model.scratch: {error}") from error
    return Policy(model.to(device=device, dtype=getattr(torch, dtype)).eval(), tokenizer, pack=pack)
