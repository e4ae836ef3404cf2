"""The documentation site: built strictly, with an entry for every public name and every recipe key."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

import steersman
from steersman.config.sections import Section, section_of, walk_keys
from steersman.verb_table import VERBS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocstrings", reason="the documentation's tools are the extra `docs`")
    out = tmp_path_factory.mktemp("site")
    done = build(out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def build(out: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(out)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "DOCS_WHOLE": "false"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_every_recipe_key_has_its_entry(site):
    for name, verb in VERBS.items():
        page = (site / "reference" / "recipes" / f"{name}.html").read_text()
        entries = set(re.findall(r"<code>([^<]+)</code>", page))
        recipe = verb.recipe_class(None, [])
        for key, info in walk_keys(recipe):
            if section_of(info.annotation) is None:
                unread = any(key == idle or key.startswith(f"{idle}.") for idle in recipe.unread_keys())
                assert (key in entries) != unread, f"{name}: {key}"


@pytest.mark.slow
def test_every_public_name_leads_to_its_entry(site):
    page = (site / "reference" / "python.html").read_text()
    for name in steersman.__all__:
        assert f"<code>steersman.{name}</code>" in page
        found = getattr(steersman, name)
        if isinstance(found, type) or callable(found):
            place = f"{found.__module__}.{name}"
            pages = [p for p in (site / "reference").rglob("*.html") if f'id="{place}"' in p.read_text()]
            assert pages, f"{place} has no entry"


@pytest.mark.slow
def test_a_link_that_leads_nowhere_fails(site, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("[gone](nowhere.md)\n\n[also gone][steersman.nothing]\n")
    text = (ROOT / "mkdocs.yml").read_text()
    text = text[: text.index("# The pages of the two last")].replace("docs_dir: docs", f"docs_dir: {docs}")
    text = text.replace("hooks: [tools/site/reference.py]", "").replace("paths: [src]", f"paths: [{ROOT / 'src'}]")
    config = tmp_path / "mkdocs.yml"
    config.write_text(text)
    done = build(tmp_path / "out", config)
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr
    assert "steersman.nothing" in done.stderr


def test_every_recipe_key_says_what_it_means():
    silent = {
        f"{name} {key}"
        for name, verb in VERBS.items()
        for key, info in walk_keys(verb.recipe_class(None, []))
        if section_of(info.annotation) is None and not (info.description or "").strip()
    }
    assert not silent


def test_every_value_of_a_choice_stands_in_its_description():
    """As a whole word; or between backticks on the page of docs/ that the description names."""
    unnamed = {}
    for section in sections():
        for name, info in section.model_fields.items():
            text = info.description or ""
            pages = "".join((ROOT / page).read_text() for page in re.findall(r"docs/[\w/-]+\.md", text))
            absent = [
                value
                for value in choices(info.annotation)
                if not re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", text) and f"`{value}`" not in pages
            ]
            if absent:
                unnamed[f"{section.__name__}.{name}"] = (absent, text)
    assert not unnamed


def sections() -> set[type[Section]]:
    """All section classes of all recipes, those in lists and mappings too."""
    found: set[type[Section]] = set()
    to_see = [verb.recipe_class(None, []) for verb in VERBS.values()]
    while to_see:
        section = to_see.pop()
        if section not in found:
            found.add(section)
            to_see += [part for info in section.model_fields.values() for part in parts(info.annotation)]
    return found


def parts(annotation: Any) -> Iterator[type[Section]]:
    """The section classes in an annotation, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from parts(inner)


def choices(annotation: Any) -> list[str]:
    """The words that a value may be one of, at any depth; empty where there is no choice."""
    given = get_args(annotation)
    if get_origin(annotation) is Literal:
        return [value for value in given if isinstance(value, str)] if len(given) > 1 else []
    return [value for inner in given for value in choices(inner)]
