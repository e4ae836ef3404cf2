"""Rank and world size of this process, as torchrun, SLURM or another launcher sets them in the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from steersman.types import SteersmanError


def ranks_launched() -> int:
    """How many ranks the launcher of this process started; 0 where none did. steersman's own is one, too."""
    return int({**os.environ, **from_slurm(os.environ)}.get("WORLD_SIZE", "0"))


def from_slurm(given: Mapping[str, str]) -> dict[str, str]:
    """torch's variables for a task of an `srun` step of several tasks, from SLURM's own; empty for any other process,
    and where torch's are there already.

    Rank 0 is on the step's first node; its port follows from the numbers of job and step, which all tasks know.
    Raises SteersmanError where a variable that `srun` sets is missing.
    """
    world = given.get("SLURM_STEP_NUM_TASKS", "1")
    if world == "1" or "WORLD_SIZE" in given:
        return {}
    try:
        first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", given["SLURM_STEP_NODELIST"])
        address = re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else "")
        port = 20_000 + (int(given["SLURM_JOB_ID"]) * 7 + int(given["SLURM_STEP_ID"])) % 20_000
        here = _tasks_per_node(given["SLURM_STEP_TASKS_PER_NODE"])[int(given["SLURM_NODEID"])]
        return {
            "RANK": given["SLURM_PROCID"], "LOCAL_RANK": given["SLURM_LOCALID"], "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": str(here), "MASTER_ADDR": address, "MASTER_PORT": str(port),
        }  # fmt: skip
    except KeyError as missing:
        raise SteersmanError(
            f"this is a task of srun, which did not set {missing.args[0]}; set torch's variables (RANK, LOCAL_RANK, "
            "WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) yourself, or use torchrun"
        ) from missing


def _tasks_per_node(told: str) -> list[int]:
    """The step's tasks on each of its nodes, of SLURM's short form: `8(x2),4` is 8, 8 and 4."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", told)
    return [int(tasks) for tasks, nodes in found for _ in range(int(nodes or 1))]
