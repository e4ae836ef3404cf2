"""Launches of several ranks on this machine, over gloo."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import torch
from forked import Python

from steersman.distributed.stored import StoredTensor
from steersman.model import load_scalar, save
from steersman.run.files.checkpoint import Checkpointer

WORKER = Path(__file__).with_name("rank_worker.py")


def launch(file: Path, cases: list[dict[str, Any]], world: int, timeout: float = 400, worker: Path = WORKER) -> None:
    """Runs the cases on `world` ranks (1: alone); fails with what the first bad rank said."""
    file.write_text(json.dumps(cases))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    running = []
    for rank in range(world):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if world > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            env |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        running.append(Python(str(worker), str(file), env=env, out=file.with_suffix(f".rank-{rank}.txt")))
    try:
        said = [one.communicate(timeout=timeout)[0] for one in running]
    finally:
        for one in running:
            one.close()
    for one, text in zip(running, said, strict=True):
        assert one.returncode == 0, text[-4000:]


def judge_on(model: Path, folder: Path) -> Path:
    """A reward model on the trunk of a policy, saved once."""
    if not folder.exists():
        scalar = load_scalar(str(model))
        torch.nn.init.normal_(scalar.output.weight, generator=torch.Generator().manual_seed(5))
        save(scalar, None, folder)
    return folder


def trained_weights(run: Path) -> dict[str, torch.Tensor]:
    """Every trained tensor of the newest checkpoint, optimisers left out."""
    found = Checkpointer(run).load()
    assert found is not None
    state = found.state["state"]
    roles = state.get("roles", {"model": state.get("model")})
    return {
        f"{role}.{name}": x.full_tensor() if isinstance(x, StoredTensor) else x
        for role in ("model", "policy", "critic")
        for name, x in roles.get(role, {}).items()
    }
