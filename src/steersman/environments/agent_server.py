"""The endpoint that agent programs ask: OpenAI's chat protocol on this machine, one key per episode.

A request waits until its episode's turn is sampled. Requests of one program are answered one after the other, in the
order in which they came. What a request says about sampling (temperature, top_p, max_tokens, seed) is left unheeded:
the recipe's `rollout` section says how the policy is sampled, or what is trained would not be what was sampled.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from steersman.data.examples import Message
from steersman.environments.port import Reply
from steersman.environments.text import clean_text
from steersman.guards.untrusted import parse_json

_LARGEST = 4 << 20
"""Bytes of one request."""
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_UNKNOWN = ("n", "logprobs", "top_logprobs", "logit_bias", "response_format", "functions", "audio")
"""What would change the answer and is not done here; refused by name where it asks for anything."""
_HARMLESS: dict[str, tuple[Any, ...]] = {"n": (1,), "response_format": ({"type": "text"},)}


class RequestError(ValueError):
    """A request that is not answered, in words for its program."""


@dataclass(slots=True, eq=False)
class ChatRequest:
    """One request: what is said to the model, and, once there, the body of its answer."""

    messages: list[Message]
    tools: list[Any]
    model: str
    stream: bool
    calls: list[dict[str, Any]] = field(default_factory=list)
    content: str = ""
    reply: Reply | None = None
    answered: threading.Event = field(default_factory=threading.Event)

    def answer(self, reply: Reply | None) -> None:
        """Gives the reply to the program; None: the episode is over."""
        self.reply = reply
        if reply is not None:
            self.content = reply.content
            made = [(c.name, json.dumps(c.arguments, ensure_ascii=False)) for c in reply.calls if not c.problem]
            self.calls = [
                {"id": f"call{i:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}
                for i, (name, arguments) in enumerate(made)
            ]
        self.answered.set()

    def as_message(self) -> Message:
        """The policy's turn as the program was given it, in the form that `messages_of` makes of it."""
        turn: dict[str, Any] = {"role": "assistant", "content": self.content}
        return messages_of([turn | ({"tool_calls": self.calls} if self.calls else {})])[0]

    def body(self) -> dict[str, Any]:
        """The answer in OpenAI's shape."""
        assert self.reply is not None
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        finish = "length" if self.reply.cut else "stop"
        if self.calls:
            message["tool_calls"], finish = self.calls, "tool_calls"
        return {
            "id": f"chatcmpl-{id(self):x}", "object": "chat.completion", "created": int(time.time()),
            "model": self.model,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        }  # fmt: skip


class AgentServer:
    """Listens on a free port of this machine alone; `lines` are the waiting requests of each key."""

    def __init__(self) -> None:
        self.lines: dict[str, queue.SimpleQueue[ChatRequest | None]] = {}
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, name="agents' endpoint", daemon=True).start()

    @property
    def url(self) -> str:
        """What a program is given as its `base_url`."""
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"


