"""Preflight, seeds and devices."""

from __future__ import annotations

import io
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from steersman.run.device import device_text, resident_memory, resolve_device, resolve_dtype, room, set_threads
from steersman.run.preflight import Phase, Preflight, Role, count, size
from steersman.run.seed import seed_everything, stream, sub_seed
from steersman.types import SteersmanError


def shown(preflight: Preflight, terminal: bool) -> str:
    out = io.StringIO()
    preflight.show(
        Console(file=out, width=150, force_terminal=terminal, color_system="standard" if terminal else None)
    )
    return out.getvalue()


@pytest.fixture
def ppo() -> Preflight:
    preflight = Preflight("PPO")
    preflight.fact("device", "CPU, 2 threads, float32")
    preflight.fact("prompts per iteration", 64)
    preflight.fact("samples", 12800)
    preflight.role(Role("actor", "[x]/260k", 260_032, 260_032, 1_040_128, 1_040_128, 2_080_256))
    preflight.phase(Phase("update", {"weights": 3 * 2**20, "activations": 4 * 2**20}))
    preflight.phase(Phase("rollout", {"weights": 3 * 2**20, "cache": 2**20, "logits": 0}))
    preflight.role(Role("reference", "the actor, adapters off", 260_032))
    for _ in range(4):
        preflight.sample([("Once upon [bold]", False), (" a time", True)])
    return preflight


def test_everything_is_told_plainly_when_piped(ppo):
    text = shown(ppo, terminal=False)
    for part in [
        "64",
        "12,800",
        "260 k",
        "weights 1016 KiB, gradients 1016 KiB, optimizer 2.0 MiB",
        "weights 3.0 MiB, cache 1.0 MiB",
        "[x]/260k",
        "[[Once upon [bold]]] a time",
    ]:
        assert part in text
    peak = next(line for line in text.splitlines() if line.startswith("peak"))
    assert "7.0 MiB" in peak  # the larger phase, not the sum of both
    assert text.count("not in the loss") == 3
    assert "\x1b" not in text


def test_the_masked_part_is_dim_on_a_terminal(ppo):
    text = shown(ppo, terminal=True)
    assert "\x1b[2mOnce upon [bold]\x1b[0m a time" in text
    assert "[[Once" not in text


def test_sizes_by_hand():
    assert [size(x) for x in (0, 812, 31744, 3 * 2**20, 12 * 2**30)] == [
        "0 B",
        "812 B",
        "31.0 KiB",
        "3.0 MiB",
        "12.0 GiB",
    ]
    assert [count(x) for x in (97, 260032, 5_100_000, 1_200_000_000)] == ["97", "260 k", "5.1 M", "1.2 B"]


def test_all_problems_are_refused_together(ppo):
    ppo.check()
    ppo.refuse("the tokenizer has no EOS")
    with pytest.raises(SteersmanError, match=r"^the tokenizer has no EOS$"):
        ppo.check()
    ppo.refuse("the prompt is too long")
    with pytest.raises(
        SteersmanError, match=r"2 problems:\n  - the tokenizer has no EOS\n  - the prompt is too long"
    ):
        ppo.check()


def test_streams_are_named_and_the_same_everywhere():
    assert sub_seed(0, "rollout", 3) == sub_seed(0, "rollout", 3)
    seeds = {sub_seed(*a) for a in [(0, "a", "b"), (0, "a/b"), (0, "b", "a"), (1, "a", "b"), (0, 1), (0, "1"), (0,)]}
    assert len(seeds) == 7
    assert all(0 <= s < 2**63 for s in seeds)
    code = "from steersman.run.seed import sub_seed; print(sub_seed(5, 'data', 2))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == sub_seed(5, "data", 2)
    a, b = stream(0, "x"), stream(0, "y")
    assert not torch.rand(4, generator=a).equal(torch.rand(4, generator=b))
    assert torch.rand(4, generator=stream(0, "x")).equal(torch.rand(4, generator=stream(0, "x")))


def test_seed_everything():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    try:
        seed_everything(3, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        first = draw()
        seed_everything(3)
        assert not torch.are_deterministic_algorithms_enabled()
        assert draw() == first
        seed_everything(4)
        assert draw() != first
    finally:
        torch.use_deterministic_algorithms(False)


def test_devices_and_dtypes():
    cpu = resolve_device("cpu")
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("bfloat16", cpu) == torch.bfloat16
    assert "CPU" in device_text(cpu, torch.float32)
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name, said in [("gpu", "auto, cpu, cuda"), ("cuda:99", "cuda:99")]:
        with pytest.raises(SteersmanError, match=said):
            resolve_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(SteersmanError, match="install a torch that fits"):
            resolve_device("cuda")
    for name, said in [("float8", "is not known"), ("float16", "too slow")]:
        with pytest.raises(SteersmanError, match=said):
            resolve_dtype(name, cpu)
    with pytest.raises(SteersmanError, match="threads is 0"):
        set_threads(0)
    assert set_threads(None) == torch.get_num_threads()


def test_what_the_process_holds_and_what_the_machine_has():
    before = resident_memory()
    held = torch.ones(16, 2**20)  # 64 MiB, each page written
    grown = resident_memory() - before
    assert 60 * 2**20 < grown < 80 * 2**20
    there = room(torch.device("cpu"))
    assert resident_memory() < there.total
    assert 0 < there.free <= there.total
    del held
