"""Requests that join a batch under way get what they would get alone; cancelled ones free their rows."""

from __future__ import annotations

import threading
import time

import pytest
import torch
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
        with pytest.raises(SteersmanError, match="n is 3; this server takes at most 2") as told:
            engine.submit(short, Sampling(100), lambda: None, n=3)
        assert not isinstance(told.value, QueueFullError), "it would be asked again for ever"
        engine.submit(short, Sampling(100), lambda: None, n=2)
        with pytest.raises(QueueFullError):
            engine.submit(short, Sampling(100), lambda: None, n=2)
    finally:
        engine.close()


@pytest.mark.parametrize("place", ["prompt", "answer"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_request_whose_logits_are_not_finite_ends_no_other(family, place):
    """One token's embedding is NaN: the request that reads it fails alone, and its row is used again by others."""
    model, prompts, how = tiny_model(family, scale=2.0), ragged(12), Sampling(40, temperature=0)
    expected = [s.ids for s in Engine(model, None, eos_token_id=()).generate(prompts, how)]
    read = [p.ids if place == "prompt" else ids[2:12] for p, ids in zip(prompts, expected, strict=True)]
    spared = {i for j in (0, 1) for i in (*prompts[j].ids, *expected[j])}
    bad, poison = next((j, i) for j in range(2, 12) for i in read[j] if i not in spared)
    weight = model.get_input_embeddings().weight.detach().clone()  # the last layer may share it
    weight[poison] = torch.nan
    for one in model.modules():
        if isinstance(one, torch.nn.Embedding) and one.weight.shape == weight.shape:
            one.weight = torch.nn.Parameter(weight)
    live = Live(Engine(model, None, eos_token_id=()), rows=2, longest=40, new_tokens=40, queue=100)
    tickets: list[Ticket] = []
    begun = threading.Event()
    steps_since: list[int] = []

    def join_later() -> None:  # in the engine's own thread: the row has been free for some steps
        begun.wait(20)
        first, second = tickets[:2]
        if second.failure is not None:
            steps_since.append(len(first.ids[0]))
            if len(steps_since) == 5:
                tickets.append(live.submit(prompts[0], how, lambda: None))

    try:
        tickets += [live.submit(prompts[1], how, join_later), live.submit(prompts[bad], how, lambda: None)]
        begun.set()
        wait(tickets[:2])
        wait(tickets)
        assert "not finite" in str(tickets[1].failure)
        assert [tickets[i].ids[0] for i in (0, 2)] == [expected[1], expected[0]]
    finally:
        live.close()
