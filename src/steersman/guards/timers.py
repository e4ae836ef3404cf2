"""A signal to this thread when a time is over, without the process's alarm."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

AGAIN = 1.0
"""Seconds between one signal and the next, for a block that takes no notice of the first."""
_LONGEST = 1e9
_MONOTONIC, _TO_THREAD = 1, 4
"""CLOCK_MONOTONIC and SIGEV_THREAD_ID of Linux."""


class _Event(ctypes.Structure):
    """`struct sigevent`."""

    _fields_ = [
        ("value", ctypes.c_void_p), ("number", ctypes.c_int), ("notify", ctypes.c_int), ("thread", ctypes.c_int),
        ("padding", ctypes.c_byte * 64),
    ]  # fmt: skip


class _Times(ctypes.Structure):
    """`struct itimerspec`: seconds and nanoseconds of the interval, and of the first time."""

    _fields_ = [(name, ctypes.c_long) for name in ("again_s", "again_ns", "first_s", "first_ns")]


@contextmanager
def signal_after(seconds: float, number: int) -> Iterator[None]:
    """Sends signal `number` to this thread after `seconds`, and every second again until the block ends.

    On Linux the kernel sends it (`timer_create`), also where the block never gives up Python's lock, as a search of
    `re` does not. Elsewhere a thread sends it, which must wait for that lock.
    """
    if sys.platform == "linux":
        with _by_kernel(min(seconds, _LONGEST), number):
            yield
        return
    over, to = threading.Event(), threading.get_ident()

    def watch() -> None:
        wait = min(seconds, _LONGEST)
        while not over.wait(wait):
            signal.pthread_kill(to, number)
            wait = AGAIN

    watcher = threading.Thread(target=watch, name="time limit", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


@contextmanager
def _by_kernel(seconds: float, number: int) -> Iterator[None]:
    library, timer = _library(), ctypes.c_void_p()
    event = _Event(number=number, notify=_TO_THREAD, thread=threading.get_native_id())
    _require(library.timer_create(_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)))
    try:
        whole, part = divmod(max(seconds, 1e-6), 1.0)
        times = _Times(again_s=int(AGAIN), first_s=int(whole), first_ns=int(part * 1e9))
        _require(library.timer_settime(timer, 0, ctypes.byref(times), None))
        yield
    finally:
        library.timer_delete(timer)


@cache
def _library() -> ctypes.CDLL:
    """The C library; before glibc 2.34 timers are in one of their own."""
    whole = ctypes.CDLL(None, use_errno=True)
    try:
        whole.timer_create  # noqa: B018
    except AttributeError:
        return ctypes.CDLL("librt.so.1", use_errno=True)
    return whole


def _require(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), f"no timer for a time limit: {os.strerror(ctypes.get_errno())}")
