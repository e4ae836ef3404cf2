"""Encoder-decoder models: what their decoder starts with, and what they do around their output layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steersman.model.context import context_length
from steersman.model.probe import Form, after, close, model_name, probe_ids, quiet, require_causal, watch_output_layer
from steersman.model.reader import EncoderDecoderReader, decode, encode
from steersman.types import SteersmanError


def is_pair(model: Any) -> bool:
    """Whether a model is an encoder with a decoder."""
    return bool(model.config.is_encoder_decoder)


def decoder_start(model: Any, tokenizer: Any = None) -> tuple[int, ...]:
    """Ids that the decoder reads before the first token of a response.

    The model's `decoder_start_token_id` (T5Gemma has none: its decoder's BOS), then the token that such a model
    always says first if there is one: `forced_bos_token_id`, or a BOS that its tokenizer puts in front of every
    text (BART). It is read, not sampled.
    (`forced_eos_token_id` is not obeyed: a response cut at the length limit is marked as cut.)

    Raises SteersmanError where no start token is named.
    """
    start, forced = _setting(model, "decoder_start_token_id"), _setting(model, "forced_bos_token_id")
    if start is None:  # the only family that keeps a config of its decoder apart
        start = getattr(getattr(model.config, "decoder", None), "bos_token_id", None)
    if start is None:
        raise SteersmanError(
            f"{model_name(model)}: its config names no decoder_start_token_id, so the first token of a response has "
            "nothing to follow; set it in config.json (the pad token's id for T5, the eos token's for BART)"
        )
    if forced is None and tokenizer is not None and tokenizer.bos_token_id is not None:
        first = tokenizer("a")["input_ids"][:1]
        forced = tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None
    return (start,) if forced is None or forced == start else (start, forced)


def output_bias(model: Any, form: Form) -> Tensor | None:
    """The bias of the output layer: its own, or BART's `final_logits_bias`."""
    layer, own = model.get_output_embeddings(), getattr(model, "final_logits_bias", None)
    bias = layer.bias if own is None else own.view(-1)
    return bias if bias is None or form.input_scale == 1 else bias / form.input_scale


def probe_pair(model: Any) -> Form:
    """Compares the model's logits with encoder, decoder, output layer, scales and bias taken apart, on a few tokens.

    Raises SteersmanError naming what differs, or if padding of the prompt or later tokens of the response show.
    """
    name, ids, decoder = model_name(model), probe_ids(model), model.get_decoder()
    source = ids.flip(1)
    with quiet(model):
        seen, wide, logits = watch_output_layer(
            model, lambda: model(input_ids=source, decoder_input_ids=ids, use_cache=False).logits
        )
        found = read(model, source, ids)
        scale = next((s for s in (1.0, found.shape[-1] ** -0.5) if seen is not None and close(found * s, seen)), None)
    if scale is None:
        raise SteersmanError(
            f"{name}: its output layer does not read the decoder's last hidden state, so the fused log-probability "
            "would be wrong; this model family is not supported yet"
        )
    bias = getattr(model, "final_logits_bias", None)
    wide = wide if bias is None else (wide.to(bias.dtype) + bias).float()  # rounded as the model rounds it
    logit_scale, softcap = after(decoder.config, wide, logits, name)
    return Form(decoder, logit_scale, softcap, scale)


def read(model: Any, source: Tensor, ids: Tensor) -> Tensor:
    """The decoder's states, after making sure that neither padding nor the future shows in them."""
    encoder, decoder, name = model.get_encoder(), model.get_decoder(), model_name(model)
    every = torch.ones_like(source, dtype=torch.bool)
    memory = encode(encoder, source, every)
    out = decode(decoder, ids, memory, every)
    padded, real = torch.cat([source, ids], 1), torch.cat([every, ~every], 1)
    if not close(decode(decoder, ids, encode(encoder, padded, real), real), out):
        raise SteersmanError(
            f"{name}: padding after a prompt changes what its decoder sees, so a response would depend on what "
            "shares its batch; choose another attention implementation (model.attention: sdpa or eager)"
        )
    require_causal(lambda some: decode(decoder, some, memory, every), ids, name)
    return out


def pair_reader(model: Any, tokenizer: Any) -> EncoderDecoderReader:
    """The reader of an encoder-decoder model."""
    return EncoderDecoderReader(model.get_encoder(), model.get_decoder(), decoder_start(model, tokenizer))


def decoder_context(model: Any, start: tuple[int, ...]) -> int | None:
    """Tokens that a response may have beside what the decoder starts with; None without limit (T5)."""
    limit = context_length(model, decoder=True)
    return None if limit is None else limit - len(start)


def _setting(model: Any, key: str) -> int | None:
    for place in (
        getattr(model, "generation_config", None),
        model.config,
        model.config.get_text_config(decoder=True),
    ):
        if isinstance(value := getattr(place, key, None), int):
            return value
    return None
