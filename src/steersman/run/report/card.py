"""The model card of a run: what was trained, on what, how, and how it went; README.md beside the weights."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from steersman.atomic import write_atomic
from steersman.config.no_secrets import texts_of, without_secrets
from steersman.config.recipe_text import load_yaml
from steersman.guards.terminal import printable
from steersman.jsonl import read_jsonl
from steersman.run.held_out import NONE_HELD_OUT, looks_are_trained_on
from steersman.types import SteersmanError

TOLD = ("held_out/", "evaluation/", "reward/total", "kl", "accuracy", "margin", "loss", "entropy", "length/mean")
"""First parts of the names of numbers that the card's table has."""
LONGEST = 40
"""Rows of the table."""


def write_card(run: Path) -> Path:
    """Writes `model/README.md` of a run folder from what the run left there; returns its path.

    The licence is the one that the base model's own card names; where none is named the card says so. Raises
    SteersmanError where the folder has no config.yaml.
    """
    try:
        settings = (run / "config.yaml").read_text(encoding="utf-8")
    except OSError as error:
        raise SteersmanError(
            f"run: {run} has no config.yaml to tell of in a model card; give the folder of a run, or write "
            "model/README.md by hand"
        ) from error
    config = load_yaml(settings)
    summary = _json(run / "summary.json")
    told = str(config.get("model", {}).get("path", ""))
    licence, base = _licence(Path(told)), _public(told)
    metrics = read_jsonl(run / "metrics.jsonl")
    caution = f"{NONE_HELD_OUT[0].upper()}{NONE_HELD_OUT[1:]}.\n\n" if looks_are_trained_on(config, metrics) else ""
    head = {"library_name": "transformers", "tags": ["steersman", str(summary.get("verb", ""))]}
    head |= {"license": licence} if licence else {}
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {_plain(run.resolve().name)}",
        f"`steersman {_plain(summary.get('verb', ''))}` on `{_plain(base)}`, {summary.get('steps', 0)} steps in "
        f"{float(summary.get('seconds', 0)):.0f} s; {'' if summary.get('finished') else 'stopped early; '}"
        f"steersman {version('steersman')}.",
        f"Licence of the base: {licence or 'its folder names none; look before you pass this model on'}.",
        f"## Data\n\n{_data(config)}",
        f"## How it went\n\n{caution}{_course(metrics)}",
        f"## What the watch said\n\n{_watch(read_jsonl(run / 'health.jsonl'))}",
        f"## Settings\n\n```yaml\n{_plain(_published(settings, config)).rstrip()}\n```",
    ]
    path = run / "model" / "README.md"
    write_atomic(path, "\n\n".join(parts) + "\n")
    return path


def _published(settings: str, config: Any) -> str:
    """The settings' text without what is nobody else's business: of paths of this machine the last parts alone, and
    no names or passwords of addresses."""
    for text in sorted({text for _, text in texts_of(config)}, key=len, reverse=True):
        if _public(text) != text:
            in_lines = re.escape(text).replace(r"\ ", r"\s+")  # long texts are written over several
            whole = rf"(?<![^\s'\"\[{{,]){in_lines}(?![^\s'\"\]}},])"
            settings = re.sub(whole, lambda _, text=text: _public(text), settings)
    return without_secrets(settings)


def _public(text: str) -> str:
    """A path of this machine, or a store's, as its last part; any other text as it is."""
    kind, path = ("sqlite:///", text[10:]) if text.startswith("sqlite:///") else ("", text)
    return kind + Path(path).name if Path(path).is_absolute() else text


def _data(config: dict[str, Any]) -> str:
    data = config.get("data") or {}
    told = data.get("path") or []
    paths = told if isinstance(told, list) else [told]
    lines = [f"- `{_plain(Path(str(path)).name)}`" for path in paths if path]
    parts = (config.get("reward") or {}).get("parts") or {}
    for name, part in parts.items():
        kind = next((k for k in ("model", "function", "builtin", "metric") if part.get(k)), "?")
        lines.append(f"- reward `{_plain(name)}`: {kind} `{_plain(Path(str(part.get(kind))).name)}`")
    return "\n".join(lines) or "None."


def _course(rows: list[dict[str, Any]]) -> str:
    """First and last value of every number that says how it went."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float) and any(
                name == t or (t[-1] == "/" and name.startswith(t)) for t in TOLD
            ):
                found.setdefault(name, []).append(float(value))
    lines = [f"| {_plain(name)} | {x[0]:.4g} | {x[-1]:.4g} |" for name, x in list(found.items())[:LONGEST]]
    return "\n".join(["| | first | last |", "| --- | ---: | ---: |", *lines]) if lines else "Nothing was measured."


def _watch(findings: list[dict[str, Any]]) -> str:
    lines = [f"- step {f.get('step')}: {_plain(f.get('text', ''))}" for f in findings[:LONGEST]]
    return "\n".join(lines) or "Nothing."


def _licence(base: Path) -> str | None:
    """The licence in the front of the base's own card."""
    try:
        text = (base / "README.md").read_text(encoding="utf-8")[:100_000]
        told = load_yaml(text.split("---", 2)[1]) if text.startswith("---") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return None
    licence = told.get("license") if isinstance(told, dict) else None
    return printable(licence)[:60] if isinstance(licence, str) else None


def _plain(text: Any) -> str:
    """Text of others without what could end a code span, a table row or a fence, or be a tag."""
    return printable(str(text)).replace("`", "'").replace("|", "/").replace("<", "&lt;")


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
