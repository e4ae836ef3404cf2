"""Requests that join a batch under way get what they would get alone; cancelled ones free their rows."""

from __future__ import annotations

import threading
import time

import pytest
from rollout_oracle import character_tokenizer, ragged
from tiny_models import tiny_model

from steersman.rollout import Engine, Sampling
from steersman.rollout.live import Live, QueueFullError, Ticket
from steersman.types import SteersmanError

HOWS = [
    Sampling(20),
    Sampling(12, temperature=0),
    Sampling(20, temperature=0.7, top_k=5),
    Sampling(16, top_p=0.8, min_new_tokens=4),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", scale=2.0)


@pytest.fixture
def live(model):
    engine = Live(Engine(model, character_tokenizer()), rows=4, longest=40, new_tokens=40, queue=100)
    yield engine
    engine.close()


def wait(tickets, seconds=30.0):
    end = time.monotonic() + seconds
    while not all(t.done for t in tickets):
        assert time.monotonic() < end, "the requests did not end"
        time.sleep(0.002)


def test_every_request_is_as_if_it_were_alone(model, live):
    """Sixteen requests with four samplings over four rows, arriving at different times."""
    prompts, tickets = ragged(16), []
    for i, prompt in enumerate(prompts):
        tickets.append(live.submit(prompt, HOWS[i % 4], lambda: None, n=1 + i % 2, seed=i))
        time.sleep(0.003 * (i % 3))
    wait(tickets)
    alone = Engine(tiny_model("llama", scale=2.0), character_tokenizer())
    for i, (prompt, ticket) in enumerate(zip(prompts, tickets, strict=True)):
        expected = alone.generate([prompt], HOWS[i % 4], n=1 + i % 2, seed=i)
        got = [ticket.samples[j] for j in range(len(expected))]
        assert [(s.ids, s.finish, s.text) for s in got] == [(s.ids, s.finish, s.text) for s in expected]
        for a, b in zip(got, expected, strict=True):
            assert a.logp == pytest.approx(b.logp, abs=1e-4)


def test_a_cancelled_request_frees_its_rows(model):
    engine = Live(Engine(model, None, eos_token_id=()), rows=1, longest=40, new_tokens=80, queue=2)
    try:
        first, *others = ragged(3)
        held: list[Ticket] = []
        begun = threading.Event()

        def leave() -> None:  # in the engine's own thread, right after a token, so that no race decides
            begun.wait(20)
            engine.cancel(held[0])

        held.append(engine.submit(first, Sampling(80), leave))
        next_one = engine.submit(others[0], Sampling(3), lambda: None)
        begun.set()
        wait([next_one])
        assert 1 <= len(held[0].ids[0]) <= 3
        assert len(next_one.samples[0].ids) == 3
    finally:
        engine.close()


def test_limits_are_refusals_before_anything_is_decoded(model):
    engine = Live(Engine(model, None, eos_token_id=()), rows=1, longest=10, new_tokens=100, queue=1)
    try:
        short = next(p for p in ragged(9) if len(p.ids) <= 10)
        with pytest.raises(SteersmanError, match="the answer may have 101"):
            engine.submit(short, Sampling(101), lambda: None)
        with pytest.raises(QueueFullError):
            engine.submit(short, Sampling(100), lambda: None, n=3)
    finally:
        engine.close()
