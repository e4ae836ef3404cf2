"""`async` code of the user's, all of it on one event loop of this process."""

from __future__ import annotations

import asyncio
import inspect
import threading
from typing import Any


async def _awaited(result: Any) -> tuple[Any, BaseException | None]:
    """The result, or the exit that it asks for: raised in the loop, that would end the loop for all."""
    try:
        return await result, None
    except (SystemExit, KeyboardInterrupt) as error:
        return None, error


_shared: list[asyncio.AbstractEventLoop] = []
_shared_lock = threading.Lock()


def _loop() -> asyncio.AbstractEventLoop:
    """The one event loop of this process, in a thread of its own."""
    with _shared_lock:
        if not _shared:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="event loop of user code", daemon=True).start()
            _shared.append(loop)
        return _shared[0]


def await_result(result: Any) -> Any:
    """A result, awaited on the shared loop where it is to be."""
    if not inspect.isawaitable(result):
        return result
    value, left = asyncio.run_coroutine_threadsafe(_awaited(result), _loop()).result()
    if left is not None:
        raise left
    return value
