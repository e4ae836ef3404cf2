"""A stretch of work says how long it will still take, and only where it is long."""

from __future__ import annotations

import pytest

from steersman.run import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_long_stretch_tells_the_time_left(clock, capsys):
    for _ in progress.with_progress(range(10), "look"):
        clock[0] += 3.0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "look: 2 of 10, about 24 s left"
    assert lines[-1] == "look: 8 of 10, about 6 s left"
    assert len(lines) == 4


def test_a_short_stretch_is_silent(clock, capsys):
    for _ in progress.with_progress(range(10), "look"):
        clock[0] += 0.4
    assert capsys.readouterr().out == ""
