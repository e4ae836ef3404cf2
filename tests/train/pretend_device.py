"""`pretend`: two devices that are not the CPU, on a machine without one, and a count of what makes the host wait for
them and of the bytes in use on them.

`start()` builds `pretend_device.cpp` (kept between runs, about 10 seconds the first time) and gives PyTorch the
devices for the rest of the process, so it is called in a process of its own.
"""

from __future__ import annotations

import ctypes
import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from steersman.native import build

HERE = Path(__file__).parent
SOURCE = Path(__import__("steersman").__file__).parent
_listening: list[Waits] = []


class Place(NamedTuple):
    """Where the host waited: a function of a file of the package, and for what."""

    file: str
    function: str
    what: str


class Waits:
    """How often each place waited, and the line that it stood on."""

    def __init__(self) -> None:
        self.count: Counter[Place] = Counter()
        self.lines: dict[Place, int] = {}

    def note(self, what: bytes) -> None:
        frame = sys._getframe(1)
        while frame is not None and str(SOURCE) not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is None:
            place, line = Place("elsewhere", "", what.decode()), 0
        else:
            file = str(Path(frame.f_code.co_filename).relative_to(SOURCE))
            place, line = Place(file, frame.f_code.co_name, what.decode()), frame.f_lineno
        self.count[place] += 1
        self.lines[place] = line

    def text(self) -> str:
        return "\n".join(
            f"{n:5} {place.file}:{self.lines[place]} {place.function}: {place.what}"
            for place, n in self.count.most_common()
        )


def available() -> bool:
    """Whether it can be built here."""
    return sys.platform == "linux" and build.compiler() is not None


def start() -> None:
    """Gives this process the device."""
    include = Path(torch.__file__).parent / "include"
    flags = (
        "-O1", "-std=c++20", "-fPIC", "-DAT_PER_OPERATOR_HEADERS", f"-I{include}",
        f"-I{include / 'torch/csrc/api/include'}", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-DTORCH_BUILD_{''.join(c if c.isalnum() else '_' for c in torch.__version__)}",
        "-Wl,--no-as-needed", f"-L{include.parent / 'lib'}", "-ltorch_cpu", "-lc10",
    )  # fmt: skip
    command = build.compiler()
    assert command is not None
    library = build.built(command, {"pretend.cpp": (HERE / "pretend_device.cpp").read_bytes()}, flags)
    torch.ops.load_library(str(library))
    loaded = ctypes.CDLL(str(library))
    loaded.pretend_start()
    torch.utils.rename_privateuse1_backend("pretend")
    torch._register_device_module("pretend", _module(loaded))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
    _keep.append(kind(lambda what: [one.note(what) for one in _listening] and None))
    loaded.pretend_listen(_keep[0])
    loaded.pretend_peak.restype = ctypes.c_int64
    _keep.append(loaded)


_keep: list[Any] = []


@contextmanager
def memory() -> Iterator[list[int]]:
    """Afterwards the list holds the most bytes that the device had in use while it was open."""
    found: list[int] = []
    _keep[1].pretend_reset_peak()
    yield found
    found.append(_keep[1].pretend_peak())


@contextmanager
def waits() -> Iterator[Waits]:
    """Counts what makes the host wait while it is open."""
    found = Waits()
    _listening.append(found)
    try:
        yield found
    finally:
        _listening.remove(found)


def _module(loaded: ctypes.CDLL) -> types.ModuleType:
    """What PyTorch and its users ask of `torch.pretend`, as of `torch.cuda`."""
    module: Any = types.ModuleType("torch.pretend")
    ops = torch.ops.pretend
    properties = types.SimpleNamespace(name="pretend", total_memory=64 << 30, multi_processor_count=1)
    module.is_available = lambda: True
    module.device_count = lambda: 2
    module.current_device = lambda: loaded.pretend_current()
    module.set_device = lambda device: loaded.pretend_set_current(getattr(device, "index", device))
    module.synchronize = lambda device=None: None
    module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.manual_seed = module.manual_seed_all = lambda seed: ops.seed(seed & ((1 << 63) - 1))
    module.get_rng_state = lambda device=None: ops.rng_state(torch.zeros(()))
    module.set_rng_state = lambda state, device=None: ops.set_rng_state(state)
    module.get_rng_state_all = lambda: [module.get_rng_state()]
    module.set_rng_state_all = lambda states: module.set_rng_state(states[0])
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16, torch.float32]
    module.is_bf16_supported = lambda including_emulation=True: True
    module.get_device_name = lambda device=None: "pretend"
    module.get_device_properties = lambda device=None: properties
    module.mem_get_info = lambda device=None: (32 << 30, 64 << 30)
    return module
