"""The HTTP side: requests in, text out, streamed or whole."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from steersman.data import Layout
from steersman.people.serve.wire import Ask, ChatAsk, TextAsk, fault
from steersman.rollout.live import Live, QueueFullError, Ticket
from steersman.run.untrusted import UntrustedError, parse_json
from steersman.types import Prompt, SteersmanError

LARGEST_BODY = 4 << 20
"""Bytes of one request."""
LOOK = 0.25
"""Seconds between looks whether a client that waits for a whole answer is still there."""


@dataclass(slots=True)
class Served:
    """A model that answers: its engine, and how conversations are laid out for it."""

    live: Live
    layout: Layout


class Server:
    """The routes over models by name. `keys` are the API keys that are let in; none lets everybody in.

    `load` makes what serves the model of a folder; `hosts` are the names that a request may call this server by, so
    that a page of another site can not reach it through a name of its own.
    """

    def __init__(
        self,
        models: dict[str, Served],
        *,
        load: Callable[[str], Served],
        keys: tuple[str, ...] = (),
        time_limit: float = 600.0,
        hosts: Sequence[str] = ("*",),
    ) -> None:
        self.models, self.load, self.hosts = models, load, list(hosts)
        self.keys, self.time_limit = [key.encode() for key in keys], time_limit
        self.requests = self.refused = 0

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/metrics", self.metrics),
                Route("/v1/models", self.list_models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/admin/models/{name}", self.swap, methods=["POST"]),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=self.hosts)],
            exception_handlers={404: self.no_route, 405: self.no_route},
        )

    async def no_route(self, request: Request, error: Exception) -> Response:
        return self._refuse(404, f"there is no {request.method} {request.url.path}")

    async def swap(self, request: Request) -> Response:
        """Puts the model of `{"path": FOLDER}` in the place of a name: requests that were taken in are finished by
        the old one, later ones go to the new one, and no request is dropped."""
        if not self._let_in(request):
            return self._refuse(401, "this server wants an API key", "authentication_error")
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            # which a browser sends to another site only after asking it
            return self._refuse(400, "the request wants the header Content-Type: application/json")
        try:
            body = parse_json((await request.body()).decode(), "request")
        except (UntrustedError, ValueError) as error:
            return self._refuse(400, f"the body is no JSON that can be read: {error}")
        if not isinstance(body, dict) or set(body) != {"path"} or not isinstance(body["path"], str):
            return self._refuse(400, 'the body is {"path": FOLDER}', param="path")
        try:
            new = await asyncio.to_thread(self.load, body["path"])
        except SteersmanError as error:
            return self._refuse(400, str(error), param="path")
        name = request.path_params["name"]
        old, self.models[name] = self.models.get(name), new
        if old is not None:
            await asyncio.to_thread(old.live.close)
        return JSONResponse({"id": name, "object": "model", "path": body["path"]})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text."""
        if not self._let_in(request):
            return self._refuse(401, "this server wants an API key", "authentication_error")
        lines = [f"steersman_requests_total {self.requests}", f"steersman_refused_total {self.refused}"]
        for name, served in self.models.items():
            label = json.dumps(name, ensure_ascii=False)
            lines += [
                f"steersman_tokens_total{{model={label}}} {served.live.tokens}",
                f"steersman_decoding{{model={label}}} {served.live.live}",
                f"steersman_waiting{{model={label}}} {served.live.waiting}",
            ]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def list_models(self, request: Request) -> Response:
        if not self._let_in(request):
            return self._refuse(401, "this server wants an API key", "authentication_error")
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "steersman"} for name in self.models]
        return JSONResponse({"object": "list", "data": data})

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatAsk)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, TextAsk)

    def _let_in(self, request: Request) -> bool:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        return not self.keys or sum(hmac.compare_digest(given, key) for key in self.keys) > 0

    def _refuse(self, status: int, text: str, kind: str = "invalid_request_error", **more: Any) -> Response:
        self.refused += 1
        headers = {"Retry-After": "1"} if status == 429 else {}
        return JSONResponse(fault(text, kind, more.get("param")), status, headers=headers)

    async def _answer(self, request: Request, shape: type[ChatAsk] | type[TextAsk]) -> Response:
        self.requests += 1
        if not self._let_in(request):
            return self._refuse(401, "this server wants an API key", "authentication_error")
        try:
            raw = bytearray()
            async for piece in request.stream():
                raw += piece
                if len(raw) > LARGEST_BODY:
                    return self._refuse(413, f"a request has at most {LARGEST_BODY >> 20} MiB")
            ask = shape.model_validate(parse_json(raw.decode(), "request"))
            served = self.models.get(ask.model)
            if served is None:
                return self._refuse(404, f"there is no model {ask.model!r}; GET /v1/models lists them", param="model")
            moved, loop = asyncio.Event(), asyncio.get_running_loop()
            prompt = laid_out(served, ask)
            sampling = ask.sampling(served.live.room(len(prompt.ids)))
            ticket = served.live.submit(
                prompt, sampling, lambda: loop.call_soon_threadsafe(moved.set), n=ask.n, seed=ask.own_seed()
            )
        except ClientDisconnect:
            return Response(status_code=499)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            return self._refuse(400, f"{place or 'the request'}: {first['msg']}", param=place or None)
        except (UntrustedError, ValueError) as error:
            return self._refuse(400, f"the body is no JSON that can be read: {error}")
        except QueueFullError as error:
            return self._refuse(429, str(error), "rate_limit_error")
        except SteersmanError as error:
            return self._refuse(400, str(error))
        reply = Reply(ask, served, prompt, ticket, moved)
        if ask.stream:
            return StreamingResponse(reply.stream(self.time_limit), media_type="text/event-stream")
        return await reply.whole(request, self.time_limit)


