"""SDPO beside TRL's own trainer: the teacher's prompts, and the losses in value and gradient.

Runs where TRL is installed (`tests/loss/test_peer_losses.py` says how) and skips elsewhere.
"""

from __future__ import annotations

import pytest
import torch
from letter_models import letters, save_mini, write_jsonl

from steersman.config.load import load_recipe
from steersman.distill.feedback import FeedbackPrompts
from steersman.distill.objective import Distillation
from steersman.distill.recipe import DistillLoss, DistillRecipe
from steersman.distill.rows import load, reader
from steersman.distill.teacher import Answer, LocalTeacher
from steersman.model import load_policy
from steersman.ops.divergence import TeacherStates, linear_divergence
from steersman.ops.logprob import Head
from steersman.reward import Scores
from steersman.train.tally import Tally

pytest.importorskip("trl", reason="TRL is not installed here; the comparison with it is left out")
pytest.importorskip("accelerate", reason="TRL's trainers need accelerate")

PROMPTS = ["the cat", "no"]
TEXTS = [["sat", "ran up", "is"], ["oh", "yes, so", "hm"]]
SCORES = [0.0, 1.0, 1.5, 0.5, 0.0, 1.0]
SAID = ["go on", "", "", "more", " ", ""]
SETTINGS = {"include_environment_feedback": True, "teacher_model_kind": "live", "scale_rewards": "none",
            "temperature": 0.8, "num_generations": 3, "loss_type": "grpo"}  # fmt: skip


@pytest.fixture
def policy(tmp_path):
    torch.set_num_threads(1)
    return load_policy(str(save_mini(tmp_path / "m", 0, context=512)), dtype="float64")


def trainer_of(policy, folder, **settings):
    from datasets import Dataset
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    tokenizer = letters()
    tokenizer.pad_token = "\n"  # their solutions lose every pad token
    args = SDPOConfig(
        output_dir=str(folder / "out"), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=6, **SETTINGS | settings,
    )  # fmt: skip
    trainer = SDPOTrainer(
        model=policy.model, reward_funcs=lambda completions, **_: SCORES, args=args, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": p} for p in PROMPTS]),
    )  # fmt: skip
    trainer.model.eval()
    return trainer


def theirs(trainer, answers):
    """A batch as the peer holds it, with the teacher's part of it."""
    from trl.trainer.utils import pad

    def padded(lists, side):
        rows = [torch.tensor(x) for x in lists]
        return pad(rows, padding_value=0, padding_side=side), pad(
            [torch.ones_like(x) for x in rows], padding_value=0, padding_side=side
        )

    batch = {}
    batch["prompt_ids"], batch["prompt_mask"] = padded([a.prompt for a in answers], "left")
    batch["completion_ids"], batch["completion_mask"] = padded([a.response for a in answers], "right")
    prompts = [PROMPTS[a.row] for a in answers]
    batch |= trainer.teacher_context_builder.build(batch, prompts, torch.tensor(SCORES), feedbacks=SAID)
    score = torch.tensor(SCORES, dtype=torch.float64).view(2, 3)
    batch["advantages"] = (score - score.mean(1, keepdim=True)).flatten()
    return batch


def ours(policy, folder):
    data = write_jsonl(folder / "d.jsonl", [{"prompt": p} for p in PROMPTS])
    words = [
        "--model.path", str(folder / "m"), "--data.path", str(data), "--teacher.path", "live",
        "--teacher.feedback", "{}", "--rollout.samples", "3", "--reward.parts", "{r: {builtin: length}}",
    ]  # fmt: skip
    recipe = load_recipe(DistillRecipe, None, words)
    rows = reader(recipe, policy, None)
    train = rows.read(load(recipe).train)
    answers = [
        Answer(
            train.prompts[row].ids, [*policy.tokenizer(text).input_ids, 2], [True] * (len(text) + 1), [], row, text
        )
        for row, texts in enumerate(TEXTS)
        for text in texts
    ]
    FeedbackPrompts(recipe.teacher.feedback, rows, train).show(answers, Scores(torch.tensor(SCORES), {}, None, SAID))
    for a in answers:
        a.teacher_prompt = a.teacher_prompt or a.prompt
    return answers


def test_the_teacher_reads_the_same(policy, tmp_path):
    answers = ours(policy, tmp_path)
    batch = theirs(trainer_of(policy, tmp_path), answers)
    assert batch["self_distillation_mask"].bool().tolist() == [a.taught for a in answers]
    width = batch["completion_ids"].shape[1]
    for a, ids, mask in zip(answers, batch["teacher_input_ids"], batch["teacher_attention_mask"], strict=True):
        prompt = ids[:-width][mask[:-width].bool()].tolist()
        assert prompt == a.teacher_prompt, policy.tokenizer.decode(prompt)
    assert [a.taught for a in answers] == [True] * 5 + [False]


KINDS = {1.0: {"name": "reverse_kl"}, 0.0: {"name": "forward_kl"}, 0.3: {"name": "jsd", "mix": 0.3}}
MODES = {
    "full_logits": ({}, {}),
    "topk_logits": ({"distillation_topk": 7}, {"top_k": 7, "tail": False}),
    "topk and tail": ({"distillation_topk": 7, "distillation_add_tail": True}, {"top_k": 7}),
}


@pytest.mark.parametrize("alpha", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_loss_and_gradient(policy, tmp_path, alpha, mode, weight):
    """With a policy gradient beside it the gradient alone: its value is that of a ratio there."""
    asked, meant = MODES[mode]
    trainer = trainer_of(
        policy, tmp_path, distillation_mode=mode.replace(" and tail", "_logits"), distillation_alpha=alpha,
        distillation_weight=weight, **asked,
    )  # fmt: skip
    answers = ours(policy, tmp_path)
    batch = theirs(trainer, answers)
    for a, advantage in zip(answers, batch["advantages"].tolist(), strict=True):
        a.advantage = advantage
    peer = trainer.compute_loss(trainer.model, batch)
    wanted = torch.autograd.grad(peer, list(policy.model.parameters()))
    config = DistillLoss(average="sequence", temperature=0.8, **KINDS[alpha], **meant)
    objective = Distillation(
        policy, LocalTeacher(policy, "live"), config, limit=1.0, reward_weight=(1 - weight) / weight
    )
    loss = weight * objective.loss(answers, objective.denominator(answers), Tally())
    if weight == 1:
        torch.testing.assert_close(loss, peer, rtol=1e-7, atol=1e-9)
    found = torch.autograd.grad(loss, list(policy.model.parameters()))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_their_sampled_token_is_a_draw_of_the_whole_divergence():
    """Its gradient's mean over the token that is drawn is that of KL(student || teacher)."""
    from trl.experimental.sdpo.loss_utils import compute_sampled_token_self_distillation_loss

    generator = torch.Generator().manual_seed(0)
    z, teacher = (torch.randn(3, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    every = torch.arange(11).expand(3, -1)
    of_each = torch.stack([
        compute_sampled_token_self_distillation_loss(z, teacher, every[:, i : i + 1][:, 0], distillation_alpha=1.0)
        for i in range(11)
    ], 1)  # fmt: skip
    mean = (z.softmax(-1).detach() * of_each).sum()
    table = Head(torch.eye(11, dtype=torch.float64))
    whole = linear_divergence(z, table, TeacherStates(teacher, table), "reverse_kl").sum()
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (mean, whole)), rtol=1e-10, atol=1e-12)
