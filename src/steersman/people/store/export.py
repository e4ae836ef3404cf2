"""`steersman export-feedback STORE --for dpo --out pairs.jsonl`: judgements as a file that a verb reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, create_model

from steersman.atomic import check_places, write_atomic
from steersman.config.sections import Section
from steersman.data.config import CountingConfig
from steersman.data.rows import Row
from steersman.data.shapes import Kind
from steersman.jsonl import jsonl_text
from steersman.people.store.reading import StoredRows

KINDS: dict[str, Kind] = {"sft": "demonstration", "dpo": "preference", "kto": "feedback"}
SHAPES: dict[str, Kind] = {
    "pairs": "preference", "rankings": "ranking", "ratings": "rating", "thumbs": "feedback",
}  # fmt: skip


class Export(Section):
    """Judgements of a store as JSONL rows; `data.path: sqlite:///feedback.db` reads the same without a file."""

    store: str = Field(default="feedback.db", description="file or address of the store")
    shape: Literal["auto", "pairs", "rankings", "ratings", "thumbs"] = Field(
        default="auto",
        description="for reward: what it learns from: pairs, rankings, ratings, thumbs, or auto (what the store "
        "has most of)",
    )
    ties: Literal["keep", "drop"] = Field(
        default="drop",
        description="pairs and rankings with ties. drop: leave out; keep: data.ties of the verb decides",
    )
    judgements: CountingConfig = Field(default=CountingConfig(), description="which judgements count, and how much")
    out: str = Field(description="JSONL file to write")


_For = Annotated[
    Literal["reward", "dpo", "kto", "sft"], Field(description="verb that will read the rows: reward, dpo, kto or sft")
]
_fields: dict[str, Any] = {"for": (_For, ...)}
ExportRecipe = create_model("ExportRecipe", __base__=Export, __doc__=Export.__doc__, **_fields)
"""`Export` with the key `for`, which no Python class can spell."""


def run(recipe: Export) -> dict[str, Any]:
    """Writes the rows and says how many; names and logins of raters are never among them."""
    check_places(recipe.out)
    address = recipe.store if "://" in recipe.store else f"sqlite:///{recipe.store}"
    stored = StoredRows(address)
    verb = getattr(recipe, "for")
    want = _wanted(recipe, verb, stored)
    rows = list(stored.rows(want, recipe.judgements))
    kept = [row for row in rows if recipe.ties == "keep" or not _tied(row)]
    write_atomic(Path(recipe.out), jsonl_text(row.data for row in kept))
    tied = f", {len(rows) - len(kept)} ties left out" if len(kept) < len(rows) else ""
    print(f"{recipe.out}: {len(kept)} rows for {verb} ({want}){tied}")
    return {"rows": len(kept), "ties": len(rows) - len(kept), "kind": want, "out": recipe.out}


def _wanted(recipe: Export, verb: str, stored: StoredRows) -> Kind:
    if verb in KINDS:
        return KINDS[verb]
    if recipe.shape != "auto":
        return SHAPES[recipe.shape]
    there: list[Kind] = [kind for kind in stored.kinds(recipe.judgements) if kind in SHAPES.values()]
    return there[0] if there else "preference"


def _tied(row: Row) -> bool:
    ranks = row.data.get("ranks")
    return row.data.get("agreement") == 0.5 or (ranks is not None and len(set(ranks)) < len(ranks))
