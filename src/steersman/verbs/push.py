"""`steersman push RUN --name USER/MODEL`: a run's model, with its card, to a model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from steersman.config.sections import Section
from steersman.guards.terminal import printable
from steersman.run.preflight import size
from steersman.run.report.card import write_card
from steersman.types import SteersmanError

UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".py")
"""Files that can run code where they are loaded: none is pushed."""


class PushRecipe(Section):
    """What is pushed, and under which name."""

    run: str = Field(description="run folder; what is pushed is the folder `model` in it")
    name: str = Field(description="where to: USER/MODEL")
    private: bool = Field(default=True, description="make a new repository private")
    dry_run: bool = Field(default=False, description="show what would be pushed, and push nothing")


def run(recipe: PushRecipe) -> dict[str, Any]:
    """Shows the files, and pushes them unless it is a dry run; returns their names.

    Raises SteersmanError where there is no model, the name is none, a file could run code, or the hub refuses.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    folder = Path(recipe.run) / "model"
    if not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        raise SteersmanError(f"run: {folder} holds no model; a run that was stopped has none yet, so resume it")
    try:
        validate_repo_id(recipe.name)
    except HFValidationError as error:
        raise SteersmanError(f"name: {recipe.name!r} is no name of a repository: {error}") from error
    write_card(Path(recipe.run))
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    odd = [p.name for p in files if p.suffix in UNSAFE or p.is_symlink()]
    if odd:
        raise SteersmanError(f"run: {folder} holds files that could run code, or links: {', '.join(odd[:4])}")
    for path in files:
        print(f"  {printable(str(path.relative_to(folder)))}  {size(path.stat().st_size)}")
    if recipe.dry_run:
        print(f"dry run: nothing was pushed to {recipe.name}")
    else:
        _push(recipe, folder)
        print(f"pushed to {recipe.name}")
    return {"name": recipe.name, "pushed": not recipe.dry_run, "files": [str(p.relative_to(folder)) for p in files]}


def _push(recipe: PushRecipe, folder: Path) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        api.create_repo(recipe.name, private=recipe.private, exist_ok=True)
        api.upload_folder(repo_id=recipe.name, folder_path=folder, commit_message="Model of a steersman run")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise SteersmanError(
            f"name: the hub did not take {recipe.name}: {str(error).splitlines()[0]}; log in with `hf auth login`, "
            "or look first with --dry_run true"
        ) from error
