"""docs/grue.md: the task of one's own, typed as it stands there, and the paper's rewards as the page writes them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from steersman.assets import story_model
from steersman.cli import main
from steersman.grue.cells import reward_parts
from steersman.grue.check import check_matrix
from steersman.grue.recipe import GrueRecipe
from steersman.grue.rows import write_rows
from steersman.reward import RewardConfig, build_reward
from steersman.train import session
from steersman.types import Prompt, Sample, SteersmanError

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


def indented(first: str) -> str:
    """The indented block of the page that begins with these words."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    [start] = [i for i, line in enumerate(lines) if line.startswith(f"    {first}")]
    end = next(i for i in range(start, len(lines)) if lines[i] and not lines[i].startswith("    "))
    return textwrap.dedent("\n".join(lines[start:end]))


def tiny_classifier(folder: Path) -> str:
    """Four labels, fresh weights that spread, the story model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(str(story_model()))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=4, initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def originals(folder: Path) -> None:
    """Rows of IMDB, and of DailyDialog by the page's line for the files of its authors."""
    (folder / "sets" / "imdb").mkdir(parents=True)
    rows = [{"text": f"film {i} was {['good', 'bad'][i % 2]} " * 9, "label": 1 - i % 2} for i in range(60)]
    (folder / "sets/imdb/train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "sets" / "dialogue").mkdir()
    for split in ("train", "validation"):
        said = [[f"{split} {i} turn {t} ." for t in range(7)] for i in range(3)]
        (folder / f"dialogues_{split}.txt").write_text("".join(" __eou__ ".join([*d, "\n"]) for d in said))
        (folder / f"dialogues_act_{split}.txt").write_text("1 2 3 4 1 2 3 \n" * 3)
        line = indented("python -c \"import json; [print(json.dumps({'dialog'").replace("train", split)
        subprocess.run(["bash", "-ec", line.replace("python", sys.executable, 1)], cwd=folder, check=True)


def test_the_paper_s_rewards_are_as_the_page_writes_them(tmp_path):
    originals(tmp_path)
    settings = yaml.safe_load(indented("per_task:"))["per_task"]
    path = tiny_classifier(tmp_path / "classifier")
    settings["imdb"]["reward"]["mood"]["args"]["path"] = path
    settings["dialogue"]["reward"]["intent"]["args"]["path"] = path
    values: dict[str, Any] = {
        "model": {"path": str(story_model())}, "tasks": ["imdb", "dialogue"], "methods": ["zero-shot", "supervised"],
        "data": {"source": "hub", "folder": str(tmp_path / "sets")}, "per_task": settings,
        "run": {"dir": str(tmp_path / "matrix"), "threads": 1},
    }  # fmt: skip
    recipe = GrueRecipe.model_validate(values)
    [imdb, dialogue], rows, _ = check_matrix(recipe)
    assert {row["label"] for row in rows["imdb"].train} == {0, 1}
    write_rows(tmp_path, imdb, rows["imdb"])
    told = [json.loads(line) for line in (tmp_path / "demonstrations.jsonl").read_text().splitlines()]
    assert told
    assert all("good" in line["completion"] for line in told)  # the supervised cells learn on positive reviews

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()

    def reads(text: str) -> torch.Tensor:
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)

    def scores(task, rows):
        parts = RewardConfig.model_validate({"parts": reward_parts(recipe, task)})
        samples = [Sample(Prompt([0], row["prompt"], row), [0], [0.0], "eos", " so it is .") for row in rows]
        return build_reward(parts, tokenizer, "cpu").score(samples).parts

    held = rows["imdb"].held_out
    found = scores(imdb, held)["mood"]
    assert found.tolist() == pytest.approx([float(reads(r["prompt"] + " so it is .")[1]) for r in held], abs=1e-5)
    held = rows["dialogue"].held_out
    found = scores(dialogue, held)["intent"]
    assert sorted({row["intent"] for row in held}) == [1, 2]
    expected = [float(reads(r["last"] + " so it is .").argmax() == r["intent"]) for r in held]
    assert found.tolist() == expected

    with (tmp_path / "sets/dialogue/train.jsonl").open("a") as file:
        file.write(json.dumps({"dialog": ["a"] * 6, "act": [9] * 6}) + "\n")
    with pytest.raises(SteersmanError, match=r"has no label 8; its labels are .*column intent of the row"):
        check_matrix(recipe)
