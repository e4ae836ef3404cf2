"""The task of one's own on docs/grue.md, typed as it stands there, through the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

from steersman.assets import story_model
from steersman.cli import main
from steersman.train import session

PAGE = Path(__file__).parents[2] / "docs" / "grue.md"


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found, "the page lost its snippets"
    return found


def test_the_page_s_own_task_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "write_report", lambda folder: folder / "report.html")
    (tmp_path / "headlines.py").write_text("\n\n".join(blocks("python")))
    [recipe] = blocks("yaml")
    (tmp_path / "headlines.yaml").write_text(recipe.replace("MODEL", str(story_model())))
    (tmp_path / "data").mkdir()
    for split, count in (("train", 8), ("validation", 4)):
        rows = [
            {"body": f"The {split} dog number {i} ran home.", "topic": "dog", "headlines": [f"Dog {i} is home"]}
            for i in range(count)
        ]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(["grue", "headlines.yaml", "--run.threads", "1"]) == 0
    assert "3 of 3 cells; done" in capsys.readouterr().out
    page = (tmp_path / "runs" / "headlines" / "grue.md").read_text()
    assert "| method | seeds | reward* | rougeL* | words | topic |" in page
    found = json.loads(
        (tmp_path / "runs/headlines/cells/headlines/supervised+grpo/seed-0/evaluation.json").read_text()
    )
    parts = found["reward"]
    assert abs(parts["total"] - parts["rougeL"] - 0.2 * parts["short"]) < 1e-6
    assert "topic" in found["preference"]
