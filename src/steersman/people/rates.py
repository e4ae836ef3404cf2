"""How often one client may ask."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Mapping
from threading import Lock

MOST_CLIENTS = 10_000
"""Clients that are remembered before those that have been silent are forgotten."""


class Rates:
    """Counts requests by kind and client over a sliding window; `limits` says how many in how many seconds."""

    def __init__(self, limits: Mapping[str, tuple[int, float]]) -> None:
        self.limits = limits
        self.requests: dict[tuple[str, str], deque[float]] = defaultdict(deque)
        self.lock = Lock()

    def allows(self, kind: str, client: str) -> bool:
        """Whether one more is allowed, which then counts."""
        most, window = self.limits[kind]
        with self.lock:
            times, now = self.requests[kind, client], time.monotonic()
            while times and times[0] < now - window:
                times.popleft()
            if len(times) >= most:
                return False
            times.append(now)
            if len(self.requests) > MOST_CLIENTS:
                kept = {k: t for k, t in self.requests.items() if t and t[-1] > now - window}
                self.requests = defaultdict(deque, kept)
            return True
