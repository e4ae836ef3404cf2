"""Reward models beyond a plain Bradley-Terry score: preferences in a circle, and scores freed of length and style."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from letter_models import write_jsonl
from reward_kit import settings, word
from test_reward_kinds import compare, interrupted, run
from train_kit import merge, recipe

from steersman.judge.config import JudgeConfig
from steersman.judge.judge import Judge
from steersman.model import GeneralPreferenceModel, load_reward, load_scalar
from steersman.reward import ModelReward, RewardPart
from steersman.types import Prompt, Sample, SteersmanError, Tokens

CIRCLE = ("rock", "scissors", "paper")
"""Each beats the next one."""
VOTES = [1] * 9 + [0]


def circle(folder, mini):
    """Pairs in which each of three answers beats the next in 9 of 10."""
    rows = [
        {
            "prompt": f"which{'?' * (i % 3)}",
            "chosen": CIRCLE[a],
            "rejected": CIRCLE[(a + 1) % 3],
            "votes": [1] * 9 + [0],
        }
        for i in range(12)
        for a in range(3)
    ]
    held = write_jsonl(folder / "held.jsonl", [{**row, "prompt": "which!"} for row in rows[:3]])
    return {
        "model": {"path": str(mini)},
        "data": {
            "path": str(write_jsonl(folder / "circle.jsonl", rows)),
            "held_out_files": [str(held)],
        },
        "train": {"batch_size": 12, "epochs": 30, "planes": 3},
        "optimizer": {"lr": 0.01},
        "evaluation": {"draws": 100},
        "run": {"dir": str(folder / "general"), "threads": 1, "eval_every": 100, "save_every": 100},
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, mini):
    folder = tmp_path_factory.mktemp("circle")
    return run(circle(folder, mini)), folder


def samples(model, texts, index=0):
    asked = Prompt(model.tokenizer("which").input_ids, "which", index=index)
    return [Sample(asked, model.tokenizer(t).input_ids, [0.0] * len(t), "eos", t) for t in texts]


def test_it_learns_a_circle_that_no_score_can(trained, mini):
    summary, folder = trained
    assert summary["held_out/accuracy"] == 1
    asked = merge(circle(folder, mini), {"train.planes": 0, "run.dir": str(folder / "bradley")})
    assert run(asked)["held_out/accuracy"] < 0.7
    assert summary["held_out/loss"] < np.log(2) - 0.05


def test_either_order_says_the_same_and_the_reward_is_against_the_others(trained):
    model = load_reward(trained[0]["model"])
    assert isinstance(model, GeneralPreferenceModel)
    asked = samples(model, CIRCLE)
    out = model.outputs(Tokens.from_ids([s.prompt.ids for s in asked], [s.ids for s in asked]))
    turn = torch.block_diag(*[torch.tensor([[0.0, -1.0], [1.0, 0.0]])] * 3)
    table = torch.stack(
        [torch.stack([(turn @ a) @ b for b in out]) for a in out]
    )  # <R v_a, v_b>, as the paper has it
    lead = torch.stack([torch.stack([model.leads(a, b) for b in out]) for a in out])
    torch.testing.assert_close(lead, table)
    torch.testing.assert_close(lead, -lead.T)
    reward = ModelReward(model, model.tokenizer)
    torch.testing.assert_close(reward.score(asked).total, lead.sum(1) / 2)
    alone = samples(model, CIRCLE[:1], index=5)
    assert reward.score([*asked, *alone]).total[3] == 0
    with pytest.raises(SteersmanError, match="scores none alone"):
        model.score(Tokens.from_ids([[3]], [[4]]))


def test_a_judge_of_it_compares_pair_by_pair(trained):
    judge = Judge(JudgeConfig(reward={"p": RewardPart(model=trained[0]["model"])}))
    asked = [("which", CIRCLE[a], CIRCLE[b]) for a in range(3) for b in range(3)]
    shares = [found.share for found in judge.compare(asked) if found is not None]
    assert shares == [0.5, 1, 0, 0, 0.5, 1, 1, 0, 0.5]


def test_it_resumes_bit_for_bit_and_is_a_reward_of_the_loop(tmp_path, mini, base, monkeypatch):
    asked = merge(settings(tmp_path, mini, "preference"), {"train.planes": 2})
    summary = run(asked)
    interrupted(merge(asked, {"run.dir": str(tmp_path / "cut")}), monkeypatch, 2)
    compare(tmp_path / "run", tmp_path / "cut")
    from steersman.verbs import rl

    part = {"parts": {"p": {"model": summary["model"]}}}
    values = merge(base, {"reward": part, "run.dir": str(tmp_path / "ppo"), "iterations": 1})
    assert rl.run(recipe("ppo", values))["finished"]


def longer_wins(folder, mini, **train):
    """Pairs whose chosen answer is the longer one in most, though people went by the letter a."""
    rows = []
    for i in range(60):
        good, bad = word(i)[:12] + " a" * (1 + i % 2), "e " * (1 + i % 3)
        rows.append(
            {"prompt": "which" + "?" * (i % 6), "chosen": good, "rejected": bad + " e" * (3 if i % 5 == 0 else 0)}
        )
    asked = merge(settings(folder, mini, "preference"), {"train": {"batch_size": 10, "epochs": 4, **train}})
    return merge(asked, {"data.path": str(write_jsonl(folder / "longer.jsonl", rows)), "data.held_out": 12})


def test_what_is_left_after_debiasing_does_not_go_with_length(tmp_path, mini):
    plain = run(longer_wins(tmp_path, mini))
    free = run(merge(longer_wins(tmp_path, mini, debias=["length", "bold"]), {"run.dir": str(tmp_path / "free")}))
    assert free["debiased/bold"] == 0  # never differs
    before, after = load_scalar(plain["model"]), load_scalar(free["model"])
    assert after.meaning.debiased == {k.split("/")[1]: v for k, v in free.items() if k.startswith("debiased/")}
    texts = ["a", "a **b** c d e", "e e e"]
    tokens = Tokens.from_ids([[3]] * 3, [before.tokenizer(t).input_ids for t in texts])
    words = torch.tensor([1.0, 5.0, 3.0])
    torch.testing.assert_close(before.style(tokens)[:, 0].float(), words)
    torch.testing.assert_close(after.score(tokens), before.score(tokens) - free["debiased/length"] * words)


def test_the_leads_of_the_training_pairs_are_uncorrelated_with_the_features(tmp_path, mini, monkeypatch):
    from steersman.objectives.reward_pairs import PairwiseReward

    kept = []
    real = PairwiseReward.debias
    monkeypatch.setattr(PairwiseReward, "debias", lambda self: (kept.append(self), real(self))[1])
    run(longer_wins(tmp_path, mini, debias=["length"]))
    made = kept[0]
    score = made._scores(made.train)
    style = torch.stack([made.module.style(_tokens(group)) for group in made.train.groups])[..., 0]
    lead, gap = score[:, 0] - score[:, 1], (style[:, 0] - style[:, 1]).float()
    both = np.corrcoef(torch.cat([lead, -lead]), torch.cat([gap, -gap]))[0, 1]
    assert abs(both) < 1e-4
    assert float(gap.abs().max()) > 0


def _tokens(group):
    return Tokens.from_ids([e.prompt for e in group], [e.response for e in group])


def test_what_does_not_go_together_is_refused(tmp_path, mini):
    with pytest.raises(ValueError, match=r"train.bottleneck and train.planes are different kinds"):
        run(merge(settings(tmp_path, mini, "preference"), {"train.planes": 1, "train.bottleneck": 1}))
    with pytest.raises(ValueError, match=r"train.debias is for a reward model of one number"):
        run(merge(settings(tmp_path, mini, "preference"), {"train.planes": 1, "train.debias": ["length"]}))
