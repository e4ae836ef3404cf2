"""An algorithm is one short file: no two of them share more than a few lines of logic."""

from __future__ import annotations

import ast
from itertools import combinations
from pathlib import Path

import pytest

import steersman.algorithms as algorithms
from steersman.algorithms import ALGORITHMS

FILES = sorted(
    p
    for p in Path(algorithms.__file__).parent.glob("*.py")
    if p.stem not in ("__init__", "base", "load", "group_relative")
)


def logic(source: str) -> list[str]:
    """Lines of the methods' bodies as the parser sees them, without docstrings; settings are no logic."""
    lines: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines += [line.strip() for statement in body for line in ast.unparse(statement).splitlines()]
    return lines


def shared(one: list[str], two: list[str]) -> int:
    """Lines of `one` that stand in `two` as well, each counted as often as it stands in both."""
    return sum(min(one.count(line), two.count(line)) for line in set(one))


def test_there_is_a_file_for_every_method():
    assert len(FILES) == len(ALGORITHMS)
    assert {a.__module__.rpartition(".")[2] for a in ALGORITHMS.values()} == {p.stem for p in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_file_is_short(path):
    assert len(path.read_text().splitlines()) < 60
    assert len(logic(path.read_text())) <= 8


@pytest.mark.parametrize(("one", "two"), combinations(FILES, 2), ids=lambda p: p.stem)
def test_no_two_files_share_more_than_a_few_lines(one, two):
    assert shared(logic(one.read_text()), logic(two.read_text())) <= 3


def test_the_count_sees_a_copy():
    """RLOO's two methods under another name share every line."""
    source = next(p for p in FILES if p.stem == "rloo").read_text()
    renamed = source.replace("RLOO", "Other").replace('"""', '"""Other. ', 1)
    assert shared(logic(source), logic(renamed)) == len(logic(source)) > 3
