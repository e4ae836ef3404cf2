"""Models of both styles, causal and encoder-decoder."""

from __future__ import annotations

import pytest
from tiny_models import FAMILIES, PAIR_FAMILIES, tiny_model


@pytest.fixture(params=[*FAMILIES, *PAIR_FAMILIES])
def live_model(request):
    return tiny_model(request.param)