def _handler(server: AgentServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path.rstrip("/") == "/v1/models":
                models = [{"id": "policy", "object": "model", "created": 0, "owned_by": "steersman"}]
                return self._send(200, {"object": "list", "data": models})
            self._fault(404, f"there is no GET {clean_text(self.path, 80)}")

        def do_POST(self) -> None:
            raw = self._read()
            if raw is None:
                return
            line = server.lines.get(self.headers.get("Authorization", "").removeprefix("Bearer ").strip())
            if self.path.rstrip("/") != "/v1/chat/completions":
                return self._fault(
                    404, f"there is no POST {clean_text(self.path, 80)}; there is /v1/chat/completions"
                )
            if line is None:
                return self._fault(401, "the key is that of no episode under way; it is in OPENAI_API_KEY")
            try:
                asked = request_of(raw.decode())
            except ValueError as error:
                return self._fault(400, clean_text(str(error), 500))
            line.put(asked)
            asked.answered.wait()
            if asked.reply is None:
                return self._fault(410, "the episode is over")
            if asked.stream:
                return self._stream(asked.body())
            self._send(200, asked.body())

        def _read(self) -> bytes | None:
            length = self.headers.get("Content-Length", "")
            if not length.isdigit() or int(length) > _LARGEST:
                self.close_connection = True
                self._fault(413, f"a request has a Content-Length of at most {_LARGEST >> 20} MiB")
                return None
            return self.rfile.read(int(length))

        def _stream(self, body: dict[str, Any]) -> None:
            choice = body["choices"][0]
            delta = dict(choice["message"])
            if "tool_calls" in delta:
                delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(delta["tool_calls"])]
            head = {**body, "object": "chat.completion.chunk"}
            events = [(delta, None), ({}, choice["finish_reason"])]
            chunks = [{**head, "choices": [{"index": 0, "delta": d, "finish_reason": why}]} for d, why in events]
            text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
            self._write(200, "text/event-stream", text)

        def _fault(self, status: int, message: str) -> None:
            kind = "invalid_request_error"
            self._send(status, {"error": {"message": message, "type": kind, "param": None, "code": None}})

        def _send(self, status: int, value: Any) -> None:
            self._write(status, "application/json", json.dumps(value))

        def _write(self, status: int, kind: str, text: str) -> None:
            data = text.encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                self.close_connection = True  # the program is gone

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: requests are no news."""

    return Handler


def request_of(text: str) -> ChatRequest:
    """A request's body. Raises ValueError for what is no such request, and for what is not done here."""
    body = parse_json(text, "request")
    if not isinstance(body, dict):
        raise RequestError("the request is a JSON object with `messages`")
    asks = [name for name in _UNKNOWN if body.get(name) not in (None, False, [], {}, *_HARMLESS.get(name, ()))]
    if asks:
        raise RequestError(f"{asks[0]}: this endpoint gives one answer in plain text or tool calls; leave it out")
    tools = body.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(t, dict) and "function" in t for t in tools):
        raise RequestError('tools: a list of {"type": "function", "function": {...}}')
    model = clean_text(str(body.get("model", "policy")), 80)
    return ChatRequest(messages_of(body.get("messages")), tools, model, body.get("stream") is True)


def messages_of(value: Any) -> list[Message]:
    """The turns of a request. Raises RequestError naming the turn and field that is none."""
    if not isinstance(value, list) or not value:
        raise RequestError("messages: a list of at least one turn")
    return [_message(turn, i) for i, turn in enumerate(value)]


def _message(turn: Any, i: int) -> Message:
    role = turn.get("role") if isinstance(turn, dict) else None
    if not isinstance(role, str) or role not in _ROLES:
        raise RequestError(f"messages[{i}].role: one of {', '.join(_ROLES)}")
    made: Message = {"role": _ROLES[role], "content": _text(turn.get("content"), i)}
    if turn.get("tool_calls"):
        made["tool_calls"] = [_call(call, i) for call in turn["tool_calls"]]
    for key in ("tool_call_id", "name"):
        if isinstance(turn.get(key), str):
            made[key] = turn[key]
    return made


def _text(content: Any, i: int) -> str:
    if content is None:
        return ""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)  # type: ignore[arg-type]
    if not isinstance(content, str):
        raise RequestError(f"messages[{i}].content: a text, or a list of parts of type text")
    return content


def _call(call: Any, i: int) -> dict[str, Any]:
    """A call as chat templates take it: its arguments an object."""
    try:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        arguments = parse_json(arguments, "arguments") if isinstance(arguments, str) else arguments
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise TypeError
        return {"id": str(call.get("id")), "type": "function", "function": {"name": name, "arguments": arguments}}
    except (KeyError, TypeError, ValueError, AttributeError):
        wanted = "each has a function with a name and arguments in JSON"
        raise RequestError(f"messages[{i}].tool_calls: {wanted}") from None
