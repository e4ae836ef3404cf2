"""When a server is asked the same once more, and after how long a pause."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2

AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""Answers that may be different a little later."""
NOT_TAKEN = {429, 503}
"""Answers to a request that the server did not begin with, so that nothing is done twice where it is asked again."""
FIRST_PAUSE = 0.5


def pause(attempt: int, longest: float, response: httpx2.Response | None = None) -> float:
    """Seconds to wait behind try number `attempt`, from 0, never more than `longest`.

    As long as the response's Retry-After says; else `0.5 * 2^attempt`, shortened by up to half at random so that
    many clients do not return together.
    """
    asked = None if response is None else _retry_after(response)
    return min(asked, longest) if asked else min(FIRST_PAUSE * 2**attempt, longest) * random.uniform(0.5, 1.0)


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds that the server asks to wait, as a number or a date; None where it does not say."""
    told = response.headers.get("retry-after", "")
    try:
        seconds = float(told)
        return seconds if seconds >= 0 else None
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(told)
    except (ValueError, TypeError, OverflowError):
        return None
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max((until - datetime.now(UTC)).total_seconds(), 0.0)
