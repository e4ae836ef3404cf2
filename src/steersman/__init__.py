"""Reinforcement learning and preference alignment of language models that can be checked.

    import steersman

    recipe = steersman.load_recipe("ppo", "recipes/ppo.yaml", {"iterations": 20})
    summary = steersman.run_verb("ppo", recipe)

The names below are the public ones; each is imported when it is first used, so that `import steersman` is quick.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steersman.algorithms import ALGORITHMS as ALGORITHMS
    from steersman.api import load_recipe as load_recipe
    from steersman.api import run_verb as run_verb
    from steersman.metrics import METRICS as METRICS
    from steersman.metrics import metric as metric
    from steersman.model import LoraConfig as LoraConfig
    from steersman.model import Policy as Policy
    from steersman.model import ScalarModel as ScalarModel
    from steersman.model import load_policy as load_policy
    from steersman.model import load_reward as load_reward
    from steersman.model import load_scalar as load_scalar
    from steersman.rollout import Engine as Engine
    from steersman.rollout import Sampling as Sampling
    from steersman.types import Prompt as Prompt
    from steersman.types import Sample as Sample
    from steersman.types import SteersmanError as SteersmanError
    from steersman.types import Tokens as Tokens
    from steersman.types import Trajectory as Trajectory

_HOMES = {
    "load_recipe": "api",
    "run_verb": "api",
    "Policy": "model",
    "ScalarModel": "model",
    "load_policy": "model",
    "load_reward": "model",
    "load_scalar": "model",
    "LoraConfig": "model",
    "Engine": "rollout",
    "Sampling": "rollout",
    "ALGORITHMS": "algorithms",
    "metric": "metrics",
    "METRICS": "metrics",
    "Prompt": "types",
    "Sample": "types",
    "Tokens": "types",
    "Trajectory": "types",
    "SteersmanError": "types",
}
"""Where each public name is defined."""

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("steersman")
    if name not in _HOMES:
        raise AttributeError(f"module 'steersman' has no attribute {name!r}")
    return getattr(importlib.import_module(f"steersman.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
