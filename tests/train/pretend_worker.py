"""Runs every case of a file on `pretend`, one after the other, and writes down what went wrong and what waited.

`python pretend_worker.py CASES.json FOUND.json`: cases are `{"name", "verb", "recipe"}`. Under a case's name stands
the error that ended it (None: none), and for every iteration or step of training the places that made the host wait.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import pretend_device
import torch

from steersman.distill.loop import Distill
from steersman.train import session
from steersman.train.offline import Offline
from steersman.train.on_policy import OnPolicy
from steersman.verb_table import VERBS


def counted(kind: type, method: str, found: list[list[Any]]) -> None:
    """Every call of the method notes its waits."""
    plain = getattr(kind, method)

    def one(self: Any, *given: Any, **named: Any) -> Any:
        with pretend_device.waits() as seen:
            made = plain(self, *given, **named)
        found.append([[*place, seen.lines[place], n] for place, n in seen.count.most_common()])
        return made

    setattr(kind, method, one)


if __name__ == "__main__":
    torch.set_num_threads(1)
    pretend_device.start()
    session.write_report = lambda folder: folder / "report.html"
    waited: list[list[Any]] = []
    counted(OnPolicy, "iteration", waited)
    counted(Offline, "step", waited)
    counted(Distill, "update", waited)
    found: dict[str, Any] = {}
    for case in json.loads(Path(sys.argv[1]).read_text()):
        verb, error = VERBS[case["verb"]], None
        waited.clear()
        try:
            recipe = verb.recipe_class(None, []).model_validate(case["recipe"])
            verb.here(recipe, resume=case.get("resume", False))
        except Exception:
            error = traceback.format_exc()
        found[case["name"]] = {"error": error, "waits": [list(one) for one in waited]}
        print(case["name"], "ok" if error is None else error, flush=True)
    Path(sys.argv[2]).write_text(json.dumps(found))
