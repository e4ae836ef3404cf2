"""A tiny model, and the judges' real HTTP server."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from letter_models import save_mini

from steersman.run.files import ledger

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "judge"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(ledger, "write_report", lambda folder: folder / "report.html")


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    # instructions are long in a vocabulary of letters
    return save_mini(tmp_path_factory.mktemp("mini"), context=1024)
