"""A*-PO beside TRL's own trainer: the values before training, and the loss in value and gradient.

Runs where TRL is installed (`tests/loss/test_peer_losses.py` says how) and skips elsewhere.
"""

from __future__ import annotations

import pytest
import torch
from letter_models import LETTERS, letters
from tiny_models import tiny_model

from steersman.algorithms import Coefficients
from steersman.algorithms.a2po import AStarPO
from steersman.model import Policy
from steersman.train.optimal_values import soft_mean
from steersman.types import Tokens, Trajectory
from steersman.verify.gradient import loss_given

pytest.importorskip("trl", reason="TRL is not installed here; the comparison with it is left out")
pytest.importorskip("accelerate", reason="TRL's trainers need accelerate")

PROMPTS = ["the cat", "no", "we go"]
ANSWERS = [" sat on it.", " yes", " up, you see"]
SCORES = [1.0, 0.0, 1.0]
BETA, VALUE_BETA = 0.3, 0.4
OF_REFERENCE = [[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.25, 1.0]]


def reward(prompts, completions, **_):
    """Of the reference's responses, four to a prompt."""
    assert prompts == [p for p in PROMPTS for _ in range(4)]
    return [score for row in OF_REFERENCE for score in row]


@pytest.fixture
def trainer(tmp_path):
    from datasets import Dataset
    from trl.experimental.a2po import A2POConfig, A2POTrainer

    torch.set_num_threads(1)
    tokenizer = letters()
    tokenizer.pad_token = tokenizer.eos_token
    args = A2POConfig(
        output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=len(PROMPTS), beta1=VALUE_BETA, beta2=BETA, num_value_samples=4,
        max_completion_length=5,
    )  # fmt: skip
    made = A2POTrainer(
        model=tiny_model("llama", vocab=len(LETTERS), seed=0, scale=2.0).double(), reward_funcs=reward, args=args,
        processing_class=tokenizer, train_dataset=Dataset.from_list([{"prompt": p} for p in PROMPTS]),
    )  # fmt: skip
    made.ref_model.load_state_dict(tiny_model("llama", vocab=len(LETTERS), seed=1, scale=2.0).state_dict())
    made.model.eval()
    return made


def test_the_values_are_the_same_and_so_are_the_prompts_that_stay(trainer):
    trainer._estimate_optimal_values()
    for prompt, scores in zip(PROMPTS, OF_REFERENCE, strict=True):
        assert trainer._optimal_values[prompt] == pytest.approx(soft_mean(scores, VALUE_BETA), abs=1e-6)
    ours = [p for p, scores in zip(PROMPTS, OF_REFERENCE, strict=True) if max(scores) > 0.0]
    assert list(trainer.train_dataset["prompt"]) == ours


def test_loss_and_gradient_are_the_same(trainer):
    tokenizer = letters()
    ids = [tokenizer(p).input_ids for p in PROMPTS]
    said = [[*tokenizer(a, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for a in ANSWERS]
    P, T = max(map(len, ids)), max(map(len, said))
    rows = [[0] * (P - len(p)) + p + y + [0] * (T - len(y)) for p, y in zip(ids, said, strict=True)]
    held = [[0] * (P - len(p)) + [1] * len(p + y) + [0] * (T - len(y)) for p, y in zip(ids, said, strict=True)]
    value = [soft_mean(scores, VALUE_BETA) for scores in OF_REFERENCE]
    inputs = {
        "input_ids": torch.tensor(rows), "attention_mask": torch.tensor(held), "logits_to_keep": T,
        "rewards": torch.tensor(SCORES).double(), "v_star": torch.tensor(value).double(),
    }  # fmt: skip
    with torch.no_grad():
        inputs["ref_logps"] = trainer._get_sequence_logps(
            trainer.ref_model, inputs["input_ids"], inputs["attention_mask"], T
        )
    theirs = trainer.compute_loss(trainer.model, inputs)
    weights = list(trainer.model.parameters())
    wanted = torch.autograd.grad(theirs, weights)

    tokens, method = Tokens.from_ids(ids, said), AStarPO(beta=BETA, value_beta=VALUE_BETA)
    with torch.no_grad():
        ref = Policy(trainer.ref_model, tokenizer).logp(tokens).logp
    logp = Policy(trainer.model, tokenizer).logp(tokens).logp
    zero = torch.zeros_like(ref)
    traj = Trajectory(
        tokens.mask, zero, zero + 1, logp.detach(), ref, score=inputs["rewards"], baseline=inputs["v_star"]
    )
    ours = loss_given(method, method.advantage(traj).adv, logp, traj, Coefficients(BETA))
    # rotations are float32 there and here, and rows are padded on other sides
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    scale = max(float(x.abs().max()) for x in wanted)
    assert scale > 1e-3
    for found, theirs_of in zip(torch.autograd.grad(ours, weights), wanted, strict=True):
        torch.testing.assert_close(found, theirs_of, rtol=1e-5, atol=1e-6 * scale)
