"""Self-distillation from demonstrations (SDFT, arXiv 2601.19897): the paper's loss and average, written anew; what a
run of it keeps, reads and refuses."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from distill_kit import distil, stopped_and_resumed
from letter_models import save_chat_mini, save_mini, write_jsonl
from train_kit import merge, rows, weights

from steersman.distill import run as verb
from steersman.distill.objective import Distillation
from steersman.distill.recipe import DistillLoss, DistillRecipe
from steersman.distill.rows import load, reader
from steersman.distill.teacher import Answer, AveragedTeacher
from steersman.model import frozen_copy, load_policy
from steersman.recipe.sections import ModelConfig
from steersman.setup.models import lora_of
from steersman.train.moving import MovingAverage
from steersman.train.tally import Tally
from steersman.types import SteersmanError

EMA = {"path": "ema", "decay": 0.9, "prompt": "{hint}{hint} {prompt}"}


def student(folder, dtype="float64", lora=None):
    config = ModelConfig(path=str(save_mini(folder, 0)), lora=lora)
    return load_policy(config.path, dtype=dtype, lora=lora_of(config))


def move(policy, seed, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_((size * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype))


ANSWERS = [
    Answer([3, 4, 5], [6, 7, 8, 9, 2], [True] * 5, [10, 11, 3, 4, 5], 0),
    Answer([5, 3], [12, 2], [True] * 2, [14, 5, 3], 1),
    Answer([7], [9, 9, 10, 11], [True] * 4, [4, 13, 13, 7], 2),
]


@pytest.mark.parametrize(("name", "average"), [("reverse_kl", "sequence"), ("forward_kl", "token")])
@pytest.mark.parametrize("skip", [0, 2])
def test_the_loss_and_its_gradient_are_the_paper_s(tmp_path, name, average, skip):
    """Equation 2 with the analytic per-token estimator: the KL between softmax(student | x, y_<t) and
    softmax(teacher | x, c, y_<t) at every token of the student's answer, the first few left out."""
    policy = student(tmp_path / "s")
    teacher = frozen_copy(policy)
    move(policy, 1)
    objective = Distillation(
        policy, AveragedTeacher(MovingAverage(teacher, policy, decay=0.9, every=1)),
        DistillLoss(name=name, average=average, skip_first=skip), limit=8.0,
    )  # fmt: skip
    counted = [a.after(skip) for a in ANSWERS]
    denominator = objective.denominator(counted)
    # in two micro-batches, which must add up to the whole
    found = sum(objective.loss(part, denominator, Tally()) for part in (counted[:1], counted[1:]))
    grads = torch.autograd.grad(found, list(policy.parameters()), allow_unused=True)

    twin = copy.deepcopy(policy.model)
    terms, per_answer = [], []
    for a in ANSWERS:

        def logits(model, prompt, response=a.response):
            return model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double()

        q = torch.log_softmax(logits(twin, a.prompt), -1)
        with torch.no_grad():
            p = torch.log_softmax(logits(teacher.model, a.teacher_prompt), -1)
        kl = (q.exp() * (q - p)).sum(-1) if name == "reverse_kl" else (p.exp() * (p - q)).sum(-1)
        if len(kl) > skip:
            terms += list(kl[skip:])
            per_answer.append(kl[skip:].mean())
    wanted = torch.stack(per_answer if average == "sequence" else terms).mean()
    expected = torch.autograd.grad(wanted, list(twin.parameters()), allow_unused=True)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
@pytest.mark.parametrize(("decay", "every"), [(0.9, 1), (0.5, 2), (0.0, 3)])
def test_the_average_is_the_recursion(tmp_path, lora, decay, every):
    policy = student(tmp_path / "s", lora=lora)
    mean = MovingAverage(frozen_copy(policy), policy, decay=decay, every=every)
    phi = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
    for done in range(1, 8):
        move(policy, done)
        mean.follow(done)
        if done % every == 0:
            phi = {n: decay * phi[n] + (1 - decay) * p.detach() for n, p in policy.named_parameters() if n in phi}
        for name, p in mean.copy.named_parameters():
            if name in phi:
                torch.testing.assert_close(p.detach(), phi[name], rtol=1e-12, atol=1e-14)


def test_adapters_alone_are_copied(tmp_path):
    policy = student(tmp_path / "s", lora={"r": 2})
    mean = MovingAverage(frozen_copy(policy), policy, decay=0.9, every=1)
    shared = {p.data_ptr() for p in policy.parameters() if not p.requires_grad}
    own = [n for n, p in mean.copy.named_parameters() if p.data_ptr() not in shared]
    assert own
    assert all("lora" in n for n in own)
    assert not any(p.requires_grad for p in mean.copy.parameters())


