"""Which device and which precision a run uses, checked before anything is loaded."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from steersman.ops.heap import give_back, resident
from steersman.types import SteersmanError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def resolve_device(name: str = "auto") -> torch.device:
    """The device by name: "cpu", "cuda", "cuda:1", ...; "auto" is CUDA where there is a device, else the CPU.

    An accelerator without a number is the one that this process computes on, told by number: each of a process's
    threads has a current device of its own, and that of a new thread is the first.

    Raises SteersmanError where the device is not there, and says why.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SteersmanError(f"device {name!r} is no device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = torch.version.cuda
            why = "no NVIDIA driver or device was found" if built else "this torch is built for the CPU only"
            raise SteersmanError(f"device {name!r}: {why}; use cpu, or install a torch that fits the machine")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise SteersmanError(
                f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices, counted from 0"
            )
    if device.index is None and device == torch.accelerator.current_accelerator():
        return torch.device(device.type, torch.accelerator.current_device_index())
    return device


def device_apart(device: torch.device) -> torch.device:
    """The device of this rank's frozen models, apart from those that train: with N ranks on the machine, that of the
    number of `device` plus N.

    Raises SteersmanError where the machine has too few, or the launcher does not say what N is.
    """
    if device.type == "cpu":
        raise SteersmanError("frozen_apart: the CPU is one device; use offload: false and frozen_apart: false there")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_WORLD_SIZE" not in os.environ:
        raise SteersmanError(
            "frozen_apart: the launcher started several ranks and does not say how many of them share this machine; "
            "let it set LOCAL_WORLD_SIZE, as torchrun does"
        )
    module = torch.get_device_module(device)
    ranks, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), module.device_count()
    own = device.index
    if own + ranks >= there:
        raise SteersmanError(
            f"frozen_apart: {ranks} ranks on this machine need {2 * ranks} devices, from {own - own % ranks} on, and "
            f"there are {there}; halve run.devices, or use offload: true"
        )
    return torch.device(device.type, own + ranks)


def resolve_dtype(name: Literal["auto", "float32", "bfloat16", "float16"] | str, device: torch.device) -> torch.dtype:
    """The dtype by name; "auto" is bfloat16 where the CUDA device computes in it, else float32.

    Raises SteersmanError for an unknown name, and for float16 or bfloat16 that the device does not have.
    """
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return torch.bfloat16 if bf16 else torch.float32
    if name not in DTYPES:
        raise SteersmanError(f"dtype {name!r} is not known; use auto, {', '.join(DTYPES)}")
    if name == "bfloat16" and device.type == "cuda" and not bf16:
        raise SteersmanError(f"dtype bfloat16: {torch.cuda.get_device_name(device)} does not have it; use float32")
    if name == "float16" and device.type == "cpu":
        raise SteersmanError("dtype float16 is too slow and too coarse on a CPU; use float32 or bfloat16")
    return DTYPES[name]


def set_threads(count: int | None) -> int:
    """Sets torch's CPU threads (None: leaves them) and gives how many there are."""
    if count is not None:
        if count < 1:
            raise SteersmanError(f"threads is {count}, but at least 1 is needed")
        torch.set_num_threads(count)
    return torch.get_num_threads()


def device_text(device: torch.device, dtype: torch.dtype) -> str:
    """One line for the preflight, such as "NVIDIA H100 (cuda:0), 79.1 GiB, bfloat16"."""
    precision = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return f"{found.name} ({device}), {found.total_memory / 2**30:.1f} GiB, {precision}"
    return f"CPU, {torch.get_num_threads()} threads, {precision}"


class Room(NamedTuple):
    """Bytes of memory that a device has, and how many of them nothing uses now."""

    total: int
    free: int


def room(device: torch.device) -> Room:
    """The device's memory; on a CPU the machine's, or its control group's where that allows less."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Room(total, free)
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    free = total
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with suppress(OSError, ValueError):  # "max" where there is no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, limit), min(free, max(limit - used, 0))
    return Room(total, free)


def resident_memory() -> int:
    """Bytes that this process has in memory now, what the C library keeps of freed blocks given back first."""
    give_back()
    return resident()
