"""The Ray cluster that a run goes on: the one that RAY_ADDRESS names, or one that `ray start` has made here."""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
from typing import Any

from steersman.extras import require
from steersman.guards.handlers import signals_kept
from steersman.types import SteersmanError

HERE = "STEERSMAN_ON_RAY"
"""Set in the environment of ranks that were placed by Ray."""
HANDED_ON = ("PYTHONPATH", "HF_", "STEERSMAN_", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
"""Beginnings of the names of variables that ranks get from whoever starts the run."""
PLACED_IN = 120.0
"""Seconds within which Ray must find a place."""


def here() -> bool:
    """Whether this process is a rank that Ray has placed."""
    return HERE in os.environ


def connected() -> Any:
    """The module `ray`, connected to the cluster.

    Raises SteersmanError where Ray is not installed, or no cluster is found.
    """
    require("run.launcher ray", "ray")
    import ray

    if not ray.is_initialized():
        handed = {name: value for name, value in os.environ.items() if name.startswith(HANDED_ON)}
        try:
            with signals_kept():
                ray.init("auto", runtime_env={"env_vars": handed}, logging_level="ERROR")
        except ConnectionError as error:
            raise SteersmanError(
                "run.launcher ray: no Ray cluster is found; start one (`ray start --head`), or name it in RAY_ADDRESS"
            ) from error
    return ray
