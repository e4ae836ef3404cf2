"""A checkpoint of an accelerator's weights goes to the CPU tensor by tensor: nothing is copied on the device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pretend_device
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not pretend_device.available(), reason="needs Linux and a C++ compiler"),
]

SAVE = """
import sys, pretend_device, torch
from torch import nn
from steersman.run.files.checkpoint import Checkpointer
from steersman.train.session import kept_state, require_same
from steersman.update.optimizer import Optimizer, OptimizerConfig
pretend_device.start()
rounding, wait = sys.argv[1], sys.argv[2] == "True"
weights = {f"w{i}": nn.Parameter(torch.randn(128, 256).to(torch.bfloat16).to("pretend:0")) for i in range(8)}
optimizer = Optimizer(weights.values(), OptimizerConfig(rounding=rounding), 10)

def step(scale):
    for w in weights.values():
        w.grad = torch.full_like(w, scale)
    optimizer.step()

step(1.0)
with pretend_device.memory() as held:
    pass
checkpoints = Checkpointer(sys.argv[3])
with pretend_device.memory() as seen:
    state = {"model": kept_state(weights), "optimizer": optimizer.state_dict()}
    require_same(state)
    path = checkpoints.save(1, state, wait=wait)
    del state
assert seen[0] - held[0] <= next(iter(weights.values())).nbytes, (held, seen)
before = [p.detach().cpu().clone() for p in weights.values()]
step(-1.0)  # while it may still be written
after = [p.detach().cpu().clone() for p in weights.values()]
checkpoints.wait()
found = checkpoints.load(path).state
for w, saved in zip(weights.values(), found["model"].values(), strict=True):
    w.data.copy_(saved)
optimizer.load_state_dict(found["optimizer"])
assert all(torch.equal(a, b) for a, b in zip(before, (p.detach().cpu() for p in weights.values()), strict=True))
step(-1.0)
assert all(torch.equal(a, b) for a, b in zip(after, (p.detach().cpu() for p in weights.values()), strict=True))
"""


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("rounding", ["master", "kahan"])
def test_a_checkpoint_takes_no_memory_on_the_device(rounding, wait, tmp_path):
    here = Path(__file__).parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    words = [sys.executable, "-c", SAVE, rounding, str(wait), str(tmp_path)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
