"""Loops that keep their judge up to date, and that end when a watched reward finds no better round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from letter_models import rows_of, write_jsonl
from wheel_kit import left, loop_settings

from steersman.flywheel import best_of_n
from steersman.verbs import reward_model

QUICK = {"train": {"batch_size": 4}, "optimizer": {"lr": 1e-2}}


@pytest.fixture(scope="module")
def judge(tmp_path_factory, mini_model):
    """A reward model of a few pairs, and the file of these."""
    folder = tmp_path_factory.mktemp("judge")
    pairs = [{"prompt": "x" * (1 + i % 4), "chosen": "a a", "rejected": "e" * (1 + i % 3)} for i in range(12)]
    file = write_jsonl(folder / "pairs.jsonl", pairs)
    values = {
        "model": {"path": str(mini_model)}, "data": {"path": str(file)}, "train": {"batch_size": 6, "keep": "last"},
        "optimizer": {"lr": 0.01}, "run": {"dir": str(folder / "rm"), "threads": 1, "eval_every": 99},
    }  # fmt: skip
    return reward_model.run(reward_model.RewardModelRecipe.model_validate(values))["model"], file


def turn(tmp_path, model, folder="run", *, resume=False, **extra):
    settings = loop_settings(tmp_path, model, folder, **QUICK, **extra)
    return best_of_n.run(best_of_n.BestOfNRecipe.model_validate(settings), resume=resume)


def refreshing(tmp_path, judge):
    model, pairs = judge
    return {
        "judge": {"reward": {"rm": {"model": model}}},
        "watch": {"gold": {"function": f"{tmp_path / 'rewards.py'}:count_a"}},
        "refresh": {"by": "gold", "first": [str(pairs)], "train": {"batch_size": 4, "keep": "last"}},
    }


def test_the_judge_learns_from_what_the_watched_reward_says_of_the_newest_answers(tmp_path, mini_model, judge):
    turn(tmp_path, mini_model, **refreshing(tmp_path, judge))
    run = tmp_path / "run"
    pairs = rows_of(run / "round-01/refresh/pairs.jsonl")
    assert pairs
    score = lambda text: text.count("a") - text.count("e")  # noqa: E731
    assert all(score(p["chosen"]) > score(p["rejected"]) for p in pairs)
    used = [json.loads((run / f"round-0{r}/graded.provenance.json").read_text())["judge"] for r in (1, 2)]
    models = [u["reward"]["rm"]["model"] for u in used]
    assert models[0] == judge[0]
    assert Path(models[1]) == run / "round-01/refresh/train/model"
    assert not (run / "round-02/refresh").exists(), "nobody asks the judge after the last round"


def test_a_run_that_was_killed_while_its_judge_learned_ends_as_if_it_had_not_been(
    tmp_path, mini_model, judge, monkeypatch
):
    settings = refreshing(tmp_path, judge)
    turn(tmp_path, mini_model, **settings)
    real, done = reward_model.run, []

    def killed(recipe, **how):
        done.append(1)
        if len(done) == 1:
            raise KeyboardInterrupt
        return real(recipe, **how)

    with monkeypatch.context() as patch:
        patch.setattr("steersman.flywheel.refresh.reward_model.run", killed)
        with pytest.raises(KeyboardInterrupt):
            turn(tmp_path, mini_model, "cut", **settings)
    turn(tmp_path, mini_model, "cut", resume=True, **settings)
    whole, again = left(tmp_path / "run"), left(tmp_path / "cut")
    assert whole.keys() == again.keys()
    weights = [name for name in whole if name.endswith(".safetensors")]
    assert len(weights) == 3  # a judge and two rounds
    assert all(whole[name] == again[name] for name in weights)
    assert whole["metrics.jsonl"] == again["metrics.jsonl"]


def test_a_loop_ends_when_the_watched_reward_finds_no_better_round(tmp_path, mini_model):
    falls = "SEEN = []\n\ndef falls(prompts, completions):\n    SEEN.append(1)\n"
    falls += "    return [-len(SEEN)] * len(completions)\n"
    (tmp_path / "watch.py").write_text(falls)
    settings = {"watch": {"other": {"function": f"{tmp_path / 'watch.py'}:falls"}}, "rounds": 4}
    summary = turn(tmp_path, mini_model, stop={"judge": "other", "patience": 2}, **settings)
    assert summary["finished"]
    assert summary["rounds"] == 2
    assert summary["model"] == str(mini_model), "no round was better than the start"
    assert summary["kl_after"] == pytest.approx(0, abs=1e-5)


def test_what_can_not_be_read_is_refused(tmp_path, mini_model, judge):
    settings = refreshing(tmp_path, judge)
    with pytest.raises(ValueError, match=r"refresh.by is 'me', which nothing under `watch` is called"):
        turn(tmp_path, mini_model, **{**settings, "refresh": {"by": "me"}})
    with pytest.raises(ValueError, match="0 reward models, and exactly one can be trained again"):
        turn(tmp_path, mini_model, **{**settings, "judge": {"reward": {"x": {"builtin": "length"}}}})
    with pytest.raises(ValueError, match=r"stop.judge is 'me', which nothing under `watch` is called"):
        turn(tmp_path, mini_model, **{**settings, "stop": {"judge": "me"}})
