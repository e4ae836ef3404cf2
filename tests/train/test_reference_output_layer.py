"""An output layer that is trained whole beside adapters: the reference has the one of the start, whoever asks."""

from __future__ import annotations

import copy

import pytest
import torch
from letter_models import LETTERS, WORDS, letters, save_mini, write_jsonl
from tiny_models import tiny_model
from train_kit import rows as logged
from transformers import AutoModelForCausalLM

from steersman.data import Encoded, EncodedSet, Preference
from steersman.data.rows import Row
from steersman.distill.teacher import Answer, LocalTeacher, Measure
from steersman.model import LoraConfig, Policy
from steersman.objectives.preference import PairObjective
from steersman.objectives.preference_config import PairLossConfig
from steersman.setup.reference import AdaptersOff
from steersman.train.reference_looks import ReferenceLooks
from steersman.train.tally import Tally
from steersman.types import Tokens
from steersman.verbs.preference import PreferenceRecipe, run

ANSWERS = [[8, 9, 10, 2], [11, 12, 2]]


@pytest.fixture(params=[("lm_head",), ("embed_tokens", "lm_head")], ids=" ".join)
def policy_and_start(request):
    """A policy that has moved, and a second copy of what it was at the start."""
    policy = Policy(tiny_model("llama", vocab=len(LETTERS), scale=1.5).double(), letters())
    start = copy.deepcopy(policy).requires_grad_(False)
    policy.adapt(LoraConfig(r=2, alpha=4.0, train_whole=request.param))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in (p for p in policy.parameters() if p.requires_grad):
            p.add_(0.1 * torch.randn_like(p))
    return policy, start


@torch.no_grad()
def test_the_output_layer_of_adapters_off_is_that_of_the_start(policy_and_start):
    policy, start = policy_and_start
    reference = AdaptersOff(policy)
    states = start.hidden(Tokens.from_ids([[5, 6, 7]] * 2, ANSWERS))
    torch.testing.assert_close(reference.head().weight, start.head().weight, rtol=0, atol=0)
    torch.testing.assert_close(reference.head().log_softmax(states), start.head().log_softmax(states))
    assert (policy.head().log_softmax(states) - start.head().log_softmax(states)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["dpo", "tdpo1", "tdpo2"])
def test_token_level_dpo_is_that_beside_a_frozen_copy(name, policy_and_start):
    policy, start = policy_and_start
    data: EncodedSet[Preference] = EncodedSet()
    data.groups.append([Encoded([5, 6, 7], ids, [True] * len(ids)) for ids in ANSWERS])
    data.examples.append(Preference("x", "a", "b", Row({}, "f", 0)))
    trained = [p for p in policy.parameters() if p.requires_grad]
    found = []
    for reference in (AdaptersOff(policy), start):
        made = PairObjective(policy, reference, data, None, PairLossConfig(name=name), 10_000)
        made.read_reference([0])
        loss = made.loss([0], 1.0, Tally())
        found.append([loss, *torch.autograd.grad(loss, trained, materialize_grads=True)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_a_teacher_that_is_the_start_is_the_frozen_copy(policy_and_start):
    policy, start = policy_and_start
    answers = [Answer([5, 6, 7], ids, [True] * len(ids), [5, 6, 7], 0) for ids in ANSWERS]
    states = policy.hidden(Tokens.from_ids([a.prompt for a in answers], [a.response for a in answers]))
    for kind in ("forward_kl", "reverse_kl"):
        one, other = (
            LocalTeacher(model, "start").compare(answers, states, policy.head(), Measure(kind, logp=True))
            for model in (AdaptersOff(policy), start)
        )
        torch.testing.assert_close(one.divergence, other.divergence, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one.logp, other.logp, rtol=1e-9, atol=1e-12)


def test_the_logged_kl_is_that_of_the_saved_model_to_the_start(tmp_path, monkeypatch):
    """A run of dpo: held_out/kl of its last look, from the two folders and the answers that it sampled."""
    answers, distance = [], ReferenceLooks._distance

    def watched(self, samples):
        answers[:] = [(s.prompt.ids, s.ids) for s in samples]
        return distance(self, samples)

    monkeypatch.setattr(ReferenceLooks, "_distance", watched)
    pairs = [{"prompt": w, "chosen": "aaa", "rejected": "zzz"} for w in WORDS]
    recipe = {
        "model": {"path": str(save_mini(tmp_path / "m")), "lora": {"r": 2, "train_whole": ["lm_head"]}},
        "data": {"path": str(write_jsonl(tmp_path / "p.jsonl", pairs))},
        "train": {"batch_size": 12, "epochs": 12},
        "optimizer": {"lr": 0.02},
        "samples": {"prompts": 6, "max_new_tokens": 8},
        "run": {"dir": str(tmp_path / "run"), "threads": 1, "eval_every": 6},
    }
    run(PreferenceRecipe.model_validate(recipe))
    trained, start = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for path in (tmp_path / "run/model", tmp_path / "m")
    )
    expected = 0.0
    with torch.no_grad():
        for prompt, ids in answers:
            q, p = (
                model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                for model in (trained, start)
            )
            expected += float((q.exp() * (q - p)).sum()) / len(answers)
    looks = [row["held_out/kl"] for row in logged(tmp_path / "run") if "held_out/kl" in row]
    assert expected > 1
    assert looks[-1] == pytest.approx(expected, rel=1e-3)
