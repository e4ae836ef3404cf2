"""`train.keep: best` saves the weights that were best on held-out data, those that training began with among them."""

from __future__ import annotations

import pytest
import torch
from letter_models import WORDS, write_jsonl
from train_kit import merge, plain, rows, weights

from steersman.objectives.reward_pairs import PairwiseReward
from steersman.objectives.supervised import SFT
from steersman.train.offline import Offline
from steersman.verbs import feedback, reward_model, sft
from steersman.verbs.preference import PreferenceRecipe

PAIRS = [
    {"prompt": "which" + "?" * (i % 4), "chosen": f"yes {WORDS[i % 10]}", "rejected": WORDS[i % 10]}
    for i in range(12)
]
TOLD = [{"prompt": "who" + "?" * (i % 4), "completion": WORDS[i % 10]} for i in range(12)]


@pytest.fixture
def asked(tmp_path, mini):
    """Settings of three steps with a look after each, which leave no checkpoint but the last and the best."""
    return {
        "model": {"path": str(mini)},
        "data": {"path": str(write_jsonl(tmp_path / "rows.jsonl", TOLD)), "held_out": 4},
        "train": {"batch_size": 4, "max_steps": 3, "epochs": 9},
        "optimizer": {"lr": 0.02},
        "run": {"dir": str(tmp_path / "run"), "threads": 1, "eval_every": 1, "keep_last": 1},
    }


def looks(monkeypatch, objective, name: str, *values: float) -> None:
    """Lets the looks find these values, one after the other, and the summary what they found last."""
    left = list(values)
    monkeypatch.setattr(objective, "evaluate", lambda self: {name: left.pop(0) if len(left) > 1 else left[0]})


def kept(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())


def same(a, b) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_where_no_look_is_better_the_start_is_saved_and_that_is_said(asked, tmp_path, mini, monkeypatch, capsys):
    looks(monkeypatch, SFT, "held_out/loss", 1.0, 1.5, 1.2, 1.4)
    out = sft.run(sft.SFTRecipe.model_validate(merge(asked, {"train.keep": "best"})))
    assert kept(tmp_path) == ["step-00000000", "step-00000003"]
    assert same(weights(tmp_path / "run" / "model"), weights(mini))
    assert out["steps"] == 3
    assert "weights that training began with: no later look was better" in " ".join(capsys.readouterr().out.split())


