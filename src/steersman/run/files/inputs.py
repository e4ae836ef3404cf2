"""What a run was given to read, by content: a resumed run must go on from the same data and the same models."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steersman.config.sections import Section
from steersman.types import SteersmanError

WHOLE = 64 * 2**20
"""Bytes up to which a file is read whole."""
BLOCKS, BLOCK = 64, 2**20
"""Of a larger file this many blocks of this many bytes are read, evenly spread, the first and the last among them."""


def fingerprints(recipe: Section, run_folder: Path) -> dict[str, dict[str, str]]:
    """The SHA-256 of each file or folder that a setting of the recipe names: {dotted key: {path: digest}}.

    A folder with a config.json is a model: the files directly in it count. A folder of adapters counts with the model
    that it names, where that is a folder too. Of any other folder all files count. What
    lies in the run folder is the run's own and is left out, and so is what the section `run` names (a tracker's name
    may be its folder's too), a `folder` of many sets (GRUE's), whose rows are compared one by one, and a `cache`, to
    which other runs add. A file above 64 MiB counts by its size and 64
    blocks of 1 MiB, so that a start reads at most that much of each: a change in between is not seen.
    """
    found: dict[str, dict[str, str]] = {}
    own = run_folder.resolve()
    for key, text in _texts(recipe.model_dump(), ""):
        for path in _paths(text):
            if own not in (path.resolve(), *path.resolve().parents):
                found.setdefault(key, {})[str(path)] = _digest(path, own)
    return found


def inputs_of(recipe: Section, run_folder: Path) -> dict[str, dict[str, str]]:
    """What `inputs.json` holds: the fingerprints, and as `recipe` the recipe's class, which is of one verb alone."""
    return {"recipe": {"class": type(recipe).__name__}, **fingerprints(recipe, run_folder)}


def check_inputs(file: Path, now: dict[str, dict[str, str]]) -> None:
    """Raises SteersmanError where the run was another verb's, and, with key and path, for what has another content
    than when the run began.

    `file` is the `inputs.json` of then. A setting that now names another path is a change of the recipe, which the
    run folder reports; it is no concern of this check.
    """
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        kinds = [told.get("recipe", {}).get("class") for told in (before, now)]
        changed = [
            f"{key}: {path}"
            for key, paths in now.items()
            for path, digest in paths.items()
            if before.get(key, {}).get(path, digest) != digest
        ]
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError) as error:
        raise SteersmanError(f"{file}: it can not be read ({error}); remove it to resume without its check") from None
    if None not in kinds and kinds[0] != kinds[1]:
        raise SteersmanError(
            f"run folder {file.parent}: the run in it was begun by another verb, so this one can not resume it; "
            "resume it by its own verb, or choose another --run.dir"
        )
    if changed:
        raise SteersmanError(
            f"run folder {file.parent}: what the run reads has changed since it began ({'; '.join(changed)}), so a "
            "resumed run would not be the same run. Put the old content back, or begin a new run in another --run.dir"
        )


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, key)
    elif isinstance(value, str) and not key.startswith("run.") and not key.endswith(("folder", "cache")):
        yield key, value


def _paths(text: str) -> list[Path]:
    """The existing files or folders that a setting's text names; most settings name none."""
    if not text or len(text) > 4096 or "\0" in text or "\n" in text:
        return []
    try:
        found = [Path(p) for p in sorted(glob.glob(text))] if glob.has_magic(text) else [Path(text)]
        return [p for p in found if (p.is_file() or p.is_dir()) and p.resolve() != Path.cwd()]
    except OSError:
        return []


def _digest(path: Path, own: Path) -> str:
    if path.is_file():
        return _file_digest(path)
    # A model's card says when and where it was trained; it is no part of what is read.
    model = (path / "config.json").is_file()
    inside = (p for p in path.iterdir() if p.name != "README.md") if model else path.rglob("*")
    digest = hashlib.sha256()
    shown = (p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts))
    for file in sorted(p for p in shown if p.is_file()):
        if own in file.resolve().parents:
            continue
        digest.update(f"{file.relative_to(path)}\0{_file_digest(file)}\n".encode())
    if (base := _base(path)) is not None:
        digest.update(_digest(base, own).encode())
    return digest.hexdigest()


def _base(path: Path) -> Path | None:
    """The folder of the model that a folder of adapters is on."""
    try:
        named = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        base = Path(named).expanduser()
    except (OSError, ValueError, KeyError, TypeError):  # no adapters, or none that can be loaded
        return None
    return base if (base / "config.json").is_file() else None


def _file_digest(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for i in range(BLOCKS):
            file.seek(i * (size - BLOCK) // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
        return digest.hexdigest()
