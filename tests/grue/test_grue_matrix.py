"""A whole small matrix: made by the real verbs, killed between and inside cells, resumed, and its pages."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from grue_kit import settings
from safetensors.torch import load_file

from steersman.config.load import load_recipe
from steersman.grue import run as grue_run
from steersman.grue.cells import cells
from steersman.grue.check import check_matrix
from steersman.grue.compare import comparison_sentences
from steersman.grue.leaderboard import add, read
from steersman.grue.recipe import GrueRecipe
from steersman.grue.results import collect
from steersman.grue.run import run
from steersman.grue.statistics import difference, mean
from steersman.train import session
from steersman.types import SteersmanError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(session, "write_report", lambda folder: folder / "report.html")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One matrix, run once; tests only read it."""
    folder = tmp_path_factory.mktemp("grue")
    values = settings(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "write_report", lambda folder: folder / "report.html")
        summary = run(GrueRecipe.model_validate(values))
    return Path(values["run"]["dir"]), values, summary


def evaluation(folder: Path, method: str, task: str = "colours") -> dict:
    return json.loads((folder / "cells" / task / method / "seed-0" / "evaluation.json").read_text())


def test_every_cell_is_a_run_of_a_verb(done):
    folder, _, summary = done
    assert summary["finished"]
    assert summary["cells"] == summary["planned"] == 3
    cell = folder / "cells" / "colours" / "supervised+grpo" / "seed-0"
    verbs = json.loads((cell / "summary.json").read_text())
    assert (verbs["verb"], verbs["finished"], verbs["steps"]) == ("grpo", True, 3)
    config = yaml.safe_load((cell / "config.yaml").read_text())
    assert config["model"]["path"] == str(folder / "cells" / "colours" / "supervised" / "seed-0" / "model")
    assert not (cell / "checkpoints").exists()
    assert (cell / "model" / "model.safetensors").exists()


def test_the_evaluation_is_of_the_saved_texts(done):
    folder, *_ = done
    for method in ("zero-shot", "supervised", "supervised+grpo"):
        found = evaluation(folder, method)
        rows = [json.loads(x) for x in (folder / "cells" / "colours" / method / "seed-0" / "held_out.jsonl").open()]
        assert found["prompts"] == len(rows) == 6
        covered = [sum(w in row["text"].lower().split() for w in ("red",)) for row in rows]
        assert found["reward"]["total"] == pytest.approx(sum(row["reward"] for row in rows) / 6)
        assert found["preference"]["length"][0] == pytest.approx(
            sum(len([w for w in row["text"].split() if any(c.isalnum() for c in w)]) for row in rows) / 6, abs=1.5
        )
        assert len(covered) == 6
        low, high = found["natural"]["perplexity"][1:]
        assert 1 < low <= found["natural"]["perplexity"][0] <= high


