"""Another OpenAI-compatible server behind this one, which adds keys, rates and the share of an A/B test."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from typing import Any

import httpx2
from pydantic import Field
from starlette.responses import JSONResponse, Response, StreamingResponse

from steersman.config.sections import Section
from steersman.people.serve.wire import fault

PASSED_ON = ("application/json", "text/event-stream")
"""Kinds of replies that go on as they are."""
HEADERS = ("retry-after", "retry-after-ms", "x-should-retry")
"""Headers of replies that go on: when a client may ask again."""


class BackendSection(Section):
    """The server behind this one."""

    url: str | None = Field(default=None, description="its address up to the version (http://HOST:PORT/v1)")
    key_env: str = Field(default="OPENAI_API_KEY", description="environment variable with its key")


class Backend:
    """Requests go to the server behind, and its replies come back as they are, streams piece by piece.

    The name of a user stays here. `time_limit` counts the seconds between two pieces.
    """

    def __init__(self, config: BackendSection, time_limit: float) -> None:
        self.url = str(config.url).rstrip("/")
        key = os.environ.get(config.key_env, "").strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Each stream holds a connection: the library's own limit of 100 would be one of users.
        self.client = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(time_limit, connect=10.0),
            limits=httpx2.Limits(max_connections=None),
        )

    async def ask(self, path: str, body: dict[str, Any]) -> Response:
        """The reply to a request, with the status of the server behind."""
        told = {key: value for key, value in body.items() if key != "user"}
        return await self._send(self.client.build_request("POST", self.url + path, json=told))

    async def models(self) -> Response:
        return await self._send(self.client.build_request("GET", f"{self.url}/models"))

    async def _send(self, request: httpx2.Request) -> Response:
        try:
            reply = await self.client.send(request, stream=True)
        except httpx2.HTTPError as error:
            why = type(error).__name__
            return JSONResponse(fault(f"the server behind this one does not answer ({why})", "server_error"), 502)
        kind = reply.headers.get("content-type", "").partition(";")[0].strip()
        kind = kind if kind in PASSED_ON else "text/plain"
        told = {name: reply.headers[name] for name in HEADERS if name in reply.headers}
        told = {name: value for name, value in told.items() if value.isascii()}
        return StreamingResponse(self._pieces(reply), reply.status_code, media_type=kind, headers=told)

    async def _pieces(self, reply: httpx2.Response) -> AsyncIterator[bytes]:
        try:
            async for piece in reply.aiter_bytes():
                yield piece
        except httpx2.HTTPError as error:
            why = f"the server behind this one broke off ({type(error).__name__})"
            yield f"data: {json.dumps(fault(why, 'server_error'))}\n\n".encode()
        finally:
            await reply.aclose()
