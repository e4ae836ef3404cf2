"""The HTTP side: whom the server lets in, what it is asked, which model answers."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from steersman.guards.untrusted import UntrustedError, parse_json
from steersman.people.rates import Rates
from steersman.people.serve.assignment import Assignment
from steersman.people.serve.backend import Backend
from steersman.people.serve.growth import Growth
from steersman.people.serve.openapi import document
from steersman.people.serve.reply import LoadedModel, Reply
from steersman.people.serve.wire import Ask, ChatAsk, TextAsk, fault
from steersman.rollout.live import QueueFullError
from steersman.types import Prompt, SteersmanError

LARGEST_BODY = 4 << 20
"""Bytes of one request."""
NOT_JSON = "the request wants the header Content-Type: application/json"
Shape = type[ChatAsk] | type[TextAsk]
PATHS = {ChatAsk: "/chat/completions", TextAsk: "/completions"}


class Server:
    """The routes over models by name. `keys` are the API keys that are let in, without any everybody is; `admin_keys`
    those that may also put another model in the place of one, without any nobody may.

    `load` makes what serves the model of a folder; `hosts` are the names that a request may call this server by, so
    that a page of another site can not reach it through a name of its own. `rate` counts requests a minute and client
    (a key, or an address). Requests for the model `alias` go where `assignment` sends their user. With `backend` the
    server behind answers all of them.
    """

    def __init__(
        self,
        models: dict[str, LoadedModel],
        *,
        load: Callable[[str], LoadedModel],
        keys: tuple[str, ...] = (),
        admin_keys: tuple[str, ...] = (),
        time_limit: float = 600.0,
        hosts: Sequence[str] = ("*",),
        rate: int | None = None,
        alias: str = "",
        assignment: Assignment[LoadedModel] | Assignment[str] | None = None,
        backend: Backend | None = None,
    ) -> None:
        self.models, self.load, self.hosts = models, load, list(hosts)
        self.keys, self.admin_keys = ([key.encode() for key in some] for some in (keys, admin_keys))
        self.time_limit, self.alias, self.assignment, self.backend = time_limit, alias, assignment, backend
        self.rates = None if rate is None else Rates({"request": (rate, 60.0)})
        self.requests = self.refused = 0

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/openapi.json", self.openapi),
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
        assert isinstance(error, HTTPException)  # of status 404 or 405
        told = f"there is no {request.method} {request.url.path}"
        return self._refuse(error.status_code, told, headers=dict(error.headers or {}))

    async def swap(self, request: Request) -> Response:
        """Puts the model of `{"path": FOLDER}` in the place of a name: requests that were taken in are finished by
        the old one, later ones go to the new one, and no request is dropped."""
        refusal = self._stranger(request)
        if refusal is not None:
            return refusal
        if not _among(request, self.admin_keys):
            return self._refuse(403, "exchanging models wants a key of serve.admin_token_file")
        if not _is_json(request):
            return self._refuse(400, NOT_JSON)
        try:
            body = parse_json((await self._body(request)).decode(), "request")
        except ClientDisconnect:
            return Response(status_code=499)
        except BodyTooLargeError as error:
            return self._refuse(413, str(error))
        except (UntrustedError, ValueError) as error:
            return self._refuse(400, f"the body is no JSON that can be read: {error}")
        if not isinstance(body, dict) or set(body) != {"path"} or not isinstance(body["path"], str):
            return self._refuse(400, 'the body is {"path": FOLDER}', param="path")
        if self.backend is not None:
            return self._refuse(400, "the models are those of the server behind; exchange them there")
        name = request.path_params["name"]
        if name == self.alias and self.assignment is not None:
            return self._refuse(400, f"{name}: its models are those of serving.json")
        try:
            new = await asyncio.to_thread(self.load, body["path"])
        except (SteersmanError, OSError, ValueError) as error:
            return self._refuse(400, str(error), param="path")
        old, self.models[name] = self.models.get(name), new
        if old is not None:
            await asyncio.to_thread(old.live.close)
        return JSONResponse({"id": name, "object": "model", "path": body["path"]})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def openapi(self, request: Request) -> Response:
        there = [*self.models, *([self.alias] if self.assignment is not None else [])]
        return JSONResponse(document([] if self.backend is not None else there))

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text."""
        refusal = self._stranger(request)
        if refusal is not None:
            return refusal
        lines = [f"steersman_requests_total {self.requests}", f"steersman_refused_total {self.refused}"]
        for name, served in self.models.items():
            label = json.dumps(name, ensure_ascii=False)
            lines += [
                f"steersman_tokens_total{{model={label}}} {served.live.tokens}",
                f"steersman_decoding{{model={label}}} {served.live.live}",
                f"steersman_waiting{{model={label}}} {served.live.waiting}",
            ]
        if self.assignment is not None:
            lines += [f"steersman_serving_failures_total {self.assignment.failures}"]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def list_models(self, request: Request) -> Response:
        refusal = self._stranger(request)
        if refusal is not None:
            return refusal
        if self.backend is not None and self.assignment is None:
            return await self.backend.models()
        names = [*self.models, *([self.alias] if self.assignment is not None else [])]
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "steersman"} for name in names]
        return JSONResponse({"object": "list", "data": data})

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatAsk)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, TextAsk)

    def _stranger(self, request: Request) -> Response | None:
        """The refusal of whoever has no key, or asks too often."""
        given = [*self.keys, *self.admin_keys]
        if given and not _among(request, given):
            return self._refuse(401, "this server wants an API key", "authentication_error")
        if self.rates is not None and not self.rates.allows("request", self._client(request)):
            most, seconds = self.rates.limits["request"]
            return self._refuse(429, f"{most} requests in {seconds:g} seconds are the most", "rate_limit_error")
        return None

    def _client(self, request: Request) -> str:
        """Whose requests are counted together: those with one key, or, without keys, from one address."""
        if self.keys or self.admin_keys:
            return _key(request)
        return request.client.host if request.client else ""

    def _refuse(self, status: int, text: str, kind: str = "invalid_request_error", **more: Any) -> Response:
        self.refused += 1
        headers = {"Retry-After": "1"} if status == 429 else more.get("headers", {})
        return JSONResponse(fault(text, kind, more.get("param")), status, headers=headers)

    async def _body(self, request: Request) -> bytes:
        raw = bytearray()
        async for piece in request.stream():
            raw += piece
            if len(raw) > LARGEST_BODY:
                raise BodyTooLargeError(f"a request has at most {LARGEST_BODY >> 20} MiB")
        return bytes(raw)

    async def _answer(self, request: Request, shape: Shape) -> Response:
        self.requests += 1
        refusal = self._stranger(request)
        if refusal is not None:
            return refusal
        if not _is_json(request):
            return self._refuse(400, NOT_JSON)
        try:
            told = parse_json((await self._body(request)).decode(), "request")
            if self.backend is not None:
                return await self._pass_on(self.backend, told, shape)
            ask = shape.model_validate(told)
            served = self._model(ask)
            if served is None:
                return self._refuse(404, f"there is no model {ask.model!r}; GET /v1/models lists them", param="model")
            reply = submit(served, ask)
        except ClientDisconnect:
            return Response(status_code=499)
        except BodyTooLargeError as error:
            return self._refuse(413, str(error))
        except ValidationError as error:
            # Where a field may have several forms, the form that was meant is the one that was read furthest.
            deepest = max(error.errors(), key=lambda found: len(found["loc"]))
            place = ".".join(map(str, deepest["loc"]))
            return self._refuse(400, f"{place or 'the request'}: {deepest['msg']}", param=place or None)
        except (UntrustedError, ValueError) as error:
            return self._refuse(400, f"the body is no JSON that can be read: {error}")
        except QueueFullError as error:
            return self._refuse(429, str(error), "rate_limit_error")
        except SteersmanError as error:
            return self._refuse(400, str(error))
        if ask.stream:
            return StreamingResponse(reply.stream(self.time_limit), media_type="text/event-stream")
        return await reply.complete(request, self.time_limit)

    def _model(self, ask: Ask) -> LoadedModel | None:
        if self.assignment is not None and ask.model == self.alias:
            picked = self.assignment.pick(ask.user)
            assert isinstance(picked, LoadedModel)  # without a server behind the models run here
            return picked
        return self.models.get(ask.model)

    async def _pass_on(self, backend: Backend, told: Any, shape: Shape) -> Response:
        user = told.get("user") if isinstance(told, dict) else None
        if not isinstance(told, dict) or not isinstance(told.get("model"), str) or not isinstance(user, str | None):
            return self._refuse(400, "the body is an object with model (and user, if any) as text", param="model")
        if self.assignment is not None and told["model"] == self.alias:
            told = told | {"model": self.assignment.pick(user)}
        return await backend.ask(PATHS[shape], told)


