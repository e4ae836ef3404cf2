"""`steersman report RUN`: the page of a run folder, written again from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from steersman.config.sections import Section
from steersman.run.report.page import write_report


class ReportRecipe(Section):
    """Which run has its page written."""

    run: str = Field(description="run folder, in which report.html is written")


def run(recipe: ReportRecipe) -> dict[str, Any]:
    """Writes the page, prints its path and returns it. Raises SteersmanError where the folder holds no run."""
    page = write_report(Path(recipe.run))
    print(page)
    return {"report": str(page)}