def test_half_precision_loses_no_small_step(tmp_path):
    """In bfloat16 itself 0.01 of a small difference rounds to nothing, however often it comes."""
    policy = student(tmp_path / "s", dtype="bfloat16")
    mean = MovingAverage(frozen_copy(policy), policy, decay=0.99, every=1)
    before = {n: p.detach().clone() for n, p in mean.copy.named_parameters()}
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.0625)
    for done in range(1, 401):
        mean.follow(done)
    wide = sum(p.numel() for p in mean.wide)
    assert wide == sum(p.numel() for p in policy.parameters())
    for name, p in mean.copy.named_parameters():
        wanted = before[name].float() * (1 + 0.0625 * (1 - 0.99**400))
        torch.testing.assert_close(p.float(), wanted, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_student_nears_its_average_that_knows_more(settings, tmp_path, lora):
    told = {}
    for decay in (0.0, 0.999):
        run = {"run__dir": str(tmp_path / f"{decay}"), "train__epochs": 12, "optimizer__lr": 5e-3}
        told[decay] = distil(settings, teacher={**EMA, "decay": decay}, model__lora=lora, **run)
    assert told[0.0]["teacher_kl_before"] == pytest.approx(told[0.999]["teacher_kl_before"], rel=1e-5)
    assert told[0.999]["teacher_kl_after"] < told[0.999]["teacher_kl_before"]
    assert told[0.0]["teacher_kl_after"] != told[0.999]["teacher_kl_after"]


def test_a_snapshot_at_each_update_is_the_live_student(settings, tmp_path):
    """decay 0, every 1: what the teacher reads with is the student as it is."""
    for name, teacher in (("live", {"path": "live", "prompt": EMA["prompt"]}), ("ema", {**EMA, "decay": 0.0})):
        distil(settings, teacher=teacher, run__dir=str(tmp_path / name), train__epochs=2)
    first, second = (weights(tmp_path / name / "model") for name in ("live", "ema"))
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)


def test_a_stopped_run_goes_on_with_its_average_bit_for_bit(settings, tmp_path, monkeypatch):
    extra = {"model.dtype": "bfloat16", "loss.skip_first": 1, "loss.average": "sequence", "train.epochs": 4}
    whole = merge({**settings, "teacher": {**EMA, "every": 2}}, extra)
    verb.run(DistillRecipe.model_validate(merge(whole, {"run.dir": str(tmp_path / "whole")})))
    cut = merge(whole, {"run.dir": str(tmp_path / "cut")})
    stopped_and_resumed(cut, 5, monkeypatch)
    first, second = (weights(tmp_path / name / "model") for name in ("whole", "cut"))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_first_tokens_are_left_out_of_updates_but_not_of_looks(settings, tmp_path):
    """Where every token is left out nothing is learnt, and the look still measures whole answers."""
    told = distil(settings, teacher=EMA, loss__skip_first=8, train__max_steps=2, optimizer__weight_decay=0.0)
    assert told["teacher_kl_before"] == pytest.approx(told["teacher_kl_after"])
    assert told["teacher_kl_after"] > 0.01
    assert all(row["loss"] == 0 for row in rows(tmp_path / "run") if "loss" in row)


FORMS = {
    "text": [{"prompt": "no", "completion": " yes"}],
    "turns": [{"prompt": [{"role": "user", "content": "no"}],
               "completion": [{"role": "assistant", "content": " yes"}]}],
    "chat": [{"messages": [{"role": "user", "content": "no"}, {"role": "assistant", "content": " yes"},
                           {"role": "user", "content": "oh"}, {"role": "assistant", "content": "up"}]}],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_demonstration_stands_in_the_teacher_s_prompt_alone(settings, tmp_path, form):
    """{completion} is the given answer's text, whatever the rows' form; the student reads the prompt without it."""
    model = save_chat_mini(tmp_path / "chat", 64)
    data = write_jsonl(tmp_path / "d.jsonl", FORMS[form])
    values = merge(settings, {"model.path": str(model), "data.path": str(data)})
    values["teacher"] = {**EMA, "prompt": "{prompt} as{completion}"}
    recipe = DistillRecipe.model_validate(values)
    policy = load_policy(str(model))
    found = reader(recipe, policy, policy).read(load(recipe).train)
    own, taught = (policy.tokenizer.decode(ids) for ids in (found.prompts[0].ids, found.teacher_prompts[0]))
    assert "no as yes" in taught
    assert "yes" not in own
    assert "no" in own


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"teacher": {"path": "ema"}}, "has nothing to learn from itself"),
        ({"teacher": {**EMA, "path": "start"}}, "decay is about the moving average"),
        ({"teacher": {"path": "live", "prompt": "{prompt}!", "every": 2}}, "every is about the moving average"),
        ({"teacher": {**EMA, "dtype": "bfloat16"}}, "dtype: a teacher of `path: ema` has none"),
        (
            {"teacher": {"path": "start", "prompt": "{prompt}!", "device": "cpu"}},
            "device: a teacher of `path: start`",
        ),
        ({"teacher": {"endpoint": {"url": "http://x", "model": "m"}, "dtype": "float32"}}, "behind an endpoint"),
        ({"teacher": EMA, "loss": {"name": "minillm", "skip_first": 3}}, "minillm is about whole answers"),
        ({"teacher": EMA, "loss": {"nll": 1.0, "skip_first": 3}, "train.on_policy": 0.5}, "loss.nll is about whole"),
        ({"teacher": EMA, "loss": {"name": "uld"}}, "the student's own is the same"),
    ],
)
def test_what_nothing_reads_is_refused(settings, extra, said):
    values = merge(settings, {k: v for k, v in extra.items() if k != "teacher"})
    values["teacher"] = extra["teacher"]
    with pytest.raises(ValueError, match=said):
        DistillRecipe.model_validate(values)


def test_a_row_without_the_demonstration_is_named(settings, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "no"}])
    with pytest.raises(SteersmanError, match="completion"):
        distil(settings, teacher={**EMA, "prompt": "{prompt} {completion}"}, data__path=str(path))
    assert not json.loads(path.read_text()).get("completion")
