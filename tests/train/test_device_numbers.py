"""A rank's device is told by its number, so that weights which transformers reads on threads come to it too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pretend_device
import pytest
from letter_models import save_mini

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not pretend_device.available(), reason="needs Linux and a C++ compiler"),
]

SECOND = """
import sys, threading, pretend_device, torch
from transformers import AutoModelForCausalLM
from steersman.model import load_policy
from steersman.run.device import resolve_device
pretend_device.start()
torch.pretend.set_device(1)  # as a second rank does with its own
device, found = resolve_device("pretend"), []
thread = threading.Thread(target=lambda: found.append(torch.zeros(1, device=device).device))
thread.start()
thread.join()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map={"": device})
found += [p.device for p in model.parameters()]
found += [p.device for p in load_policy(sys.argv[1], device="pretend").parameters()]
assert {str(one) for one in found} == {"pretend:1"}, found
assert str(resolve_device("pretend:0")) == "pretend:0"
"""


def test_what_other_threads_load_comes_to_the_rank_s_own_device(tmp_path):
    here = Path(__file__).parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    words = [sys.executable, "-c", SECOND, str(save_mini(tmp_path / "model"))]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
