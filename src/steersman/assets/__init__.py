"""What ships with the package: a small story model and openings to prompt it with."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def story_model() -> Path:
    """Folder of the shipped language model, in the Hugging Face layout."""
    return Path(str(files("steersman.assets") / "story-model"))


def openings() -> list[str]:
    """The shipped story openings, four to twelve words each, in the order of the file."""
    return (files("steersman.assets") / "openings.txt").read_text(encoding="utf-8").splitlines()
