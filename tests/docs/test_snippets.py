"""The code on documentation pages runs, block after block, as a reader would type it."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from steersman import verb_table

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ["from-bellman-to-ppo.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_runs(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) >= 5, "the page lost its snippets"
    space: dict[str, object] = {"__name__": "__page__"}
    for block in blocks:
        # blank lines in front keep the line numbers of a traceback those of the page
        source = "\n" * text[: block.start(1)].count("\n") + block[1]
        exec(compile(source, str(DOCS / page), "exec"), space)


def test_each_part_that_can_be_added_has_an_example_that_runs(tmp_path, monkeypatch, capsys):
    """Block after block in a module of its own; the comments right after a block's last line are what it prints."""
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    blocks = [block[1] for block in BLOCK.finditer(page)]
    (tmp_path / "added.py").write_text("\n\n".join(blocks))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with mock.patch.dict(verb_table.VERBS):  # one block adds a verb
        importlib.import_module("added")
    del sys.modules["added"]
    expected = [line.removeprefix("# ") for block in blocks for line in _tail(block)]
    assert len(blocks) == 6
    assert expected == capsys.readouterr().out.splitlines()


def _tail(block: str) -> list[str]:
    """The comments at the end of a block."""
    lines = block.rstrip().splitlines()
    return lines[next(i for i in range(len(lines), 0, -1) if not lines[i - 1].startswith("# ")) :]


@pytest.mark.parametrize("page", PAGES)
def test_printed_output_is_what_the_page_says(page, capsys):
    """A comment right after a print is its output."""
    text = (DOCS / page).read_text(encoding="utf-8")
    first = BLOCK.search(text)
    assert first is not None
    exec(compile(first[1], page, "exec"), {})
    told = re.findall(r"^print\(.*\)\n# (.*)$", first[1], re.MULTILINE)
    assert told == capsys.readouterr().out.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/how-to/reward.md", "docs/how-to/measure.md"])
def test_snippets_run_in_an_empty_folder(page, tmp_path):
    """As a reader would paste them, all blocks of a page one after the other, in a process of its own."""
    blocks = [block[1] for block in BLOCK.finditer((DOCS.parent / page).read_text(encoding="utf-8"))]
    assert blocks
    (tmp_path / "page.py").write_text("\n\n".join(blocks))
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = re.findall(r"^print\(.*\)\n# (.*)$", "\n".join(blocks), re.MULTILINE)
    assert not told or told == done.stdout.splitlines()
