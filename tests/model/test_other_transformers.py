"""What touches transformers' insides holds with the oldest and the newest transformers that pyproject allows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600


@pytest.mark.slow
@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_each_family_takes_its_paths_and_computes_what_the_library_does(which):
    """`make test-transformers` runs many more."""
    script = [sys.executable, str(ROOT / "tools" / "transformers_versions.py"), "--only", which, "--short"]
    ran = subprocess.run([*script, "--seconds", str(SECONDS)], text=True, capture_output=True, timeout=2 * SECONDS)
    if ran.returncode == 75:
        pytest.skip(f"another transformers could not be had: {ran.stderr.strip().splitlines()[-1]}")
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert "llama: fused log-probabilities" in ran.stdout
