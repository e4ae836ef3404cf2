"""`steersman export MODEL --out FOLDER`: a trained model in the form that another program wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from steersman.config.sections import Section
from steersman.model import load_policy, load_reward, save
from steersman.model.adapters import is_adapters
from steersman.model.load import gives_numbers
from steersman.types import SteersmanError


class ExportRecipe(Section):
    """A model written once more: with its adapters added in, or the adapters alone, in a precision of choice."""

    path: str = Field(description="folder of a model, or of adapters")
    out: str = Field(description="folder to write; it must not be there yet")
    form: Literal["merged", "adapters"] = Field(
        default="merged", description="merged: a plain model, with adapters added in; adapters: these alone"
    )
    dtype: Literal["same", "float32", "bfloat16", "float16"] = Field(
        default="same",
        description="precision on disk: float32, bfloat16, float16, or same (that of the model, or of the base of "
        "the adapters)",
    )
    max_shard_size: str = Field(
        default="5GB", pattern=r"^\d+(\.\d+)?(KB|MB|GB)$", description="largest file of weights, such as 500MB"
    )
    trust_remote_code: bool = Field(
        default=False, description="run Python code that comes with the model's folder; read it first"
    )


def run(recipe: ExportRecipe) -> dict[str, Any]:
    """Writes the folder; returns where it is and what was written.

    Raises SteersmanError where the folder is there already, or adapters are asked for and there are none.
    """
    out = Path(recipe.out)
    if out.exists():
        raise SteersmanError(f"out: {out} is there already; name a folder that is not")
    if recipe.form == "adapters" and not is_adapters(recipe.path):
        raise SteersmanError(
            f"form: {recipe.path} holds no adapters alone; train with model.lora and model.merge: false to keep them"
        )
    trust = recipe.trust_remote_code
    load = load_reward if gives_numbers(recipe.path, trust_remote_code=trust) else load_policy
    model: Any = load(recipe.path, device="cpu", trust_remote_code=trust)
    dtype = model.stored_dtype if recipe.dtype == "same" else getattr(torch, recipe.dtype)
    merged, size = recipe.form == "merged", recipe.max_shard_size
    save(model, model.tokenizer, out, merged=merged, dtype=dtype, max_shard_size=size)
    print(f"{recipe.form} written to {out} ({str(dtype).removeprefix('torch.')})")
    return {"out": str(out), "form": recipe.form, "dtype": str(dtype)}
