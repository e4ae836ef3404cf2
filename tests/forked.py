"""Commands in processes of their own that need not import everything first: a server that has done so forks them.

A start of `python -m steersman.cli` imports for some seconds, and a test that kills a run twenty times would spend
most of its time there. multiprocessing's fork server starts as a fresh process too, once.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

PRELOADED = ["steersman.cli", "steersman.verbs.sft", "transformers.models.llama.modeling_llama"]


@functools.cache
def _server() -> ForkServerContext:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


def start(words: list[str], out: Path) -> Any:
    """`steersman WORDS` in a process of its own (a `multiprocessing.Process`), its output in a file."""
    process = _server().Process(target=_run, args=(words, str(out)))
    process.start()
    return process


def _run(words: list[str], out: str) -> None:
    from steersman.cli import main

    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.exit(main(words))
