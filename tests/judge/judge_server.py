"""A real HTTP server with a chat endpoint that answers right, wrongly, late, not at all, or dies."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer(ThreadingHTTPServer):
    """`behave(n, text)` says what request n (from 0) gets: a reply text, or (status, headers, body), or an Action."""

    daemon_threads = True
    request_queue_size = 128
    # a lost connection is what a test asked for
    handle_error = lambda *_: None  # noqa: E731

    def __init__(self, behave: Callable[[int, str], Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.seen, self.lock = behave, [], threading.Lock()
        self.headers_seen: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = body["messages"][-1]["content"]
        server = self.server
        with server.lock:
            n = len(server.seen)
            server.seen.append(text)
            server.bodies.append(body)
            server.headers_seen.append({k.lower(): v for k, v in self.headers.items()})
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            told = server.behave(n, text)
        finally:
            with server.lock:
                server.at_once -= 1
        if self.path != "/v1/chat/completions":
            told = (404, {}, "not here")
        if told is None:  # hang up without a word
            self.connection.close()
            return
        if isinstance(told, str):
            reply = {"choices": [{"message": {"role": "assistant", "content": told}}], "usage": {"total_tokens": 50}}
            told = (200, {}, json.dumps(reply))
        status, headers, content = told
        raw = content.encode()
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(raw))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(behave: Callable[[int, str], Any]) -> Iterator[ChatServer]:
    server = ChatServer(behave)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def cut(text: str) -> tuple[int, dict[str, str], str]:
    """A reply that its limit ended."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "length"}
    return 200, {}, json.dumps({"choices": [choice], "usage": {"total_tokens": 50}})


def between(text: str, start: str, end: str) -> str:
    return text.split(start, 1)[1].split(end, 1)[0].strip()


def block(text: str, name: str) -> str:
    """What stands in a part of a question."""
    return between(text.split(f"<{name} ", 1)[1], ">", f"</{name} ")


def longer_wins(_: int, text: str) -> str:
    """A fair judge: the longer answer, whatever the order."""
    a, b = block(text, "answer A"), block(text, "answer B")
    return f"I looked at both. [[{'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'C'}]]"


def slow(seconds: float, then: Callable[[int, str], Any]) -> Callable[[int, str], Any]:
    def behave(n: int, text: str) -> Any:
        time.sleep(seconds)
        return then(n, text)

    return behave
