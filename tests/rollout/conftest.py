"""Models of both styles, causal and encoder-decoder."""

from __future__ import annotations

import pytest
from tiny_models import FAMILIES, PAIR_FAMILIES, tiny_model

from steersman.rollout.fast import packed


@pytest.fixture(autouse=True)
def weights_laid_out_for_short_runs_too(monkeypatch):
    """What long responses are generated with: rearranged weights, and compiled steps where a family has them."""
    monkeypatch.setattr(packed, "STEPS", 1)


@pytest.fixture(params=[*FAMILIES, *PAIR_FAMILIES])
def live_model(request):
    return tiny_model(request.param)
