"""Names that other programs and files have, made to fit a column."""

from __future__ import annotations

import hashlib

DIGITS = 12
"""Of the digest by which two long names with one beginning differ."""


def fitting(name: str, most: int) -> str:
    """The name where it has at most so many characters; else its beginning and a digest of all of it."""
    if len(name) <= most:
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:DIGITS]
    return f"{name[: most - DIGITS - 1]}~{digest}"
