"""The leaderboard as a user calls it: a model that wins by length alone is told from one that is better."""

from __future__ import annotations

import json
import math
import random

import pytest

from steersman.cli import main
from steersman.people.judgements import JudgementFiles
from steersman.people.leaderboard import LeaderboardRecipe, run, style_battles


def rows(count: int) -> list[dict]:
    """`good` is better by one nat; `long` writes three times as much, and people like that, whoever does it."""
    rng, out = random.Random(0), []
    for i in range(count):
        models = rng.sample(["plain", "good", "long"], 2)
        sizes = [max(1, int(rng.gauss(30 if m == "long" else 12, 8))) for m in models]
        lead = (models[0] == "good") - (models[1] == "good") + 3 * (sizes[0] - sizes[1]) / sum(sizes)
        first = rng.random() < 1 / (1 + math.exp(-lead))
        out.append(
            {"id": str(i), "user": f"u{i % 60}", "prompt": f"p{i % 40}", "models": models,
             "answers": ["word " * n for n in sizes], "choice": "first" if first else "second"}
        )  # fmt: skip
    return out


def test_length_alone_is_no_lead_where_it_is_held_equal(tmp_path, capsys):
    path = tmp_path / "j.jsonl"
    more = [
        {"id": "g", "user": "u", "prompt": "p", "models": ["plain", "good"], "answers": ["a", "b"], "choice": "tie",
         "expected": "first"},
        {"id": "s", "user": "u", "prompt": "p", "models": ["plain", "plain"], "answers": ["a", "b"], "choice": "tie"},
        {"id": "t", "user": "u", "prompt": "p", "model": "plain", "completion": "a", "label": True},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in [*rows(2500), *more]))
    assert main(["leaderboard", str(path), "--anchor", "plain", "--out", str(tmp_path / "out.json")]) == 0
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["battles"] == 2500
    plain, fair = ({r["player"]: r for r in told[k]} for k in ("ratings", "style_controlled"))
    assert plain["long"]["low"] > 1100
    assert fair["long"]["low"] < 1000 < fair["long"]["high"]
    assert fair["good"]["low"] > 1100
    assert told["effects"]["length"]["low"] > 0
    assert told["effects"]["bold"]["value"] == 0
    assert "style held equal" in " ".join(capsys.readouterr().out.split())
    by_prompt = {b.group for b in style_battles(JudgementFiles(path), "prompt")}
    assert len(by_prompt) == 40
    only = run(LeaderboardRecipe(file=str(path), features=["bold"], draws=20))
    assert list(only["effects"]) == ["bold"]


def test_one_rater_has_no_interval_and_it_is_said(tmp_path, capsys):
    path, out = tmp_path / "j.jsonl", tmp_path / "out.json"
    path.write_text("".join(json.dumps({**row, "user": "local"}) + "\n" for row in rows(60)))
    assert main(["leaderboard", str(path), "--anchor", "plain", "--draws", "20", "--out", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "all choices are of one user, so there is no interval; --cluster prompt resamples prompts" in said
    assert "length: +" in said
    assert "(no interval)" in said
    told = json.loads(out.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    bounds = {r["player"]: (r["low"], r["high"]) for r in told["ratings"]}
    assert bounds == {"plain": (1000, 1000), "good": (None, None), "long": (None, None)}
    assert main(["leaderboard", str(path), "--cluster", "prompt", "--draws", "20"]) == 0
    said = capsys.readouterr().out
    assert "so there is no interval" not in said
    told = [line for line in said.splitlines() if "no interval" in line]
    assert [line.split(":")[0] for line in told] == ["headers", "lists", "bold"], "which never differ"


def test_refusals(tmp_path, capsys):
    path = tmp_path / "j.jsonl"
    path.write_text(json.dumps({"user": "u", "prompt": "p", "completion": "a", "label": 1}) + "\n")
    assert main(["leaderboard", str(path)]) == 2
    assert "no judgement between two models" in capsys.readouterr().err
    path.write_text("".join(json.dumps(r) + "\n" for r in rows(9)))
    assert main(["leaderboard", str(path), "--anchor", "best"]) == 2
    assert "was never judged; there are good, long, plain" in capsys.readouterr().err
