"""A tiny model's folder and settings of a run in it."""

from __future__ import annotations

import pytest
import torch
from letter_models import save_mini
from train_kit import settings

from steersman.train import session


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def with_report() -> None:
    """Asks for the real report; it draws for seconds and has tests of its own, so the others go without."""


@pytest.fixture(autouse=True)
def no_report(request, monkeypatch):
    if "with_report" not in request.fixturenames:
        monkeypatch.setattr(session, "write_report", lambda folder: folder / "report.html")


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    """The folder of the smallest model; tests only read it."""
    return save_mini(tmp_path_factory.mktemp("mini"))


@pytest.fixture
def base(tmp_path, mini):
    """Plain settings of an on-policy recipe that runs in `tmp_path`."""
    return settings(tmp_path, mini)
