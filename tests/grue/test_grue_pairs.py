"""A matrix of an encoder-decoder: supervised, then PPO and NLPO, through to its page."""

from __future__ import annotations

import json

import torch
from grue_kit import settings
from letter_models import LETTERS, letters
from tiny_models import tiny_model

from steersman.grue.recipe import GrueRecipe
from steersman.grue.run import run
from steersman.train import session


def test_ppo_and_nlpo_run_on_a_t5(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(session, "write_report", lambda folder: folder / "report.html")
    start = tmp_path / "start"
    tiny_model("t5", vocab=len(LETTERS), scale=1.0).save_pretrained(start)
    letters().save_pretrained(start)
    methods = ["supervised", "supervised+ppo", "supervised+nlpo"]
    few = {"epochs": 1, "minibatches": 1}
    values = settings(tmp_path, methods=methods, model={"path": str(start)}, algorithms={"ppo": few, "nlpo": few})
    summary = run(GrueRecipe.model_validate(values))
    assert summary["finished"]
    assert summary["cells"] == 3
    cells = tmp_path / "matrix" / "cells" / "colours"
    for method in methods[1:]:
        folder = cells / method / "seed-0"
        logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert next(row["ratio_gap"] for row in logged if "ratio_gap" in row) < 1e-5
        found = json.loads((folder / "evaluation.json").read_text())
        assert found["preference"]["rougeL"][0] >= 0
        assert found["natural"]["perplexity"][0] > 1
    assert "supervised+nlpo" in (tmp_path / "matrix" / "grue.md").read_text()
