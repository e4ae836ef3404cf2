"""XPO (arXiv 2405.21046): its loss beside the paper's formula, what pairs it is given, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from letter_models import save_mini, write_jsonl
from train_kit import merge

from steersman.data import DataConfig
from steersman.data.load import load
from steersman.flywheel.online_dpo import OnlineDPORecipe
from steersman.flywheel.online_dpo import run as run_online
from steersman.flywheel.players import usable
from steersman.loss.preference import PairLogp, dpo, reference_answer
from steersman.types import SteersmanError
from steersman.verbs import preference
from steersman.verbs.preference import PreferenceRecipe


def test_the_loss_and_its_gradient_are_algorithm_1_s():
    """alpha sum log pi(y~ | x) - sum log sigma(beta log pi(w)/pi_ref(w) - beta log pi(l)/pi_ref(l)), line 6, of pairs
    (y, y~) with y~ from the reference, which the judge put first in the first two; as a mean."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: -3 * torch.rand(4, generator=generator, dtype=torch.float64)  # noqa: E731
    own, theirs, ref_own, ref_theirs = draw().requires_grad_(), draw().requires_grad_(), draw(), draw()
    theirs_wins = torch.tensor([True, True, False, False])
    alpha, beta, length = 0.02, 0.3, torch.ones(4, dtype=torch.float64)

    def put(if_theirs, if_own):
        return torch.where(theirs_wins, if_theirs, if_own)

    pair = PairLogp(put(theirs, own), put(own, theirs), length, length, put(ref_theirs, ref_own),
                    put(ref_own, ref_theirs))  # fmt: skip
    bonus = reference_answer(pair, theirs_wins.double(), (~theirs_wins).double())
    found = (dpo(pair, beta=beta)[0] + alpha * bonus).mean()

    lead = beta * ((theirs - ref_theirs) - (own - ref_own))
    sign = theirs_wins.double() * 2 - 1
    wanted = (alpha * theirs + torch.log1p(torch.exp(-sign * lead))).mean()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    for got, want in zip(*(torch.autograd.grad(x, [own, theirs]) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


ROWS = [
    {"prompt": "no", "chosen": " yes", "rejected": " so", "chosen_from_reference": True},
    {"prompt": "we", "chosen": " go up", "rejected": " a", "chosen_from_reference": False},
    {"prompt": "it is", "chosen": " far", "rejected": " by", "chosen_from_reference": None},
]


@pytest.fixture
def pairs(tmp_path):
    return {
        "model": {"path": str(save_mini(tmp_path / "m")), "dtype": "float64"},
        "data": {"path": str(write_jsonl(tmp_path / "pairs.jsonl", ROWS))},
        "train": {"batch_size": 3, "epochs": 1},
        "optimizer": {"lr": 1e-3, "kind": "adamw"},
        "run": {"dir": str(tmp_path / "run"), "threads": 1},
    }


def first_loss(values, folder):
    preference.run(PreferenceRecipe.model_validate(merge(values, {"run.dir": str(folder)})))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return next(row["loss"] for row in rows if "loss" in row)


@pytest.mark.parametrize("size", [10_000, 12])
@pytest.mark.parametrize("stored", [False, True])
def test_dpo_adds_the_bonus_of_the_named_answers_alone(pairs, tmp_path, size, stored):
    """The policy is the reference at first, so DPO's loss is log 2, and the rest is the bonus, by hand."""
    from steersman.model import load_policy
    from steersman.types import Tokens

    policy = load_policy(pairs["model"]["path"], dtype="float64")
    ids = policy.tokenizer
    said = [("no", " yes"), ("we", " a")]
    tokens = Tokens.from_ids([ids(p).input_ids for p, _ in said], [[*ids(a).input_ids, 2] for _, a in said])
    total = float(torch.where(tokens.mask, policy.logp(tokens).logp, 0.0).sum())
    kept = {"data.cache": str(tmp_path / "cache")} if stored else {}
    values = merge(pairs, {"run.micro_tokens": size, "loss.explore": 0.5, **kept})
    found = first_loss(values, tmp_path / "xpo")
    assert found == pytest.approx(0.5 * total / 3 + torch.log(torch.tensor(2.0)).item(), rel=1e-6)


def test_the_column_is_read_and_refused_by_row(tmp_path, pairs):
    loaded = load(DataConfig(path=pairs["data"]["path"]), "preference").train
    assert [e.chosen_from_reference for e in loaded] == [True, False, None]
    bad = write_jsonl(tmp_path / "bad.jsonl", [{**ROWS[0], "chosen_from_reference": "maybe"}])
    with pytest.raises(SteersmanError, match="chosen_from_reference"):
        load(DataConfig(path=str(bad)), "preference")


def test_a_bonus_without_such_answers_is_refused(pairs, tmp_path):
    plain = [{k: v for k, v in row.items() if k != "chosen_from_reference"} for row in ROWS]
    values = merge(pairs, {"data.path": str(write_jsonl(tmp_path / "plain.jsonl", plain)), "loss.explore": 0.1})
    with pytest.raises(SteersmanError, match="no pair says which answer is the reference's"):
        preference.run(PreferenceRecipe.model_validate(values))


def online(tmp_path, **extra):
    words = [{"prompt": w} for w in ("the cat", "a dog", "we", "no", "it is", "oh", "up", "far")]
    values = {
        "model": {"path": str(save_mini(tmp_path / "m"))},
        "data": {"path": str(write_jsonl(tmp_path / "words.jsonl", words))},
        "judge": {"reward": {"a": {"function": f"{rewards(tmp_path)}:count_a"}}},
        "rollout": {"prompts": 4, "samples": 2, "max_new_tokens": 6, "held_out": 2},
        "pairs": {"against": "start"}, "rounds": 3, "unfinished": "keep", "explore": [0.02, 0.01],
        "run": {"dir": str(tmp_path / "run"), "threads": 1},
    }  # fmt: skip
    return merge(values, extra)


def rewards(tmp_path):
    from train_kit import rewards_file

    return rewards_file(tmp_path)


@pytest.mark.parametrize("by", ["grade", "compare"])
def test_each_answer_meets_one_of_the_first_model(tmp_path, by):
    told = run_online(OnlineDPORecipe.model_validate(online(tmp_path, **{"pairs.by": by})))
    assert told["rounds"] == 3
    folder = tmp_path / "run"
    for number, alpha in ((1, 0.02), (2, 0.01), (3, 0.01)):
        at = folder / f"round-{number:02d}"
        read = lambda name, at=at: [json.loads(line) for line in (at / f"{name}.jsonl").open()]  # noqa: E731
        duels, pairs = read("duels"), read("pairs")
        sides = {side: {(r["index"], r["duel"]): r["completion"] for r in duels if r["from_start"] is side}
                 for side in (True, False)}  # fmt: skip
        assert sides[True].keys() == sides[False].keys()
        if number == 1:  # the policy is the first model, and meets itself with other draws
            assert sides[True] != sides[False]
        for pair in pairs:
            theirs, own = ("chosen", "rejected") if pair["chosen_from_reference"] else ("rejected", "chosen")
            places = [k for k, text in sides[True].items() if k[0] == pair["index"] and text == pair[theirs]]
            assert any(sides[False][k] == pair[own] for k in places)
        recipe = (at / "dpo" / "config.yaml").read_text()
        assert f"explore: {alpha}" in recipe


def test_only_answers_of_one_duel_repeat_each_other():
    row = {"index": 0, "finish": "stop", "tokens": 1}
    rows = [{**row, "completion": text, "duel": k} for k, text in ((0, "a"), (0, "a"), (1, "a"), (1, "b"))]
    kept, left = usable(rows, "drop")
    assert [(r["duel"], r["completion"]) for r in kept] == [(0, "a"), (1, "a"), (1, "b")]
    assert left["repeated"] == 1


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"pairs.against": "own"}, "set pairs.against: start"),
        ({"explore": []}, "a number of at least 0"),
        ({"explore": -0.1}, "a number of at least 0"),
        ({"loss.explore": 0.1}, "loss.explore: a loop has `explore`"),
        ({"pairs.form": "all"}, "each answer is in one pair"),
        ({"pairs.by": "given"}, "each answer is paired with the data's own"),
    ],
)
def test_what_nothing_reads_is_refused(tmp_path, extra, said):
    with pytest.raises(ValueError, match=said):
        OnlineDPORecipe.model_validate(online(tmp_path, **extra))
    OnlineDPORecipe.model_validate(online(tmp_path, **{"rollout.samples": 1}))
