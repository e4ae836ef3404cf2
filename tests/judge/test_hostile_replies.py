"""What a judge's endpoint may send: replies that take for ever, are too long, or hold what must not be kept."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.judge.prompts import grade, verdict

ATOMS = [" ", "[", "[[", "[[ ", "]", "*", "answer", ":", "A", "9", "\n", "\ud800", "\x1b[2J", "-", "."]


@settings(max_examples=100, deadline=None)
@given(
    st.builds(
        lambda atom, n, other, m, end: atom * n + other * m + end,
        st.sampled_from(ATOMS),
        st.integers(0, 20_000),
        st.sampled_from(ATOMS),
        st.integers(0, 2_000),
        st.sampled_from(["", "x", "]]", "A]]"]),
    )
)
def test_every_reply_is_read_soon(reply):
    start = time.perf_counter()
    assert verdict(reply) in (None, 0.0, 0.5, 1.0)
    found = grade(reply, 1, 10)
    assert found is None or 1 <= found <= 10
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    ("reply", "share"),
    [
        ("answer" + " " * 1000 + "A", 1.0), (" " * 1000 + "x", None), ("Verdict :\n\n ** B **.", 0.0),
        ("[[" + " " * 5000 + "A" + " " * 5000 + "]]", 1.0), ("[[A]] or [[not a verdict at all]]", 1.0),
        ("[[ tie ]]", 0.5), ("[[A]] no, [[B]]", 0.0), ("A" * 1000, None),
    ],
)  # fmt: skip
def test_verdicts_among_spaces(reply, share):
    assert verdict(reply) == share
