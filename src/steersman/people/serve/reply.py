"""One request's answer on its way out, whole or streamed."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from steersman.data import Layout
from steersman.people.serve.growing_text import SettledText
from steersman.people.serve.growth import Growth
from steersman.people.serve.logprobs import Offsets, TokenBytes, chat_logprobs, text_logprobs
from steersman.people.serve.wire import Ask, fault
from steersman.rollout.live import Live, Ticket
from steersman.types import Prompt

LOOK = 0.25
"""Seconds between looks whether a client that waits for a whole answer is still there."""


@dataclass(slots=True)
class LoadedModel:
    """A model that answers: its engine, how conversations are laid out for it, and the name that answers bear."""

    live: Live
    layout: Layout
    name: str = ""


class Reply:
    """One request's answer while it grows."""

    def __init__(self, ask: Ask, model: LoadedModel, prompt: Prompt, ticket: Ticket, growth: Growth) -> None:
        self.ask, self.model, self.prompt, self.ticket, self.growth = ask, model, prompt, ticket, growth
        self.chat = ask.chat
        self.id, self.created = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())
        self.sent_texts, self.sent_logprobs = [""] * ask.n, [0] * ask.n
        self.finished: set[int] = set()
        self.token_bytes = TokenBytes(model.live.engine.tokenizer)
        self.offsets = [Offsets() for _ in range(ask.n)]
        self.settled_texts = [SettledText(s.drawing.texts, prompt.ids) for s in ticket.sequences]

    async def complete(self, request: Request, limit: float) -> Response:
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
            probabilities = self._logprobs(j, len(self.ticket.sequences[j].ids))
            choices.append({"index": j, **said, "logprobs": probabilities, "finish_reason": finish(sample.finish)})
        return JSONResponse({**self._head(""), "choices": choices, "usage": self.usage()})

    async def stream(self, limit: float) -> AsyncIterator[str]:
        """Server-sent events, token by token; no half of a character is ever sent."""
        end = time.monotonic() + limit
        try:
            if self.chat:
                for j in range(self.ask.n):
                    yield self._event(j, {"delta": {"role": "assistant", "content": ""}}, None)
            while len(self.finished) < self.ask.n:
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
            if j in self.finished:
                continue
            sample = self.ticket.samples.get(j)
            if sample is not None:
                text, ended, count = sample.text, finish(sample.finish), len(sequence.ids)
                self.finished.add(j)
            else:
                count = self.growth.readable[j]
                text, ended = self.settled_texts[j].after(sequence.ids[:count]), None
            fresh = text[len(self.sent_texts[j]) :]
            if fresh or ended:
                said = {"delta": {"content": fresh} if fresh else {}} if self.chat else {"text": fresh}
                out.append(self._event(j, said, ended, self._logprobs(j, count)))
                self.sent_texts[j] = text if len(text) > len(self.sent_texts[j]) else self.sent_texts[j]
        return out

    def _logprobs(self, j: int, count: int) -> dict[str, Any] | None:
        """Of the first `count` tokens those that were not listed before; None where nobody asked for them."""
        if self.ask.likeliest is None:
            return None
        sequence, first, last = self.ticket.sequences[j], self.sent_logprobs[j], count
        if last and sequence.ids[last - 1] in self.model.live.engine.end_ids:
            last -= 1
        self.sent_logprobs[j] = max(last, first)
        ids, told = sequence.ids[first:last], sequence.likeliest[first:last]
        if self.chat:
            return chat_logprobs(ids, told, self.token_bytes)
        return text_logprobs(ids, told, self.token_bytes, self.offsets[j])

    async def _wait(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.growth.wake.wait(), seconds)
        except TimeoutError:
            return
        self.growth.wake.clear()

    def _leave(self) -> None:
        if not self.ticket.done:
            self.model.live.cancel(self.ticket)

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model.name or self.ask.model}

    def _event(self, j: int, said: dict[str, Any], ended: str | None, logprobs: dict[str, Any] | None = None) -> str:
        choice = {"index": j, **said, "logprobs": logprobs, "finish_reason": ended}
        return f"data: {json.dumps({**self._head('.chunk'), 'choices': [choice]}, ensure_ascii=False)}\n\n"

    def usage(self) -> dict[str, int]:
        """Tokens of the prompt and of all answers."""
        said = sum(map(len, self.ticket.ids))
        prompt = len(self.prompt.ids)
        return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}


def finish(why: str) -> str:
    """OpenAI's word for why a response ended."""
    return "length" if why == "length" else "stop"