def test_of_dynamic_fine_tuning_the_best_weights_are_those_of_the_highest_probability(asked, tmp_path, monkeypatch):
    """Its loss in nats may rise while it sharpens."""
    left = [(1.0, 0.3), (1.1, 0.5), (1.2, 0.7), (0.9, 0.4)]
    monkeypatch.setattr(SFT, "evaluate", lambda self: dict(
        zip(("held_out/loss", "held_out/probability"), left.pop(0) if len(left) > 1 else left[0], strict=True)
    ))  # fmt: skip
    sft.run(sft.SFTRecipe.model_validate(merge(asked, {"train.keep": "best", "train.loss": "dft"})))
    assert kept(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_start_that_is_surpassed_goes(asked, tmp_path, mini, monkeypatch, capsys):
    looks(monkeypatch, SFT, "held_out/loss", 1.0, 1.5, 0.9, 1.4)
    sft.run(sft.SFTRecipe.model_validate(merge(asked, {"train.keep": "best"})))
    assert kept(tmp_path) == ["step-00000002", "step-00000003"]
    assert not same(weights(tmp_path / "run" / "model"), weights(mini))
    assert "the weights of step 2, the best by held_out/loss" in " ".join(capsys.readouterr().out.split())


def test_a_start_that_is_in_no_checkpoint_is_no_rival(asked, tmp_path, monkeypatch):
    looks(monkeypatch, SFT, "held_out/loss", 1.0, 1.5, 1.2, 1.4)
    sft.run(sft.SFTRecipe.model_validate(asked))
    assert kept(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_new_head_of_zeros_is_not_the_best_reward_model(asked, tmp_path, monkeypatch, capsys):
    looks(monkeypatch, PairwiseReward, "held_out/accuracy", 0.5, 0.2, 0.4, 0.3)
    monkeypatch.setattr(PairwiseReward, "report", lambda self, config: None)
    settings = merge(asked, {"data.path": str(write_jsonl(tmp_path / "pairs.jsonl", PAIRS))})
    reward_model.run(reward_model.RewardModelRecipe.model_validate(settings))
    assert kept(tmp_path) == ["step-00000002", "step-00000003"]
    assert weights(tmp_path / "run" / "model")["score.weight"].any()
    looks(monkeypatch, PairwiseReward, "held_out/accuracy", 0.5, 0.2, 0.4, 0.3)
    again = merge(settings, {"model.path": str(tmp_path / "run" / "model"), "run.dir": str(tmp_path / "again")})
    reward_model.run(reward_model.RewardModelRecipe.model_validate(again))
    assert same(weights(tmp_path / "again" / "model"), weights(tmp_path / "run" / "model"))


def test_without_held_out_data_nothing_is_ranked_and_that_is_said(asked, tmp_path, capsys):
    sft.run(sft.SFTRecipe.model_validate(merge(asked, {"train.keep": "best", "data.held_out": 0})))
    assert kept(tmp_path) == ["step-00000003"]
    assert "held_out/loss was never measured" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_was_killed_before_its_first_step_ends_alike(asked, tmp_path, monkeypatch):
    settings = merge(asked, {"train.keep": "best"})
    sft.run(sft.SFTRecipe.model_validate(settings))
    cut = sft.SFTRecipe.model_validate(merge(settings, {"run.dir": str(tmp_path / "cut")}))
    with monkeypatch.context() as patch:

        def killed(self, rows):
            raise KeyboardInterrupt

        patch.setattr(Offline, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            sft.run(cut)
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000000"]
    sft.run(cut, resume=True)
    assert [plain(r) for r in rows(tmp_path / "run")] == [plain(r) for r in rows(tmp_path / "cut")]
    assert same(weights(tmp_path / "run" / "model"), weights(tmp_path / "cut" / "model"))


def test_a_resumed_run_knows_what_its_best_checkpoint_had(asked, tmp_path, monkeypatch):
    """Cut after its second step, it does not take the third, which is worse, for the best."""
    looks(monkeypatch, SFT, "held_out/loss", 1.0, 0.5, 0.7, 0.6)
    recipe = sft.SFTRecipe.model_validate(merge(asked, {"train.keep": "best", "run.save_every": 1}))
    real, left = Offline.step, [2]

    def killed(self, rows):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Offline, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            sft.run(recipe)
    sft.run(recipe, resume=True)
    assert kept(tmp_path) == ["step-00000001", "step-00000003"]


def test_the_summary_s_numbers_are_those_of_the_best_look(asked, tmp_path):
    """BCO's threshold is learned too: the held-out loss of the best weights needs the threshold of their step."""
    told = [
        {
            "prompt": f"a{'bcdefghijklm'[i % 12]}",
            "completion": ("yes", "no", "a cat", "ok")[i % 4],
            "label": i % 4 < 2,
        }
        for i in range(24)
    ]
    file, longer = write_jsonl(tmp_path / "thumbs.jsonl", told), {"train.max_steps": 60, "train.epochs": 20}
    own = {"data.path": str(file), "data.held_out": 8, "samples.prompts": 0, "loss.beta": 0.5, **longer}
    settings = merge(asked, {"train.keep": "best", **own})
    out = feedback.run(feedback.RECIPES["bco"].model_validate(settings))
    seen = [row for row in rows(tmp_path / "run") if "held_out/auc" in row]
    best = max(seen, key=lambda row: (row["held_out/auc"], -row["step"]))
    assert best is not seen[-1]
    for name in ("held_out/auc", "held_out/loss", "held_out/accuracy"):
        assert out[name] == pytest.approx(best[name], rel=1e-5), name


def test_the_best_weights_need_a_checkpoint_that_is_kept(asked):
    recipes = (sft.SFTRecipe, PreferenceRecipe, feedback.RECIPES["kto"], reward_model.RewardModelRecipe)
    for recipe in recipes:
        with pytest.raises(ValueError, match=r"train\.keep is best.*run\.keep_best 0 keeps none"):
            recipe.model_validate(merge(asked, {"train.keep": "best", "run.keep_best": 0}))
        recipe.model_validate(merge(asked, {"train.keep": "last", "run.keep_best": 0}))
    reward_model.RewardModelRecipe.model_validate(merge(asked, {"stage": "evaluate", "run.keep_best": 0}))
