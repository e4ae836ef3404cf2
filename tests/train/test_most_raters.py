"""Pairs of which most raters preferred the second answer, or on which they are evenly split: naming a pair the other
way round, with 1 less its agreement, changes nothing of what is learned or told."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from letter_models import WORDS, save_mini, write_jsonl
from tiny_models import tiny_model
from train_kit import rows as logged

from steersman.data import Encoded, EncodedSet, Preference
from steersman.data.rows import Row
from steersman.model import (
    BottleneckModel,
    EnsembleModel,
    GeneralPreferenceModel,
    Policy,
    load_reward,
    load_scalar,
)
from steersman.objectives.preference import PairObjective
from steersman.objectives.preference_config import PairLossConfig
from steersman.objectives.reward_bottleneck import BottleneckReward
from steersman.objectives.reward_config import RewardModelConfig
from steersman.objectives.reward_ensemble import EnsembleReward
from steersman.objectives.reward_general import GeneralPreferenceReward
from steersman.objectives.reward_pairs import PairwiseReward
from steersman.train.tally import Tally
from steersman.verbs.preference import PreferenceRecipe, run

AGREEMENT = (0.8, 0.0, 0.25, 0.5, 1.0)
ALL = list(range(len(AGREEMENT)))


def given(vocab: int = 97) -> EncodedSet[Preference]:
    random = torch.Generator().manual_seed(4)
    data: EncodedSet[Preference] = EncodedSet()
    for i, share in enumerate(AGREEMENT):
        prompt, *answers = (torch.randint(3, vocab, (n,), generator=random).tolist() for n in (2 + i, 3 + i, 7 - i))
        data.groups.append([Encoded(prompt, ids, [True] * len(ids)) for ids in answers])
        data.examples.append(
            Preference("x", "a", "b", Row({}, "f", i), agreement=share, weight=1.0 + i, margin=0.3 * i)
        )
    return data


def by_raters(data: EncodedSet[Preference], *, signed_margin: bool) -> EncodedSet[Preference]:
    """The same judgements with the answer in front that most raters preferred. A margin is the first answer's lead
    (`signed_margin`) or the better one's."""
    out: EncodedSet[Preference] = EncodedSet()
    for group, e in zip(data.groups, data.examples, strict=True):
        turned = e.agreement < 0.5
        out.groups.append(group[::-1] if turned else group)
        margin = -e.margin if turned and signed_margin else e.margin
        out.examples.append(replace(e, agreement=max(e.agreement, 1 - e.agreement), margin=margin))
    return out


def same(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def policy_objective(config: PairLossConfig, data: EncodedSet[Preference]) -> PairObjective:
    policy, reference = (Policy(tiny_model("llama", seed=s, scale=2.0).double(), None) for s in (1, 2))
    made = PairObjective(policy, reference.requires_grad_(False), data, data, config, 10_000)
    made.read_reference(ALL)
    return made


@pytest.mark.parametrize("soft_labels", [True, False])
@pytest.mark.parametrize("name", ["dpo", "dpop", "tdpo1", "simpo", "orpo", "aot"])
def test_a_pair_loss_and_what_it_tells_go_by_most_raters(name, soft_labels):
    margin = 0.5 if name in ("dpo", "simpo") else 0.0
    config = PairLossConfig(name=name, soft_labels=soft_labels, nll=0.1, margin_weight=margin)
    found = []
    for data in (given(), by_raters(given(), signed_margin=True)):
        made, tally = policy_objective(config, data), Tally()
        made.look(ALL)
        loss = made.loss(ALL, made.denominator(ALL), tally)
        gradient = torch.autograd.grad(loss, list(made.module.parameters()), allow_unused=True)
        found.append((gradient, tally.means(), made.evaluate()))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-12)
    same(found[0][1], found[1][1])
    same(found[0][2], found[1][2])


def test_without_soft_labels_the_majority_has_the_whole_pair():
    """Against the same pairs with a single rater each; an evenly split one counts half each way."""
    losses = []
    for agreement in (AGREEMENT, [(1.0 if a > 0.5 else 0.0 if a < 0.5 else 0.5) for a in AGREEMENT]):
        data = given()
        for example, share in zip(data.examples, agreement, strict=True):
            example.agreement = share
        config = PairLossConfig(soft_labels=agreement is not AGREEMENT)
        losses.append(float(policy_objective(config, data).loss(ALL, 1.0, Tally()).detach()))
    assert losses[0] == losses[1]


