"""The program that looks for a regular expression, for `guards.asked_process`.

A question is `{"number", "pattern", "text"}`, an answer `{"number", "found"}`: true, false, or null where the search
took more than `SECONDS` of processor time or too much memory. A limit in processor time says the same on a machine
that is busy. It imports nothing of this package, so that it starts fast.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

SECONDS = 1.0
"""Processor time that one search may take."""
LIMIT = 60.0
"""Seconds of the clock after which the process is taken to be lost."""
MEMORY = 4 << 30
"""Address space of the process, in bytes."""


def _late(*_: Any) -> None:
    raise TimeoutError


def _serve() -> None:
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end is the end of this one
    signal.signal(signal.SIGVTALRM, _late)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            found = re.search(asked["pattern"], asked["text"]) is not None
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        except (TimeoutError, MemoryError):
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            found = None
        print(json.dumps({"number": asked["number"], "found": found}), flush=True)


if __name__ == "__main__":
    _serve()
