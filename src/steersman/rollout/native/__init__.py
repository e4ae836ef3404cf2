"""A compiled inner loop for decoding on a CPU: built at first use, and left out where it can't be.

At one new token per sequence the library's attention spends its time on starting matrix products of a few rows,
and a draw goes over the vocabulary five times. `decode.cpp` does both in one pass each. It needs a C++ compiler
(`$CXX`, c++, g++ or clang++) once per machine; the result lies in the user's cache folder. Without one, with
STEERSMAN_NATIVE=0, on other devices and for other dtypes than float32, the plain torch code runs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "steersman_decode"
"""The name under which transformers knows the attention: torch's own, but for single tokens."""
WIDEST = 1024
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-shared",
)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they can't be had; `why_not` says why."""
    return _load()[0]


def why_not() -> str | None:
    """Why the plain code runs, in words a user can act on; None where the compiled one does."""
    return _load()[1]


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("STEERSMAN_NATIVE", "1") == "0":
        return None, "STEERSMAN_NATIVE is 0"
    compiler = _compiler()
    if compiler is None:
        return None, "no C++ compiler was found (c++, g++, clang++ or $CXX)"
    source = files(__name__).joinpath("decode.cpp").read_bytes()
    try:
        return _declare(ctypes.CDLL(str(_built(compiler, source)))), None
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{compiler} could not build it: {_first_line(error)}"


def _compiler() -> str | None:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _built(compiler: str, source: bytes) -> Path:
    """The shared library of this source for this compiler and processor, built beside and then renamed."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    name = hashlib.sha256(b"\0".join([source, version, " ".join(FLAGS).encode(), _processor()])).hexdigest()[:16]
    for folder in _folders():
        target = folder / f"decode-{name}.so"
        if target.is_file():
            return target
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                code, product = Path(beside, "decode.cpp"), Path(beside, "decode.so")
                code.write_bytes(source)
                command = [compiler, *FLAGS, str(code), "-o", str(product)]
                subprocess.run(command, capture_output=True, check=True, timeout=300)
                product.replace(target)
            return target
        except PermissionError:
            continue
    raise OSError("no folder to keep it in can be written to; set XDG_CACHE_HOME")


def _folders() -> list[Path]:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [Path(home, "steersman"), Path(tempfile.gettempdir(), f"steersman-{os.getuid()}")]


def _processor() -> bytes:
    """What tells processors apart that share a home folder: code for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features"))).encode()
    except (OSError, StopIteration):
        return platform.processor().encode()


def _first_line(error: Exception) -> str:
    said = getattr(error, "stderr", None)
    text = said.decode(errors="replace").strip() if said else str(error)
    return next((line for line in text.splitlines() if "error" in line), text.splitlines()[0] if text else "")


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    lib.decode_attention.argtypes = [*[pointer] * 5, ctypes.POINTER(count), ctypes.c_float, ctypes.c_int]
    lib.draw.argtypes = [*[pointer] * 4, count, count, count, ctypes.c_int]
    lib.decode_attention.restype = lib.draw.restype = None
    return lib


def decode_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v for one query per row: [B, 1, H, W], as transformers wants it.

    `query` is [B, H, 1, D], `keys` [B, K, L, D] and `values` [B, K, L, W] with H a multiple of K, `mask` an additive
    [B or 1, 1, 1, L]; all float32 on the CPU. Row and head of keys and values may be strided, columns may not.
    """
    lib = library()
    assert lib is not None
    rows, heads, _, width = query.shape
    query = query.contiguous()
    out = query.new_empty(rows, 1, heads, values.shape[-1])
    sizes = (ctypes.c_int64 * 11)(
        rows, heads, keys.shape[1], keys.shape[2], width, values.shape[-1],
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
    )  # fmt: skip
    lib.decode_attention(
        query.data_ptr(), keys.data_ptr(), values.data_ptr(), 0 if mask is None else mask.data_ptr(), out.data_ptr(),
        sizes, scale, torch.get_num_threads(),
    )  # fmt: skip
    return out


def draws(x: Tensor) -> bool:
    """Whether `draw` takes these logits."""
    return x.is_cpu and x.dtype == torch.float32 and x.stride(-1) == 1 and library() is not None


def draw(x: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """`rollout.sampling.draw` in one pass over x [B, V]; the running sum is kept in float64."""
    lib = library()
    assert lib is not None
    uniform = uniform.float().contiguous()
    ids, logp = torch.empty(len(x), dtype=torch.long), torch.empty(len(x))
    lib.draw(
        x.data_ptr(), uniform.data_ptr(), ids.data_ptr(), logp.data_ptr(), len(x), x.shape[1], x.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip
    return ids, logp


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: the compiled one where it applies, torch's otherwise."""
    if _applies(query, key, value, attention_mask, settings):
        scale = settings.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return decode_attention(query, key, value, attention_mask, scale), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


PLAIN = {"scaling", "dropout", "is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions"}


def _applies(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: dict[str, Any]) -> bool:
    """One float32 token per row on the CPU, columns side by side, and nothing asked for but the softmax."""
    return (
        query.shape[2] == 1
        and query.is_cpu
        and query.dtype == key.dtype == value.dtype == torch.float32
        and max(query.shape[-1], value.shape[-1]) <= WIDEST
        and key.stride()[2:] == (key.shape[3], 1)
        and value.stride()[2:] == (value.shape[3], 1)
        and (
            mask is None
            or (mask.dtype == torch.float32 and mask.shape[1:3] == (1, 1) and mask.shape[-1] == key.shape[2]
                and mask.stride(-1) == 1)
        )
        and not settings.get("dropout")
        and all(value is None for name, value in settings.items() if name not in PLAIN)
    )  # fmt: skip


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
