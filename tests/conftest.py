"""Shared fixtures: tiny models of each supported family, and the workplace's data where it is present."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell starts what runs in the background with Ctrl-C ignored, which every process below it would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Runs wait for the disk after every file (fsync); where the memory has a file system and room, tests write there.
# Some load what they compiled, which containers often forbid there.
MEMORY, ROOM = Path("/dev/shm"), 4 << 30
usable = MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC
if usable and shutil.disk_usage(MEMORY).free > ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

from jaxtyping import config as shape_checks
from jaxtyping import install_import_hook

# Shapes in signatures are checked while testing, in the rooms of pure mathematics.
install_import_hook(["steersman.ops", "steersman.loss", "steersman.advantage"], "beartype.beartype")

import pytest
from tiny_models import FAMILIES, tiny_model

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


UNCHECKED = ("verify", "flywheel")
"""Where small functions are called a hundred thousand times, and the checks of shapes would take much of the time:
the flywheel calls what tests of training call."""


@pytest.fixture(autouse=True, scope="module")
def shapes_are_checked(request: pytest.FixtureRequest) -> Iterator[None]:
    place = request.path.relative_to(Path(__file__).parent)
    shape_checks.update("jaxtyping_disable", any(place.is_relative_to(often) for often in UNCHECKED))
    yield
    shape_checks.update("jaxtyping_disable", False)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@pytest.fixture(autouse=True)
def signals_are_left_as_they_were() -> Iterator[None]:
    """A handler that a test leaves behind makes tests after it in the same process fail, for no reason of theirs."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


def pytest_collection_finish() -> None:
    """What collecting made, and what was imported for it, stays: no look for garbage need walk through it again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: a process that takes one of them last would be waited for by the others."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets that lies beside a development checkout; skips where it does not."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the data sets at {SHARED}, which are not part of the project")
    return SHARED


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def causal_model(family):
    return tiny_model(family)


@pytest.fixture
def ends_soon():
    """Fails a test that goes on after 30 seconds, also within a search of `re`."""

    def late(*_):
        raise AssertionError("it goes on after 30 seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
