"""What one rank of a launch does: every case of a file, one after the other.

`python rank_worker.py CASES.json` runs each `{"verb", "recipe"}` (and `"resume": true`) through the verb's own
function, as a rank where RANK and WORLD_SIZE are set. Many cases share one launch, since a start costs seconds of
imports.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from forked import ENGINES

from steersman.distributed.launch import as_rank
from steersman.rollout.remote import launch
from steersman.train import session
from steersman.verb_table import VERBS

if __name__ == "__main__":
    torch.set_num_threads(1)
    session.write_report = lambda folder: folder / "report.html"
    launch.subprocess = ENGINES
    cases = json.loads(Path(sys.argv[1]).read_text())
    recipes = [(VERBS[c["verb"]], VERBS[c["verb"]].recipe_class(None, []).model_validate(c["recipe"])) for c in cases]
    with as_rank(recipes[0][1].parallel):
        for (verb, recipe), case in zip(recipes, cases, strict=True):
            verb.here(recipe, resume=case.get("resume", False))
