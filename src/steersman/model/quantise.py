"""Frozen bases in 4 or 8 bits, through bitsandbytes: linear layers but for the output layer; adapters stay exact.

Source: NF4 and double quantisation arXiv 2305.14314, section 3; int8 arXiv 2208.07339, section 2, without its columns
of outliers: which columns these are depends on the whole batch, so that a row's log-probabilities would depend on its
company.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steersman.types import SteersmanError

Quantise = Literal["none", "nf4", "fp4", "int8"]
WEIGHTS = ("Params4bit", "Int8Params")
"""What bitsandbytes calls its parameters."""


def quantisation(kind: Quantise, dtype: torch.dtype, keep: list[str] | None = None) -> Any:
    """What `from_pretrained` takes as `quantization_config`; products are in `dtype`.

    `keep` names layers that stay as they are, None the output layer.

    Raises SteersmanError where bitsandbytes is missing.
    """
    _require_bitsandbytes(f"model.quantise {kind}")
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=keep)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=keep,
    )  # fmt: skip


def as_stored_quantised(
    source: str, stored: Any, dtype: torch.dtype | str, keep: list[str] | None = None
) -> dict[str, Any]:
    """What a folder whose weights bitsandbytes has quantised says of them, with products in `dtype` ("auto": as they
    were) and without int8's columns of outliers. `keep` names layers that stay as they are beside its own.

    Raises SteersmanError for other methods, and where bitsandbytes is missing.
    """
    told: dict[str, Any] = dict(stored if isinstance(stored, dict) else stored.to_dict())
    ours = told.get("load_in_4bit") or told.get("load_in_8bit")
    method = told.get("quant_method") or ("bitsandbytes" if ours else "an unknown method")
    if method != "bitsandbytes" or not ours:
        raise SteersmanError(
            f"{source}: its weights are quantised by {method} (quantization_config in config.json), on which nothing "
            "can be trained here; give the model as it was before, with model.quantise if it is to be in 4 or 8 bits"
        )
    _require_bitsandbytes(f"{source}: its weights are quantised, which")
    if isinstance(dtype, torch.dtype):
        told["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    if keep is not None:
        told["llm_int8_skip_modules"] = [*(told.get("llm_int8_skip_modules") or ["lm_head"]), *keep]
    return told | {"llm_int8_threshold": 0.0}


@contextmanager
def unquantised() -> Iterator[None]:
    """Keeps peft from importing bitsandbytes, unless a quantised model has imported it before: with it every run with
    adapters would start later, and warn on a CPU of kernels that nothing asks for."""
    if "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # what Python takes for a missing package
    _let_peft_look_again()
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]
        _let_peft_look_again()


def _let_peft_look_again() -> None:
    """Lets peft forget whether bitsandbytes is installed, of which it keeps its first answer."""
    utils: Any = sys.modules.get("peft.import_utils")
    for answer in () if utils is None else (utils.is_bnb_available, utils.is_bnb_4bit_available):
        answer.cache_clear()


def _require_bitsandbytes(what: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SteersmanError(f"{what} needs bitsandbytes: pip install 'steersman[bitsandbytes]'")


def finish_quantisation(model: Any) -> None:
    """Lets a model that was just quantised be a model like any other, in which only some layers are special.

    The library's marks on it refuse a move, a copy or a save. On a CPU, bitsandbytes would lay weights out anew for
    products in bfloat16 as soon as no gradient is asked for, and sampling would not agree with training.
    """
    four = bool(model.is_loaded_in_4bit) if "is_loaded_in_4bit" in vars(model) else False
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    if getattr(model, "_weight_conversions", None):  # by which it was read, and would be saved: as plain numbers
        model._weight_conversions = [x for x in model._weight_conversions if not _reads_quantised(x)]
    for part in (model, model.base_model):  # peft asks the module that it is given
        part.is_loaded_in_4bit, part.is_loaded_in_8bit = four, not four
    # its line at every product says no more than what int8 is
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False


def _reads_quantised(conversion: Any) -> bool:
    """Whether the library's conversion of a name puts bitsandbytes' tensors together; it has no way back."""
    steps = getattr(conversion, "operations", None) or []
    return any(type(step).__module__.endswith(".bitsandbytes") for step in steps)


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer's own weight is in 4 or 8 bits."""
    return type(module._parameters.get("weight")).__name__ in WEIGHTS


def is_narrow(module: Any) -> bool:
    """Whether a layer has 4-bit weights on a CPU, widened for every product to the float32 numbers of `dense`."""
    weight: Any = module._parameters.get("weight") if isinstance(module, nn.Module) else None
    return type(weight).__name__ == "Params4bit" and weight.is_cpu and module.compute_dtype == torch.float32


def dense_bytes(module: Any) -> int:
    """Bytes of what `dense` makes of a quantised linear layer."""
    return module.in_features * module.out_features * torch.float32.itemsize


def dense(module: Any) -> Tensor:
    """The layer's weight as the numbers that it stands for, float32 where it is quantised."""
    if not is_quantised(module):
        return module.weight
    functional: Any = importlib.import_module("bitsandbytes").functional
    weight: Any = module.weight
    if type(weight).__name__ == "Params4bit":
        return functional.dequantize_4bit(weight.data, weight.quant_state).float()
    scales = module.state.SCB if weight.SCB is None else weight.SCB  # the first product takes them over
    return functional.int8_vectorwise_dequant(weight.data, scales).float()
