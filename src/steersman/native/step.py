"""What the compiled step of a whole model is given: the structures of step.cpp, field for field."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch

from steersman.native import loaded


class Layer(ctypes.Structure):
    """A layer's weights and its part of the cache."""

    _fields_ = [
        *[
            (name, c_void_p)
            for name in (
                "norm", "query", "key", "value", "query_bias", "key_bias", "value_bias", "query_norm", "key_norm",
                "out", "out_bias", "inner_norm", "gate", "up", "down", "keys", "values",
            )
        ],
        ("first", c_int64),
    ]  # fmt: skip


class Model(ctypes.Structure):
    """What stays from step to step; `columns` is the cache's length."""

    _fields_ = [
        *[(name, c_void_p) for name in ("parts", "embedding", "norm", "head", "cosine", "sine")],
        *[
            (name, c_int64)
            for name in ("layers", "hidden", "heads", "kv_heads", "width", "inner", "vocabulary", "columns")
        ],
        ("eps", c_float),
        ("scale", c_float),
        ("gelu", c_int64),
    ]


class StepArguments(ctypes.Structure):
    """One step: what goes in, where it goes in the cache, scratch and logits."""

    _fields_ = [
        *[
            (name, c_void_p)
            for name in (
                "ids", "positions", "order", "start", "leader", "until",
                "x", "h", "projected", "mixed", "opened", "logits",
            )
        ],
        ("rows", c_int64),
        ("column", c_int64),
    ]  # fmt: skip


def decode_step(model: Model, now: StepArguments) -> None:
    """Feeds each row one token: writes its keys and values into the cache and its logits to `now.logits`."""
    loaded().decode_step(ctypes.byref(model), ctypes.byref(now), torch.get_num_threads())
