"""Real servers on free ports."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager

import uvicorn

from steersman.data import DataConfig, layout
from steersman.model import load_policy
from steersman.people.serve.app import Server
from steersman.people.serve.reply import LoadedModel
from steersman.rollout import Engine
from steersman.rollout.live import Live


def served_from(path, name="") -> LoadedModel:
    policy = load_policy(path, trainable=False, device="cpu")
    live = Live(Engine(policy.model, policy.tokenizer), rows=4, longest=100, new_tokens=100, queue=40)
    return LoadedModel(live, layout(policy, DataConfig(path="serve")), name)


@contextmanager
def running(served: Server):
    """The address of a server on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Its own set-up of logging closes the handlers of others, and with one of absl's the stream that pytest captures.
    server = uvicorn.Server(uvicorn.Config(served.app(), host="127.0.0.1", port=port, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
        for one in served.models.values():
            one.live.close()
