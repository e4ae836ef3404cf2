"""The scripts that made the recorded pages still find what they take from the package."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2]
SCRIPTS = sorted([*(HOME / "tools").rglob("*.py"), *(HOME / "benchmarks").glob("*.py")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(HOME)))
def test_every_name_that_a_script_imports_is_there(script):
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "steersman":
            assert node.module is not None
            there = importlib.import_module(node.module)
            for name in node.names:
                if name.name not in vars(there):
                    importlib.import_module(f"{node.module}.{name.name}")
