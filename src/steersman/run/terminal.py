"""Text that a model or a file wrote, made safe to print on a terminal."""

from __future__ import annotations

import unicodedata

_KEPT = "\n\t"
_REORDERS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """The text with everything that would steer a terminal, or can not be encoded, written as an escape.

    Line breaks and tabs stay; other control characters (C0, DEL, C1), marks that reorder what is read, and lone
    surrogates become backslash escapes.
    """
    return "".join(_shown(c) for c in text)


def _shown(c: str) -> str:
    if c in _KEPT or (unicodedata.category(c) not in ("Cc", "Cs") and c not in _REORDERS):
        return c
    return f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}"
