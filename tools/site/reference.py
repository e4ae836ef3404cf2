"""Writes the documentation site's reference: a page of recipe keys for each verb, and a page for each room's API.

mkdocs calls the functions of this file (`hooks` in mkdocs.yml). No page is kept in the repository, so none can be out
of date: the keys come from the recipe classes, the API from the sources.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import steersman
from steersman.config.help import default_text
from steersman.config.recipe_text import type_text
from steersman.config.sections import Section, section_of
from steersman.verb_table import VERBS, Verb

PACKAGE = Path(steersman.__file__).parent
ABOVE_ROOMS = ["api", "types", "atomic", "extras"]
"""Modules that stand on no room's page."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the reference and the recorded runs into the site's navigation."""
    docs = Path(config.docs_dir)
    results = sorted(path.name for path in (docs / "results").glob("*.md"))
    config.nav = [
        *(config.nav or []),
        {"Recorded runs": [f"results/{name}" for name in results]},
        {"Recipe keys": ["reference/recipes.md", *(f"reference/recipes/{name}.md" for name in VERBS)]},
        {"Python": ["reference/python.md", *(f"reference/api/{room}.md" for room in rooms())]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    pages = {"reference/recipes.md": verbs_page(), "reference/python.md": public_page()}
    pages |= {f"reference/recipes/{name}.md": recipe_page(name, verb) for name, verb in VERBS.items()}
    pages |= {f"reference/api/{room}.md": room_page(room) for room in rooms()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def rooms() -> list[str]:
    """The packages of steersman with code in them."""
    return sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists())


def modules(room: str) -> list[str]:
    """Dotted names of a room's modules, the package itself first."""
    found = []
    for path in sorted((PACKAGE / room).rglob("*.py")):
        if not (path.parent / "__init__.py").exists():  # runs inside another program
            continue
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] != "__init__":
            found.append(".".join(["steersman", *parts]))
    return found or [f"steersman.{room}"]


def room_page(room: str) -> str:
    """The API of every module of a room."""
    blocks = "\n\n".join(f"::: {module}\n    options: {{heading_level: 2}}" for module in modules(room))
    return f"# steersman.{room}\n\n{blocks}\n"


def public_page() -> str:
    """The names that `import steersman` offers, each with a link to its entry."""
    doc = (steersman.__doc__ or "").strip()
    rows = "\n".join(f"| `steersman.{name}` | [{home}][{home}] |" for name, home in public_names())
    own = "\n\n".join(f"::: steersman.{module}\n    options: {{heading_level: 2}}" for module in ABOVE_ROOMS)
    return f"# The Python package\n\n{doc}\n\n| name | defined as |\n| --- | --- |\n{rows}\n\n{own}\n"


def public_names() -> list[tuple[str, str]]:
    """Each public name with the dotted place where it is defined."""
    places = []
    for name in steersman.__all__:
        found = getattr(steersman, name)
        module = getattr(found, "__module__", None)  # a dict of classes has none: its package's page shows it
        places.append((name, f"{module}.{name}" if module else "steersman.algorithms.base.Algorithm"))
    return places


def verbs_page() -> str:
    """All verbs, a line each."""
    rows = "\n".join(f"| [{name}](recipes/{name}.md) | {verb.help} |" for name, verb in VERBS.items())
    return (
        "# Recipe keys\n\nA recipe is a YAML file of sections. Every key is also a setting of the command line, "
        "which wins over the recipe: `--optimizer.lr 1e-5`. `steersman VERB --help` prints these tables, and "
        "`steersman VERB --print-config` a whole recipe to change.\n\n"
        f"| verb | what it does |\n| --- | --- |\n{rows}\n"
    )


def recipe_page(name: str, verb: Verb) -> str:
    """Every key of a verb's recipe: default, meaning and type, a table for each section."""
    recipe = verb.recipe_class(None, [])
    out = [f"# {name}\n\n{verb.help[0].upper()}{verb.help[1:]}.\n"]
    out += _section(recipe, None, "", recipe.unread_keys())
    return "\n".join(out)


def _section(model: type[Section], default: Any, prefix: str, unread: frozenset[str]) -> list[str]:
    rows, below = [], []
    for name, info in model.model_fields.items():
        own = ... if info.is_required() else info.get_default(call_default_factory=True, validated_data={})
        value = getattr(default, name) if isinstance(default, Section) else own
        inner = section_of(info.annotation)
        if f"{prefix}{name}" in unread:
            continue
        if inner is None:
            cells = [
                f"`{prefix}{name}`",
                "required" if value is ... else f"`{default_text(value)}`",
                _cell(info.description or ""),
                _cell(type_text(info.annotation, info.metadata)),
            ]
            rows.append(f"| {' | '.join(cells)} |")
            continue
        about = info.description or (inner.__doc__ or "").strip().split("\n")[0]
        off = " Off unless it is given." if value is None else ""
        below += [f"\n## {prefix}{name}\n", f"{about}{off}\n", *_section(inner, value, f"{prefix}{name}.", unread)]
    table = ["| key | default | meaning | type |", "| --- | --- | --- | --- |", *rows, ""] if rows else []
    return table + below


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
