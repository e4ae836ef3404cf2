"""Freed memory goes back to the system, now and then."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from forked import Python

from steersman.ops import heap, products


def test_it_is_given_back_once_for_so_many_bytes(monkeypatch):
    asked = []
    monkeypatch.setattr(heap, "_trim", lambda: asked.append)
    monkeypatch.setattr(heap, "_freed", 0)
    for _ in range(9):
        heap.freed(heap.EVERY // 4)
    assert len(asked) == 2


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


def test_a_backward_pass_tells_of_what_it_frees(monkeypatch):
    told = []
    monkeypatch.setattr(products, "freed", told.append)
    monkeypatch.setattr(products, "_entry", lambda: torch.ops.mkldnn._linear_pointwise)
    x, weight = torch.randn(64, 256, requires_grad=True), torch.randn(512, 256, requires_grad=True)
    products.linear(x, weight).sum().backward()
    assert told == [64 * 512 * 4]
