"""One process for all tests that leave it whole."""

from __future__ import annotations

import pytest
import torch
from remote_kit import make_policy, opened

from steersman.rollout.remote.wire import ENGINE_KEY


@pytest.fixture(scope="package", autouse=True)
def one_key():
    """Engines of one test are reached by the addresses that another's have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENGINE_KEY, "the key of these tests")
        yield


@pytest.fixture(scope="package")
def running(one_key):
    """(policy, generator) whose server stays; a test may move the weights, and leaves the server alive."""
    torch.set_num_threads(1)
    policy = make_policy()
    generator = opened(policy)
    yield policy, generator
    generator.close()


@pytest.fixture(autouse=True)
def weights_laid_out_for_short_runs_too():
    """The other process can not be patched, and the engine here must do the same."""
