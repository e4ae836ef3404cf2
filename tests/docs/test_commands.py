"""Command lines of the documentation: each is read as typed, and no two of a page write into one folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from steersman.cli import main
from steersman.verb_table import VERBS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "how-to").glob("*.md"))]
ELSEWHERE = {"plan", "check-env"}
"""Verbs that take another verb's recipe, or build what they are asked about."""
KEEP_NOTHING = {"chat", "generate", "evaluate", "serve"}
"""Verbs that leave no run folder."""
LINE = re.compile(r"^    (?:[A-Z_]+=\S+ |srun .*?)?steersman ((?:.*\\\n)*.*)", re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page, as the shell's words; those with a gap (`...`) are left out."""
    text = page.read_text(encoding="utf-8")
    found = [shlex.split(line.replace("\\\n", " "), comments=True) for line in LINE.findall(text)]
    return [w for w in found if w and w[0] in VERBS and w[0] not in ELSEWHERE and "..." not in w]


def runnable(words: list[str]) -> list[str] | None:
    """The line with one of our recipes in the place of the reader's own; None where another file of his is read."""
    verb, *rest = words
    files = [word.partition(":")[0] for word in rest]
    if any(file.endswith((".json", ".py")) and not (ROOT / file).exists() for file in files):
        return None
    given = Path(rest[0]) if rest and rest[0].endswith(".yaml") else None
    # a verb of a file takes a recipe too, which the pages call recipe.yaml
    of_a_file = bool(VERBS[verb].file_key) and given != Path("recipe.yaml")
    if given is None or of_a_file or (ROOT / given).exists():
        return words
    ours = ROOT / "recipes" / f"{verb}.yaml"
    return [verb, str(ours), *rest[1:]] if ours.exists() else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_line_is_a_recipe(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    folders: dict[str, list[str]] = {}
    for words in commands(page):
        line = runnable(words)
        if line is None or "--resume" in line:
            continue
        code = main([*line, "--print-config"])
        out, err = capsys.readouterr()
        assert code == 0, f"{page.name}: steersman {shlex.join(words)}\n{err}"
        run = (yaml.safe_load(out) or {}).get("run")
        if words == line and isinstance(run, dict) and words[0] not in KEEP_NOTHING:
            first = folders.setdefault(run["dir"], words)
            assert first is words, f"{page.name}: {first} and {words} write into {run['dir']}"