def test_perplexity_under_the_start_model_is_recomputed_by_hand(done):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from steersman.grue.evaluate import answers
    from steersman.grue.task import load_task

    _, values, _ = done
    recipe = GrueRecipe.model_validate(values)
    cell = cells(recipe, [load_task(values["tasks"][0])])[1]
    samples, _ = answers(cell, recipe)
    path = values["model"]["path"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert AutoTokenizer.from_pretrained(path)
    nats, count = 0.0, 0
    for s in samples:
        ids = torch.tensor([s.prompt.ids + s.ids])
        with torch.no_grad():
            logp = model(ids).logits[0, :-1].double().log_softmax(-1)
        own = logp[torch.arange(ids.shape[1] - 1), ids[0, 1:]][len(s.prompt.ids) - 1 :]
        nats, count = nats - float(own.sum()), count + len(own)
    told = evaluation(Path(values["run"]["dir"]), "supervised")["natural"]["perplexity"][0]
    assert told == pytest.approx(torch.tensor(nats / count).exp().item(), rel=1e-4)


def test_pages(done):
    folder, *_ = done
    page = (folder / "grue.md").read_text()
    assert "| supervised+grpo | 1 |" in page
    assert "One seed: no intervals" in page
    assert "| task | supervised − zero-shot | supervised+grpo − supervised |" in page
    assert "rougeL" in (folder / "goodhart.md").read_text()
    html = (folder / "grue.html").read_text()
    assert html.count("<svg") >= 4
    assert "<script" not in html
    assert (folder / "grue.png").stat().st_size > 10_000
    assert "- supervised+grpo (reward" in (folder / "samples" / "colours.md").read_text()


def test_finished_cells_are_not_run_again(done, monkeypatch):
    folder, values, _ = done
    monkeypatch.setattr(grue_run, "fill", lambda cell, recipe: pytest.fail(f"{cell.name} was run again"))
    before = (folder / "grue.md").read_text()
    assert run(GrueRecipe.model_validate(values), resume=True)["finished"]
    assert (folder / "grue.md").read_text() == before


def test_a_finished_matrix_is_not_begun_again_without_resume(done):
    with pytest.raises(SteersmanError, match="holds another run already"):
        run(GrueRecipe.model_validate(done[1]))


def test_a_cell_made_with_other_settings_is_named(done):
    values = {**done[1], "rl": {**done[1]["rl"], "optimizer": {"lr": 0.123}}}
    with pytest.raises(SteersmanError, match=r"supervised\+grpo.*recipe\.optimizer\.lr.*0\.123"):
        run(GrueRecipe.model_validate(values), resume=True)


def test_other_data_are_named(done):
    values = {**done[1], "data": {**done[1]["data"], "held_out": 5}}
    with pytest.raises(SteersmanError, match="holds other rows than the recipe asks for"):
        run(GrueRecipe.model_validate(values), resume=True)


def test_killed_inside_a_cell_and_between_cells_it_ends_alike(done, tmp_path, monkeypatch):
    folder, values, _ = done
    values = {**values, "run": {**values["run"], "dir": str(tmp_path / "again")}}
    recipe = GrueRecipe.model_validate(values)
    steps = session.Session.observe

    def kill_at_two(self, step, stats, texts=(), **more):
        if self.verb == "grpo" and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return steps(self, step, stats, texts, **more)

    monkeypatch.setattr(session.Session, "observe", kill_at_two)
    stopped = run(recipe)
    assert not stopped["finished"]
    assert stopped["cells"] == 2
    assert "Partial: 2 of 3 cells" in (tmp_path / "again" / "grue.md").read_text()
    monkeypatch.setattr(session.Session, "observe", steps)
    filled = []
    fill = grue_run.fill
    monkeypatch.setattr(grue_run, "fill", lambda cell, recipe: filled.append(cell.method) or fill(cell, recipe))
    assert run(recipe, resume=True)["finished"]
    assert filled == ["supervised+grpo"]
    ours, theirs = evaluation(tmp_path / "again", "supervised+grpo"), evaluation(folder, "supervised+grpo")
    assert ours["reward"] == theirs["reward"]
    assert ours["natural"] == theirs["natural"]


def test_a_failed_cell_is_told_and_the_others_go_on(done, tmp_path):
    folder, values, _ = done
    again = tmp_path / "again"
    shutil.copytree(folder / "cells" / "colours" / "supervised", again / "cells" / "colours" / "supervised")
    values = {
        **values,
        "methods": ["zero-shot", "supervised", "supervised+grpo"],
        "run": {**values["run"], "dir": str(again)},
        "rl": {**values["rl"], "optimizer": {"lr": 1e30}},
    }
    for stamp in again.rglob("cell.json"):
        stamp.unlink()
    with pytest.raises(SteersmanError, match=r"1 of 3 cells failed.*supervised\+grpo"):
        run(GrueRecipe.model_validate(values))
    assert "Failed: colours supervised+grpo seed 0" in (again / "grue.md").read_text()


def test_more_seeds_give_intervals(done, tmp_path):
    """Evaluations of three seeds, written by hand, against Student's interval worked out by hand."""
    folder, values, _ = done
    values = {**values, "seeds": [0, 1, 2], "run": {**values["run"], "dir": str(tmp_path)}}
    shutil.copytree(folder / "cells", tmp_path / "cells")
    recipe = GrueRecipe.model_validate(values)
    tasks, _, every = check_matrix(recipe)
    base = evaluation(folder, "supervised")
    rewards = {"supervised": [0.1, 0.2, 0.4], "supervised+grpo": [0.3, 0.41, 0.58]}
    for method, listed in rewards.items():
        for seed, value in enumerate(listed):
            cell = tmp_path / "cells" / "colours" / method / f"seed-{seed}"
            cell.mkdir(parents=True, exist_ok=True)
            result = {**base, "method": method, "seed": seed, "reward": {"total": value}}
            (cell / "evaluation.json").write_text(json.dumps(result))
    results = collect(recipe, tasks, every, {})
    [change] = [c for a, b, c in results.comparisons(tasks[0]) if (a, b) == ("supervised+grpo", "supervised")]
    # differences 0.2, 0.21, 0.18: mean 0.19667, s 0.0152753, t(0.975, 2) = 4.30265
    assert change.value == pytest.approx(0.1966667, abs=1e-6)
    assert change.half == pytest.approx(4.30265 * 0.01527525 / 3**0.5, rel=1e-4)
    assert change.sign == "higher"
    whole = results.mean(tasks[0], "supervised", "reward", "total")
    assert whole is not None
    assert whole.half == pytest.approx(4.30265 * 0.1527525 / 3**0.5, rel=1e-4)


def test_a_difference_over_prompts_is_paired_by_prompt(done, tmp_path):
    """Two seeds, three prompts: what the seeds say of a prompt is averaged, and the interval is over prompts."""
    folder, values, _ = done
    values = {**values, "seeds": [0, 1], "run": {**values["run"], "dir": str(tmp_path)}}
    recipe = GrueRecipe.model_validate(values)
    tasks, _, every = check_matrix(recipe)
    rewards = {
        "supervised": [[0.1, 0.5, 0.9], [0.3, 0.5, 0.7]],
        "supervised+grpo": [[0.2, 0.7, 1.0], [0.6, 0.5, 0.9]],
    }
    for method, listed in rewards.items():
        for seed, answers in enumerate(listed):
            cell = tmp_path / "cells" / "colours" / method / f"seed-{seed}"
            cell.mkdir(parents=True)
            result = {**evaluation(folder, method), "seed": seed, "reward": {"total": sum(answers) / 3}}
            (cell / "evaluation.json").write_text(json.dumps(result))
            (cell / "held_out.jsonl").write_text("".join(json.dumps({"reward": r}) + "\n" for r in answers))
    results = collect(recipe, tasks, every, {})
    change = results.over_prompts(tasks[0], "supervised+grpo", "supervised")
    # per prompt 0.2, 0.1, 0.15: mean 0.15, s 0.05, t(0.975, 2) = 4.30265; per seed 0.13333 and 0.16667
    assert change is not None
    assert (change.value, change.count) == (pytest.approx(0.15), 3)
    assert change.half == pytest.approx(4.30265 * 0.05 / 3**0.5, rel=1e-4)
    assert (
        "supervised+grpo against supervised: +0.15 ± 0.21 (not told apart) [± 0.12, higher]"
        in comparison_sentences(results, tasks[0])
    )
    assert results.over_prompts(tasks[0], "supervised", "zero-shot") is None


def test_one_seed_s_moves_are_seen_only_beyond_the_prompts_noise(done, tmp_path):
    """Moves of 0.1 with intervals of half widths 0.02 and 0 (seen), 0.06 and 0 (not), 0 and 0 (seen)."""
    folder, values, _ = done
    values = {**values, "run": {**values["run"], "dir": str(tmp_path)}}
    shutil.copytree(folder / "cells", tmp_path / "cells")
    recipe = GrueRecipe.model_validate(values)
    tasks, _, every = check_matrix(recipe)
    for method, level, width in (("supervised", 0.5, 1), ("supervised+grpo", 0.4, 0)):
        path = tmp_path / "cells" / "colours" / method / "seed-0" / "evaluation.json"
        found = json.loads(path.read_text())
        for name, half in (("distinct1", 0.02 * width), ("distinct2", 0.06 * width), ("empty", 0.0)):
            found["natural"][name] = [level, level - half, level + half]
        path.write_text(json.dumps(found))
    moves = {m.metric: m for m in collect(recipe, tasks, every, {}).moves(tasks[0], "supervised+grpo")}
    assert [moves[n].significant for n in ("distinct1", "distinct2", "empty")] == [True, False, True]
    # fewer distinct words go against the metric's direction, fewer empty answers do not
    assert [moves[n].harm for n in ("distinct1", "distinct2", "empty")] == [True, False, False]


def test_an_encoder_decoder_with_fresh_weights(tmp_path):
    values = settings(tmp_path, methods=["supervised", "supervised+grpo"])
    values["model"]["scratch"] = {
        "model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
    }  # fmt: skip
    assert run(GrueRecipe.model_validate(values))["finished"]
    found = evaluation(tmp_path / "matrix", "supervised+grpo")
    assert found["natural"]["perplexity"][0] > 1
    named = {entry["model"] for entry in read(tmp_path / "matrix" / "leaderboard.json")}
    assert named == {f"t5 of fresh weights, tokenizer {values['model']['path']}"}
    assert "- supervised+grpo: reward" in (tmp_path / "matrix" / "goodhart.md").read_text()


def test_statistics_of_nothing_and_of_one():
    assert mean([]) is None
    one = mean([2.0])
    assert one is not None
    assert (one.value, one.half, one.sign) == (2.0, None, "one seed")
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_others_add_to_the_leaderboard(done, tmp_path):
    path = tmp_path / "leaderboard.json"
    shutil.copy(done[0] / "leaderboard.json", path)
    ours = read(path)
    theirs = {**ours[0], "by": "someone", "metrics": {"rougeL": {"mean": 0.5}}}
    assert len(add(path, [theirs])) == len(ours) + 1
    again = add(path, [{**theirs, "metrics": {"rougeL": {"mean": 0.6}}}])
    assert [e["metrics"]["rougeL"]["mean"] for e in again if e["by"] == "someone"] == [0.6]
    path.write_text('{"format": 1, "entries": [{"by": "x"}]}')
    with pytest.raises(SteersmanError, match="entry 0: it has no task"):
        read(path)
    path.write_text("{")
    with pytest.raises(SteersmanError, match="not whole JSON"):
        add(path, ours)
    assert path.read_text() == "{"


def test_supervised_training_is_looked_at_less_often(tmp_path):
    every = check_matrix(GrueRecipe.model_validate(settings(tmp_path, supervised={"eval_every": 7})))[2]
    looks = {cell.method: cell.recipe.run.eval_every for cell in every if cell.recipe is not None}
    assert looks == {"supervised": 7, "supervised+grpo": 1}


def test_time_left_is_judged_by_the_same_method(done):
    recipe = GrueRecipe.model_validate({**done[1], "seeds": [0, 1]})
    _, _, every = check_matrix(recipe)
    clock = grue_run.Clock(every)
    seconds = [evaluation(done[0], m)["cell_seconds"] for m in ("zero-shot", "supervised", "supervised+grpo")]
    assert clock.left() == pytest.approx(sum(seconds))
    assert clock.line(every[3]).startswith("cell 4 of 6: colours zero-shot seed 1, about ")


def test_the_recipe_that_ships_loads():
    root = Path(__file__).parents[2]
    for name in ("grue.yaml", "results/grue-small.yaml", "results/grue-small-t5.yaml"):
        assert load_recipe(GrueRecipe, root / "recipes" / name, ["--data.folder", "sets"]).tasks


@pytest.mark.slow
def test_the_cells_train_on_ranks_and_are_the_same(done, tmp_path):
    one, values = done[0], settings(tmp_path)
    values["run"]["devices"] = 2
    assert run(GrueRecipe.model_validate(values))["finished"]
    for name in ("supervised", "supervised+grpo"):
        weights, wanted = (
            load_file(folder / "cells" / "colours" / name / "seed-0" / "model" / "model.safetensors")
            for folder in (tmp_path / "matrix", one)
        )
        assert all((weights[key] - value).abs().max() < 1e-4 for key, value in wanted.items())


def test_ranks_are_started_by_grue_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SteersmanError, match="without a launcher"):
        run(GrueRecipe.model_validate(settings(tmp_path)))
