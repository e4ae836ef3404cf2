"""What `make sanitize` builds with ends a process that reads or converts what it must not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from steersman.native import build

COMPILER = build.compiler()
CODE = b"""
extern "C" float beyond(const float* x, long i) { return x[i]; }
extern "C" int integer(float x) { return static_cast<int>(1 << static_cast<int>(x)); }
"""
CALLS = """
import ctypes, sys
import numpy as np
lib = ctypes.CDLL(sys.argv[1])
lib.beyond.argtypes, lib.beyond.restype = [ctypes.c_void_p, ctypes.c_long], ctypes.c_float
lib.integer.argtypes = [ctypes.c_float]
x = np.zeros(100, dtype=np.float32)
print(lib.beyond(x.ctypes.data, 99) if sys.argv[2] == "beyond" else lib.integer(3.0))
print("now", flush=True)
print(lib.beyond(x.ctypes.data, 100) if sys.argv[2] == "beyond" else lib.integer(40.0))
"""


def runtime(name: str) -> str:
    """Where the compiler has this library; its bare name where it has none."""
    asked = [str(COMPILER), f"-print-file-name={name}"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(
    COMPILER is None or not Path(runtime("libasan.so")).is_absolute(),
    reason="no compiler with AddressSanitizer is here",
)
@pytest.mark.parametrize(("fault", "said"), [("beyond", "heap-buffer-overflow"), ("integer", "shift exponent 40")])
def test_a_fault_ends_the_process_by_name(fault, said, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = build.built(str(COMPILER), {"a.cpp": CODE}, build.SANITIZED)
    preloaded = f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}"
    ran = subprocess.run(
        [sys.executable, "-c", CALLS, str(library), fault], capture_output=True, text=True,
        env={**os.environ, "LD_PRELOAD": preloaded, "ASAN_OPTIONS": "detect_leaks=0"},
    )  # fmt: skip
    assert ran.stdout.splitlines()[-1] == "now"
    assert ran.returncode != 0
    assert said in ran.stderr
