"""Replies of servers that someone else runs, read within limits, and without the key that a request bore."""

from __future__ import annotations

import time

import httpx2

SHORTEST_SECRET = 6
"""Characters of a key that is looked for in what comes back; shorter ones are words such as "none" or "EMPTY"."""


def read_body(response: httpx2.Response, most: int, until: float) -> bytes:
    """The body of a streamed response, cut right behind `most` bytes.

    `until` is a moment of `time.monotonic`: a server that sends a byte now and then does not extend it. Raises
    httpx2.ReadTimeout for one that still sends then.
    """
    raw = bytearray()
    for piece in response.iter_bytes():
        raw += piece
        if len(raw) > most:
            break
        if time.monotonic() > until:
            raise httpx2.ReadTimeout("the reply goes on and on")
    return bytes(raw)


def without_key(text: str, key: str) -> str:
    """The text, in which a server that echoes the request's headers leaves no key."""
    return text.replace(key, "[key]") if len(key) >= SHORTEST_SECRET else text
