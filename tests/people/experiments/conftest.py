"""A mini model, written once, and no reports: drawing charts takes most of a mini run's time."""

from __future__ import annotations

import pytest
from letter_models import save_mini


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch):
    monkeypatch.setattr("steersman.train.session.write_report", lambda folder: None)
    monkeypatch.setattr("steersman.run.files.ledger.write_report", lambda folder: None)


@pytest.fixture(scope="session")
def mini_model(tmp_path_factory):
    return save_mini(tmp_path_factory.mktemp("mini") / "model", context=128)
