"""`steersman push RUN --name USER/MODEL`: a run's model, with its card, or a model folder, to a model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from steersman.config.sections import Section
from steersman.guards.terminal import printable
from steersman.model.adapter_files import adapter_notes
from steersman.model.adapters import is_adapters
from steersman.run.preflight import size
from steersman.run.report.card import write_card
from steersman.types import SteersmanError

UNSAFE = (
    ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".h5", ".keras",
    ".py", ".pyc", ".so", ".dll", ".dylib", ".sh",
    ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zip", ".7z",
)  # fmt: skip
"""Files that can run code where they are loaded, and archives, which may hold such: none is pushed."""


class PushRecipe(Section):
    """What is pushed, and under which name."""

    run: str = Field(description="run folder, whose folder `model` is pushed, or a model folder, such as of `export`")
    name: str = Field(description="where to: USER/MODEL")
    private: bool = Field(default=True, description="make a new repository private")
    dry_run: bool = Field(default=False, description="show what would be pushed, and push nothing")


def run(recipe: PushRecipe) -> dict[str, Any]:
    """Shows the files, and pushes them unless it is a dry run; returns their names. A run's model without a card gets
    one.

    Raises SteersmanError where there is no model, the name is not that of a repository, adapters are on a base that
    only this machine has, a file could run code, or the hub refuses or is not reached.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    folder = _model_folder(Path(recipe.run).expanduser())
    _require_reachable_base(folder)
    try:
        validate_repo_id(recipe.name)
    except HFValidationError as error:
        raise SteersmanError(f"name: {recipe.name!r} is no name of a repository: {error}") from error
    if not (folder / "README.md").exists() and folder.parent == Path(recipe.run).expanduser():
        write_card(folder.parent)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    odd = [p.name for p in files if p.suffix.lower() in UNSAFE or p.is_symlink()]
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


def _model_folder(given: Path) -> Path:
    """The model of a run folder, or the folder itself."""
    for folder in (given / "model", given):
        if (folder / "config.json").exists() or is_adapters(str(folder)):
            return folder
    if (given / "checkpoints").exists():
        raise SteersmanError(f"run: {given} was stopped before it left a model; resume it first")
    raise SteersmanError(f"run: {given} is no run folder with a model, and holds no model itself (no config.json)")


def _require_reachable_base(folder: Path) -> None:
    """Raises SteersmanError for adapters on a model that nobody else can load by the name that they give."""
    if not is_adapters(str(folder)):
        return
    base = adapter_notes(str(folder)).base
    if Path(base).expanduser().is_absolute() or Path(base).exists():
        raise SteersmanError(
            f"run: the adapters in {folder} name {base} as their base, a folder of this machine, which nobody else "
            f"can load; push the whole model (`steersman export {folder} --out merged`, then push merged), or write "
            "the base's hub name as base_model_name_or_path into adapter_config.json"
        )


def _push(recipe: PushRecipe, folder: Path) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(recipe.name, private=recipe.private, exist_ok=True)
        api.upload_folder(repo_id=recipe.name, folder_path=folder, commit_message="Model of a steersman run")
    except (HfHubHTTPError, LocalTokenNotFoundError, ValueError) as error:
        raise _not_taken(recipe, error, "log in with `hf auth login`, or look first with --dry_run true") from error
    except (HTTPError, OSError) as error:  # HTTPError: that of the library by which the hub's own speaks HTTP
        raise _not_taken(recipe, error, "it was not reached: see that there is a network, and push again") from error


def _not_taken(recipe: PushRecipe, error: Exception, advice: str) -> SteersmanError:
    told = printable((str(error).splitlines() or [""])[0]) or type(error).__name__
    return SteersmanError(f"name: the hub did not take {recipe.name}: {told}; {advice}")
