"""The program that compares answers with math-verify, for `guards.asked_process`.

A question is `{"number", "given", "wanted"}`, an answer `{"number", "has_answer", "equal"}`: whether the given text
holds an answer, and whether that is the wanted one. It imports nothing of this package, so that it starts fast.
"""

from __future__ import annotations

import json
import sys

LIMIT = 5.0
"""Seconds that one answer may take."""
MEMORY = 4 << 30
"""Address space of the process, in bytes."""


def _serve() -> None:
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end is the end of this one
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import parse, verify

    def judged(given: str, wanted: str) -> tuple[bool, bool]:
        found = parse(given, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        if not found:
            return False, False
        expected = parse(f"${wanted}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        return True, bool(expected) and verify(expected, found, timeout_seconds=None)

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            found, equal = judged(asked["given"], asked["wanted"])
        except (Exception, RecursionError):
            found, equal = False, False
        print(json.dumps({"number": asked["number"], "has_answer": found, "equal": equal}), flush=True)


if __name__ == "__main__":
    _serve()
