"""The documentation site: built strictly, with an entry for every public name and every recipe key."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import steersman
from steersman.cli import VERBS
from steersman.config.sections import section_of, walk_keys

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
