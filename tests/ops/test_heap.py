"""Freed memory goes back to the system, now and then."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from forked import Python
from torch.nn import functional

from steersman import native
from steersman.native.layers import rms_norm
from steersman.ops import heap, products
from steersman.update import optimizer


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """One entry for each time that memory is given back."""
    found: list[int] = []
    monkeypatch.setattr(heap, "_trim", lambda: found.append)
    monkeypatch.setattr(heap, "_freed", 0)
    monkeypatch.setattr(heap, "_needed", 0)
    return found


def test_it_is_given_back_once_for_so_many_bytes(asked):
    for _ in range(9):
        heap.freed(heap.RELEASE_BYTES // 4)
    assert len(asked) == 2


def test_a_backward_pass_keeps_what_it_freed_while_the_process_holds_no_more_than_it_needed(asked, monkeypatch):
    held = 100
    monkeypatch.setattr(heap, "resident", lambda: held)
    heap.freed(heap.RELEASE_BYTES, growing=False)
    assert len(asked) == 1  # nothing is known yet of what it needs
    for _ in range(3):
        heap.freed(heap.RELEASE_BYTES, growing=False)
    assert len(asked) == 1
    held = 101
    heap.freed(1, growing=False)
    assert len(asked) == 2
    held = 50
    heap.freed(heap.RELEASE_BYTES, growing=False)
    heap.freed(1)  # a forward pass comes, which takes more than it frees
    assert len(asked) == 3
    held = 101
    heap.freed(heap.RELEASE_BYTES, growing=False)
    assert len(asked) == 3  # what was needed once may be needed again


def test_a_c_library_that_can_not_be_asked_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap, "_trim", lambda: None)
    heap.give_back()


@pytest.mark.skipif(sys.platform != "linux" or not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_places_between_what_lives_leave_the_process():
    script = """
import os, torch
from pathlib import Path
from steersman.ops import heap
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
live = [torch.ones(25_000) for _ in range(4_000)]  # 100 KB each, which the C library takes from its heap
del live[::2]
before = resident()
heap.give_back()
print((before - resident()) >> 20)
"""
    running = Python("-c", script)
    said, wrong = running.communicate(timeout=120)
    assert running.returncode == 0, wrong
    assert int(said) > 150  # of the 190 MiB that were freed


@pytest.fixture
def told(monkeypatch) -> list[int]:
    """The bytes that products and updates tell of; torch's own product stands for oneDNN's."""
    found: list[int] = []
    monkeypatch.setattr(products, "freed", lambda size, **_: found.append(size))
    monkeypatch.setattr(optimizer, "freed", found.append)
    monkeypatch.setattr(products, "_entry", lambda: lambda x, weight, bias, *_: functional.linear(x, weight, bias))
    return found


def test_a_backward_pass_tells_of_what_it_frees(told):
    x, weight = torch.randn(64, 256, requires_grad=True), torch.randn(512, 256, requires_grad=True)
    products.linear(x, weight).sum().backward()
    assert told == [64 * 512 * 4]


@pytest.mark.skipif(native.library() is None, reason=f"no compiled loops: {native.why_not()}")
def test_a_forward_pass_tells_of_what_is_computed_again(told):
    x, norm, weight = torch.randn(64, 256), torch.ones(256, requires_grad=True), torch.randn(512, 256)
    products.linear(rms_norm(x, norm, 1e-5), weight.requires_grad_())
    assert told == [64 * 256 * 4]


def test_an_update_tells_of_its_gradients(told):
    layer = torch.nn.Linear(8, 4)
    update = optimizer.Optimizer(layer.parameters(), optimizer.OptimizerConfig(), 3)
    layer(torch.ones(2, 8)).sum().backward()
    update.step()
    assert told == [4 * (8 * 4 + 4)]