@torch.no_grad()
def test_accuracy_and_margin_are_of_decided_pairs():
    """From plain forward passes: beta ((log pi - log pi_ref)(preferred) - (log pi - log pi_ref)(other))."""
    made = policy_objective(PairLossConfig(settings={"beta": 0.3}), given())
    leads = []
    for group, e in zip(made.train.groups, made.train.examples, strict=True):
        logp = [
            sum(
                float(model.model(torch.tensor([a.prompt + a.response])).logits[0].log_softmax(-1)[t - 1, token])
                for t, token in enumerate(a.response, len(a.prompt))
            )
            for a in group
            for model in (made.module, made.reference)
        ]
        lead = 0.3 * (logp[0] - logp[1] - logp[2] + logp[3])
        leads += [] if e.agreement == 0.5 else [lead if e.agreement > 0.5 else -lead]
    held = made.evaluate()
    assert len(leads) == 4
    assert held["held_out/accuracy"] == sum(lead > 0 for lead in leads) / 4
    assert held["held_out/margin"] == pytest.approx(sum(leads) / 4, rel=1e-9)


def test_pairs_without_a_majority_have_no_accuracy():
    data = given()
    for example in data.examples:
        example.agreement = 0.5
    made, tally = policy_objective(PairLossConfig(), data), Tally()
    made.loss(ALL, 1.0, tally)
    assert not {"accuracy", "margin", "held_out/accuracy", "held_out/margin"} & {*tally.means(), *made.evaluate()}


def reward_objective(kind: str, folder: Path, data: EncodedSet[Preference]) -> PairwiseReward:
    path, names, (made_of, objective, size) = save_mini(folder / "m"), ("a", "b", "c", "d"), KINDS[kind]
    generator = torch.Generator().manual_seed(1)
    if kind == "score":
        model = load_scalar(path)
        torch.nn.init.normal_(model.output.weight, generator=generator)
    else:
        loaded = load_reward(path, attributes=names)
        model = made_of(loaded.model, loaded.tokenizer, names)
        model.begin(generator)
    more = (generator,) if kind == "heads" else ()
    return objective(model.double(), data, data, RewardModelConfig(**size), 10_000, *more)


KINDS: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "score": (None, PairwiseReward, {}),
    "heads": (EnsembleModel, EnsembleReward, {"heads": 4}),
    "bottleneck": (BottleneckModel, BottleneckReward, {"bottleneck": 4}),
    "planes": (GeneralPreferenceModel, GeneralPreferenceReward, {"planes": 2}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_reward_models_tell_the_lead_of_what_most_raters_preferred(kind, tmp_path):
    found, data = [], given(vocab=30)
    for one in (data, by_raters(data, signed_margin=False)):
        made, tally = reward_objective(kind, tmp_path, one), Tally()
        made.loss(ALL, made.denominator(ALL), tally)
        found.append((tally.means(), made.evaluate()))
    for first, second in zip(*found, strict=True):
        same(first, second)
    alone = copy.copy(data)
    decided = [i for i in ALL if data.examples[i].agreement != 0.5]
    alone.groups, alone.examples = [data.groups[i] for i in decided], [data.examples[i] for i in decided]
    assert reward_objective(kind, tmp_path, alone).evaluate()["held_out/margin"] == pytest.approx(
        found[0][1]["held_out/margin"]
    )


def test_the_best_look_is_the_one_that_follows_most_raters(tmp_path):
    """Votes against the column `chosen`: a run that learns them is right, and its best look is a trained one."""
    voted = {"chosen": "no", "rejected": "yes it is", "votes": [0, 0, 0, 0, 1]}
    files = [
        str(write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": asked + w, **voted} for w in WORDS[:8]]))
        for name, asked in (("train", ""), ("held", "x"))
    ]
    recipe = {
        "model": {"path": str(save_mini(tmp_path / "m"))},
        "data": {"path": files, "held_out_files": ["held.jsonl"]},
        "train": {"batch_size": 8, "epochs": 12, "keep": "best"},
        "optimizer": {"lr": 0.03},
        "samples": {"prompts": 0},
        "run": {"dir": str(tmp_path / "run"), "threads": 1, "eval_every": 6},
    }
    summary = run(PreferenceRecipe.model_validate(recipe))
    looks = [row["held_out/accuracy"] for row in logged(tmp_path / "run") if "held_out/accuracy" in row]
    assert looks[0] == 0.5
    assert looks[-1] == 1.0
    assert summary["held_out/accuracy"] == 1.0
