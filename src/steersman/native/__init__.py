"""Compiled inner loops for a CPU: built at first use, and left out where they can't be.

`decode` has the attention of one new token and the draw, `layers` what stands between a layer's matrix products,
`products` those of a few dozen rows, `step` a step of decoding by a whole model.
They need a C++ compiler (`$CXX`, c++, g++ or clang++) once per machine; `build` says where the result is kept.
Without one, with STEERSMAN_NATIVE=0, on other devices and for other dtypes than float32, the plain torch code runs.
STEERSMAN_NATIVE=sanitize builds them with checks of every access, for `make sanitize`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from functools import lru_cache
from importlib.resources import files

from steersman.native import build


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they can't be had; `why_not` says why."""
    return _load()[0]


def loaded() -> ctypes.CDLL:
    """The compiled functions, for those who have seen that they are there."""
    found = library()
    assert found is not None
    return found


def why_not() -> str | None:
    """Why the plain code runs, in words a user can act on; None where the compiled one does."""
    return _load()[1]


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    wanted = os.environ.get("STEERSMAN_NATIVE", "1")
    if wanted == "0":
        return None, "STEERSMAN_NATIVE is 0"
    command = build.compiler()
    if command is None:
        return None, "no C++ compiler was found (c++, g++, clang++ or $CXX)"
    try:
        flags = build.SANITIZED if wanted == "sanitize" else build.FLAGS
        found = _declare(ctypes.CDLL(str(build.built(command, _sources(), flags))))
        return (
            (found, None) if _same_layout(found) else (None, "its structures are laid out otherwise than ctypes' are")
        )
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{command} could not build it: {_first_line(error)}"


def _sources() -> dict[str, bytes]:
    """The C++ files beside this one, headers too, by name."""
    kept = (file for file in files(__name__).iterdir() if file.name.endswith((".cpp", ".h")))
    return {file.name: file.read_bytes() for file in sorted(kept, key=lambda file: file.name)}


def _same_layout(lib: ctypes.CDLL) -> bool:
    """Whether the structures that are handed over are as large on the other side."""
    from steersman.native.sequences import Sequences, Strided  # they import this module
    from steersman.native.step import Layer, Model, StepArguments

    for function, ours in (
        (lib.step_sizes, (Layer, Model, StepArguments)),
        (lib.sequences_sizes, (Strided, Sequences)),
    ):
        theirs = (ctypes.c_int64 * len(ours))()
        function(theirs)
        if list(theirs) != [ctypes.sizeof(kind) for kind in ours]:
            return False
    return True


def _first_line(error: Exception) -> str:
    said = getattr(error, "stderr", None)
    text = said.decode(errors="replace").strip() if said else str(error)
    return next((line for line in text.splitlines() if "error" in line), text.splitlines()[0] if text else "")


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, count, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    sizes = ctypes.POINTER(count)
    signatures = {
        "decode_attention": [*[pointer] * 5, sizes, number, small],
        "draw": [*[pointer] * 4, count, count, count, small],
        "norm_forward": [pointer, pointer, number, number, pointer, pointer, count, count, small],
        "norm_backward": [*[pointer] * 3, number, *[pointer] * 4, count, count, small],
        "gate": [*[pointer] * 3, count, small, small],
        "gate_back": [*[pointer] * 5, count, small, small],
        "rotate": [*[pointer] * 4, sizes, small, small],
        "rearrange": [pointer, pointer, count, count, small],
        "product": [*[pointer] * 4, count, count, count, small],
        "decode_step": [pointer, pointer, small],
        "attend_forward": [pointer, small],
        "attend_backward": [pointer, small],
    }
    for name, arguments in signatures.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, None
    for name in ("step_sizes", "sequences_sizes"):
        getattr(lib, name).argtypes, getattr(lib, name).restype = [sizes], None
    lib.panel_width.argtypes, lib.panel_width.restype = [], count
    return lib