def laid_out(served: Served, ask: Ask) -> Prompt:
    """The request as the model reads it."""
    if isinstance(ask, ChatAsk):
        ids, text = served.layout.prompt([{"role": m.role, "content": m.content} for m in ask.messages])
    else:
        assert isinstance(ask, TextAsk)
        text, ids = ask.prompt, served.layout.codec.begin(ask.prompt)
    return Prompt(ids, text)


class Reply:
    """One request's answer while it grows."""

    def __init__(self, ask: Ask, served: Served, prompt: Prompt, ticket: Ticket, moved: asyncio.Event) -> None:
        self.ask, self.served, self.prompt, self.ticket, self.moved = ask, served, prompt, ticket, moved
        self.chat = isinstance(ask, ChatAsk)
        self.id, self.created = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())
        self.shown = [""] * ask.n
        self.told: set[int] = set()

    async def whole(self, request: Request, limit: float) -> Response:
        """All at once. A client that leaves, or `limit` seconds, end the decoding."""
        end = time.monotonic() + limit
        try:
            while not self.ticket.done:
                if time.monotonic() > end:
                    return JSONResponse(fault(f"no answer within {limit:g} seconds", "timeout_error"), 504)
                if await request.is_disconnected():
                    return Response(status_code=499)
                await self._wait(LOOK)
        finally:
            self._leave()
        if self.ticket.failure is not None:
            return JSONResponse(fault(str(self.ticket.failure), "server_error"), 500)
        choices = []
        for j, sample in sorted(self.ticket.samples.items()):
            said = {"message": {"role": "assistant", "content": sample.text}} if self.chat else {"text": sample.text}
            choices.append({"index": j, **said, "logprobs": None, "finish_reason": finish(sample.finish)})
        return JSONResponse({**self._head(""), "choices": choices, "usage": self.usage()})

    async def stream(self, limit: float) -> AsyncIterator[str]:
        """Server-sent events, token by token; no half of a character is ever sent."""
        end = time.monotonic() + limit
        try:
            if self.chat:
                for j in range(self.ask.n):
                    yield self._event(j, {"delta": {"role": "assistant", "content": ""}}, None)
            while len(self.told) < self.ask.n:
                if self.ticket.failure is not None or time.monotonic() > end:
                    late = f"no answer within {limit:g} seconds"
                    yield f"data: {json.dumps(fault(str(self.ticket.failure or late), 'server_error'))}\n\n"
                    return
                await self._wait(LOOK)
                for event in self._news():
                    yield event
            if self.ask.stream_options is not None and self.ask.stream_options.include_usage:
                yield f"data: {json.dumps({**self._head('.chunk'), 'choices': [], 'usage': self.usage()})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self._leave()

    def _news(self) -> list[str]:
        out = []
        for j, sequence in enumerate(self.ticket.sequences):
            if j in self.told:
                continue
            sample = self.ticket.samples.get(j)
            if sample is not None:
                text, ended = sample.text, finish(sample.finish)
                self.told.add(j)
            else:
                text, ended = self._settled(sequence.ids, sequence.how.texts), None
            fresh = text[len(self.shown[j]) :]
            if fresh or ended:
                said = {"delta": {"content": fresh} if fresh else {}} if self.chat else {"text": fresh}
                out.append(self._event(j, said, ended))
                self.shown[j] = text if len(text) > len(self.shown[j]) else self.shown[j]
        return out

    def _settled(self, ids: list[int], texts: Any) -> str:
        """The text so far without what later tokens may still change: half a character, the beginning of a stop."""
        text = texts.response(self.prompt.ids, list(ids)).rstrip("\ufffd")
        hold = max((n for s in texts.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        return text[: len(text) - hold]

    async def _wait(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.moved.wait(), seconds)
        except TimeoutError:
            return
        self.moved.clear()

    def _leave(self) -> None:
        if not self.ticket.done:
            self.served.live.cancel(self.ticket)

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.ask.model}

    def _event(self, j: int, said: dict[str, Any], ended: str | None) -> str:
        choice = {"index": j, **said, "logprobs": None, "finish_reason": ended}
        return f"data: {json.dumps({**self._head('.chunk'), 'choices': [choice]}, ensure_ascii=False)}\n\n"

    def usage(self) -> dict[str, int]:
        """Tokens of the prompt and of all answers."""
        said = sum(map(len, self.ticket.ids))
        prompt = len(self.prompt.ids)
        return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}


def finish(why: str) -> str:
    """OpenAI's word for why a response ended."""
    return "length" if why == "length" else "stop"
