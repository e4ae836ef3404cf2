"""Randomness: one seed, and a stream of its own for every use of it.

A stream is named, not numbered by the order of its use: adding one draws nothing from the others. What draws from the
global generators (dropout, users' functions) has streams of its own for each step and rank (`seed_global`), so a
resumed run needs nothing of those before.
"""

from __future__ import annotations

import hashlib
import os
import random
from typing import Any

import numpy as np
import torch


class SamplingStream:
    """The number behind a run's seed that names the streams of answers which are sampled again with the same luck.

    Iterations, batches and seats count from 0 and never come so far, so these answers share no stream with those that
    are trained on. They are plain integers: a seed's text is what `sub_seed` reads.
    """

    REFRESHED_PAIRS = 1 << 20
    """A seat: pairs of answers that a flywheel's judge is trained again on."""
    FLYWHEEL_LOOK = 1 << 30
    """Held-out answers of a flywheel, the same for every round's model."""
    WHEEL_LOOK = 1 << 31
    """Held-out answers of the wheel of people's judgements, the same for every model."""
    TRAINING_LOOK = 1 << 40
    """Held-out answers of a verb that trains, the same at every look."""
    GRUE = 1 << 41
    """Held-out answers of GRUE's cells, the same for all cells of a seed."""
    OPTIMAL_VALUES = 1 << 42
    """Answers of the reference to every training prompt, before training."""


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


def seed_global(seed: int, *names: str | int) -> None:
    """Seeds the global generators of Python, NumPy and torch (all devices), each with a stream of its own, for the
    use that `names` tell."""
    random.seed(sub_seed(seed, "python", *names))
    np.random.seed(sub_seed(seed, "numpy", *names) % 2**32)
    torch.manual_seed(sub_seed(seed, "torch", *names))


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """`seed_global` for what is made before the first step, the same on every rank.

    `deterministic` makes torch choose kernels that give the same bits each time and refuse operations that have
    none. cuBLAS reads its workspace setting when it starts, so call this before the first CUDA operation.
    """
    seed_global(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)


def rng_state() -> dict[str, Any]:
    """The global random states of Python, NumPy and torch (CPU, and each CUDA device in use)."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts back what `rng_state` gave; CUDA states only as far as there are devices."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, device)
