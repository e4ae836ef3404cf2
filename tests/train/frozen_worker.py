"""Runs a verb on `pretend` for each recipe of a file, and writes down where the reference and the reward model lay
whenever the actor sampled, the reward model or the reference was read, and the weights were updated; of DPO and KTO
where the reference lay at an update, when its answers were read (reference), and at a look (distance).

`python frozen_worker.py RECIPES.json FOUND.json`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pretend_device
import torch

from steersman.model import Policy, ScalarModel
from steersman.train import session
from steersman.train.policy_update import Learner
from steersman.train.roles import Roles
from steersman.update.optimizer import Optimizer
from steersman.verbs import feedback, preference, rl
from steersman.verbs.on_policy_recipes import RECIPES

VERBS: dict[str, tuple[Any, Any]] = {
    "ppo": (rl.run, RECIPES["ppo"]),
    "dpo": (preference.run, preference.PreferenceRecipe),
    "kto": (feedback.run, feedback.RECIPES["kto"]),
}
places: dict[str, set[str]] = {}
known: list[Roles] = []
reference: list[Policy] = []


def watched(kind: type, method: str, phase: str) -> None:
    """Every call of the method notes where the frozen models are, in the order of `Roles.frozen`."""
    plain = getattr(kind, method)

    def one(self: Any, *given: Any, **named: Any) -> Any:
        if phase == "rollout":
            known[:] = [self]
        if known and (phase != "reference" or self is known[0].reference):
            there = [str(next(model.parameters()).device) for model in known[0].frozen()]
            places.setdefault(phase, set()).add(" ".join(there))
        return plain(self, *given, **named)

    setattr(kind, method, one)


def watched_offline(kind: type, method: str, phase: str) -> None:
    """Every call of the method that is no on-policy run's notes where the reference is, the one frozen policy."""
    plain = getattr(kind, method)

    def one(self: Any, *given: Any, **named: Any) -> Any:
        if isinstance(self, Policy) and not any(p.requires_grad for p in self.parameters()):
            reference[:] = [self]
        if not known and reference and (phase == "update" or self is reference[0]):
            places.setdefault(phase, set()).add(str(next(reference[0].parameters()).device))
        return plain(self, *given, **named)

    setattr(kind, method, one)


if __name__ == "__main__":
    torch.set_num_threads(1)
    pretend_device.start()
    session.write_report = lambda folder: folder / "report.html"
    watched(Roles, "generate", "rollout")
    watched(ScalarModel, "bound", "reward")
    watched(Policy, "logp", "reference")
    watched(Learner, "update", "update")
    watched_offline(Policy, "logp", "reference")
    watched_offline(Policy, "hidden", "distance")
    watched_offline(Optimizer, "step", "update")
    found: list[dict[str, list[str]]] = []
    for verb, values in json.loads(Path(sys.argv[1]).read_text()):
        places.clear()
        known.clear()
        reference.clear()
        run, recipe = VERBS[verb]
        run(recipe.model_validate(values))
        found.append({phase: sorted(seen) for phase, seen in places.items()})
    Path(sys.argv[2]).write_text(json.dumps(found))