class BodyTooLargeError(Exception):
    """A request is larger than LARGEST_BODY."""


def submit(served: LoadedModel, ask: Ask) -> Reply:
    """A request on its way through a model's engine. Raises SteersmanError for what can not be asked of it."""
    growth, prompt = Growth(asyncio.get_running_loop(), ask.n), request_prompt(served, ask)
    sampling = ask.sampling(served.live.room(len(prompt.ids)))
    ticket = served.live.submit(
        prompt, sampling, growth.changed, n=ask.n, seed=ask.own_seed(), likeliest=ask.likeliest
    )
    growth.ticket = ticket
    return Reply(ask, served, prompt, ticket, growth)


def request_prompt(served: LoadedModel, ask: Ask) -> Prompt:
    """The request as the model reads it."""
    ids, text = ask.encode(served.layout)
    return Prompt(ids, text)


def _is_json(request: Request) -> bool:
    """Whether the request says that it is JSON, which a browser says to another site only after asking it.

    So no page that is open on this machine can spend the model's time, or the key of a server behind.
    """
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


def _key(request: Request) -> str:
    """The key that a request gives, with or without the word Bearer before it."""
    return request.headers.get("authorization", "").removeprefix("Bearer ")


def _among(request: Request, keys: Sequence[bytes]) -> bool:
    given = _key(request).encode()
    return sum(hmac.compare_digest(given, key) for key in keys) > 0
