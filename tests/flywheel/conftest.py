"""A mini model, written once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from letter_models import save_mini

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch):
    """Drawing charts takes most of a mini run's time; the report has tests of its own."""
    monkeypatch.setattr("steersman.train.session.write_report", lambda folder: None)
    monkeypatch.setattr("steersman.run.files.ledger.write_report", lambda folder: None)


@pytest.fixture(scope="session")
def mini_model(tmp_path_factory):
    return save_mini(tmp_path_factory.mktemp("mini") / "model", context=128)
