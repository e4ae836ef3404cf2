"""Randomness: one seed, and a stream of its own for every use of it.

A stream is named, not numbered by the order of its use: adding one draws nothing from the others.
"""

from __future__ import annotations

import hashlib
import os
import random

import numpy as np
import torch


def sub_seed(seed: int, *names: str | int) -> int:
    """A seed in [0, 2^63) for the use that `names` tell, such as `sub_seed(0, "rollout", step, prompt)`.

    The first 63 bits of SHA-256 over the seed and the names, each with its type, so that ("a", "b") and
    ("a/b",) or (1,) and ("1",) differ. The same on every machine and in every process.
    """
    told = repr((int(seed), *names)).encode()
    return int.from_bytes(hashlib.sha256(told).digest()[:8], "big") >> 1


def stream(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for the use that `names` tell."""
    return torch.Generator(device).manual_seed(sub_seed(seed, *names))


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seeds the global generators of Python, NumPy and torch (all devices), each with a stream of its own.

    `deterministic` makes torch choose kernels that give the same bits each time and refuse operations that have
    none. cuBLAS reads its workspace setting when it starts, so call this before the first CUDA operation.
    """
    random.seed(sub_seed(seed, "python"))
    np.random.seed(sub_seed(seed, "numpy") % 2**32)
    torch.manual_seed(sub_seed(seed, "torch"))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)
