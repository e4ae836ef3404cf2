"""SDPO (arXiv 2601.20802): what the teacher reads of how an update's answers fared, the loss written anew, runs."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from distill_kit import distil, stopped_and_resumed
from letter_models import save_chat_mini, save_mini, write_jsonl
from train_kit import merge, rows, weights

from steersman.config.load import load_recipe
from steersman.distill import run as verb
from steersman.distill.feedback import FeedbackPrompts, _without_thoughts
from steersman.distill.objective import Distillation
from steersman.distill.recipe import REPROMPT, DistillLoss, DistillRecipe
from steersman.distill.rows import load, reader
from steersman.distill.teacher import Answer, LocalTeacher
from steersman.model import frozen_copy, load_policy
from steersman.reward import Scores
from steersman.train.tally import Tally

PROMPT = "{prompt}{solution}{feedback} go"
FEEDBACK = {"success": 1.0, "solution": " so {answer}", "text": " but {text}"}
REWARDS = """
def has_a(prompts, completions):
    return [{"score": float("a" in c), "feedback": "" if "a" in c else "no a"} for c in completions]
"""


def recipe_of(settings, folder, **feedback):
    (folder / "words.py").write_text(REWARDS)
    values = merge(settings, {
        "reward": {"parts": {"a": {"function": f"{folder / 'words.py'}:has_a"}}}, "rollout.samples": 4,
        "teacher": {"path": "ema", "decay": 0.9, "prompt": PROMPT, "feedback": FEEDBACK | feedback},
        "loss.reward_weight": 0.0, "model.path": str(save_mini(folder / "m", 0, context=128)),
    })  # fmt: skip
    return values


def answer(row, text, ids=(6, 7, 2)):
    return Answer([3], list(ids), [True] * len(ids), [3], row, text)


def shown(settings, folder, answers, scores, said=None, **feedback):
    """The teacher's prompts as text, None where an answer is not taught; and the shares."""
    recipe = DistillRecipe.model_validate(recipe_of(settings, folder, **feedback))
    policy = load_policy(recipe.model.path)
    found = reader(recipe, policy, policy)
    prompts = FeedbackPrompts(recipe.teacher.feedback, found, found.read(load(recipe).train))
    stats = prompts.show(answers, Scores(torch.tensor(scores), {}, None, said))
    decoded = [policy.tokenizer.decode(a.teacher_prompt, skip_special_tokens=True) for a in answers]
    return [text if a.taught else None for a, text in zip(answers, decoded, strict=True)], stats


GROUPS = [(0, "xx"), (0, "yy"), (0, "zz"), (2, "aa"), (2, "bb"), (4, "cc"), (4, "dd")]
SCORES = [0.0, 1.0, 2.0, 1.5, 0.9, 0.0, 0.5]


def test_a_teacher_reads_the_first_other_answer_that_succeeded(settings, tmp_path):
    answers = [answer(*each) for each in GROUPS]
    found, stats = shown(settings, tmp_path, answers, SCORES)
    assert found == ["the cat so yy go", "the cat so zz go", "the cat so yy go", None, "we so aa go", None, None]
    shares = {"solution": 4 / 7, "text": 0.0, "taught": 4 / 7, "too_long": 0.0, "solved": 2 / 3}
    assert stats == pytest.approx({f"feedback/{k}": v for k, v in shares.items()})


def test_words_stand_beside_a_solution_or_only_where_there_is_none(settings, tmp_path):
    said = ["", "", "w", "ok", "b", "c", " "]
    both, _ = shown(settings, tmp_path, [answer(*each) for each in GROUPS], SCORES, said)
    assert both == [
        "the cat so yy go", "the cat so zz go", "the cat so yy but w go", "we but ok go", "we so aa but b go",
        "no but c go", None,
    ]  # fmt: skip
    alone, stats = shown(settings, tmp_path, [answer(*each) for each in GROUPS], SCORES, said, beside_solution=False)
    assert alone == [
        t if t is None or " so " not in t else t.split(" but ")[0].removesuffix(" go") + " go" for t in both
    ]
    assert stats["feedback/text"] == pytest.approx(2 / 7)
    words, _ = shown(
        settings, tmp_path, [answer(*each) for each in GROUPS], SCORES, said,
        success=None, solution="\nCorrect solution:\n\n{answer}\n\n", column="hint",
    )  # fmt: skip
    assert words[0].split(" but ")[1] == "bb go"
    assert words[2].split(" but ")[1] == "w\nbb go"


def test_its_own_success_is_shown_where_that_is_asked_for_and_thoughts_are_left_out(settings, tmp_path):
    answers = [answer(0, "<think>hm\nhm</think> yes"), answer(0, "no")]
    found, _ = shown(settings, tmp_path, answers, [1.0, 0.0], own=True, thinking=False)
    assert found == ["the cat so yes go"] * 2


def test_thoughts_that_never_end_take_time_that_grows_with_their_number():
    start = time.process_time()
    assert _without_thoughts("a<think>b</think>c<think>d" + "<think>" * 20_000) == "ac<think>d" + "<think>" * 20_000
    assert time.process_time() - start < 3


@pytest.mark.parametrize("limit", ["max_tokens", "context"])
def test_an_answer_whose_teacher_would_read_too_much_is_not_taught(settings, tmp_path, limit):
    long = "y" * (20 if limit == "max_tokens" else 120)
    answers = [answer(0, "x"), answer(0, long), answer(0, "w")]
    extra = {"max_tokens": 20} if limit == "max_tokens" else {}
    found, stats = shown(settings, tmp_path, answers, [0.0, 1.0, 1.0], **extra)
    assert found == [None, "the cat so w go", None]
    assert stats["feedback/too_long"] == pytest.approx(2 / 3)
    assert stats["feedback/taught"] == pytest.approx(1 / 3)


def test_in_a_conversation_it_stands_in_the_last_turn_of_the_user(settings, tmp_path):
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "no"}]
    data = write_jsonl(tmp_path / "chats.jsonl", [{"prompt": turns}])
    values = recipe_of(settings, tmp_path) | {"data": {"path": str(data)}}
    values["model"] = {"path": str(save_chat_mini(tmp_path / "chat", 128))}
    recipe = DistillRecipe.model_validate(values)
    policy = load_policy(recipe.model.path)
    found = reader(recipe, policy, policy)
    prompts = FeedbackPrompts(recipe.teacher.feedback, found, found.read(load(recipe).train))
    answers = [answer(0, "x"), answer(0, "y")]
    prompts.show(answers, Scores(torch.tensor([0.0, 1.0]), {}))
    assert policy.tokenizer.decode(answers[0].teacher_prompt) == "s be kind\nu no so y go\na "


ANSWERS = [
    Answer([3, 4, 5], [6, 7, 8, 9, 2], [True] * 5, [10, 11, 3, 4, 5], 0, advantage=0.75),
    Answer([3, 4, 5], [12, 2], [True] * 2, [3, 4, 5], 0, advantage=-1.25, taught=False),
    Answer([7], [9, 9, 10, 11], [True] * 4, [4, 13, 13, 7], 1, advantage=0.5),
]


def transcribed(policy, teacher, *, kind, k, tail, pull, average):
    """From probabilities: the divergence over the student's k likeliest tokens, with a policy gradient beside it."""
    rows = []
    for a in ANSWERS:

        def logp(model, prompt, response=a.response):
            return torch.log_softmax(model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1], -1)

        q, ids = logp(policy, a.prompt), torch.tensor(a.response)
        with torch.no_grad():
            p = logp(teacher, a.teacher_prompt)
        own = q.gather(1, ids[:, None])[:, 0]
        top = q.topk(k).indices
        p, q = (x.exp().gather(1, top) for x in (p, q))
        if tail:
            p, q = (torch.cat([x, 1 - x.sum(1, keepdim=True)], 1) for x in (p, q))
        else:
            p, q = (x / x.sum(1, keepdim=True) for x in (p, q))
        m = (p + q) / 2
        half = ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)) / 2
        divergence = (q * (q / p).log()).sum(1) if kind == "reverse_kl" else half
        rows.append(divergence * a.taught - pull * a.advantage * own)
    return torch.cat(rows).mean() if average == "token" else torch.stack([r.mean() for r in rows]).mean()


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
@pytest.mark.parametrize(("k", "tail"), [(5, True), (5, False), (99, True)])
@pytest.mark.parametrize("pull", [0.0, 0.5])
@pytest.mark.parametrize("average", ["token", "sequence"])
def test_the_loss_and_its_gradient_are_the_paper_s(tmp_path, kind, k, tail, pull, average):
    policy = load_policy(str(save_mini(tmp_path / "s", 0)), dtype="float64")
    teacher = frozen_copy(policy)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype))
    twin = copy.deepcopy(policy.model)
    config = DistillLoss(name=kind, average=average, top_k=k, tail=tail)
    objective = Distillation(policy, LocalTeacher(teacher, "t"), config, limit=8.0, reward_weight=pull)
    denominator = objective.denominator(ANSWERS)
    learned = objective.learned_from(ANSWERS)
    assert len(learned) == (3 if pull else 2)
    found = sum(objective.loss(part, denominator, Tally()) for part in (learned[:1], learned[1:]))
    grads = torch.autograd.grad(found, list(policy.parameters()), allow_unused=True)
    wanted = transcribed(
        twin, teacher.model, kind=kind, k=min(k, twin.config.vocab_size), tail=tail and k < 99, pull=pull,
        average=average,
    )  # fmt: skip
    expected = torch.autograd.grad(wanted, list(twin.parameters()), allow_unused=True)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


def test_where_nothing_is_taught_an_update_has_no_gradient(settings, tmp_path):
    values = recipe_of(settings, tmp_path, success=9.0)
    values["reward"]["parts"]["a"] = {"builtin": "length"}
    told = distil(values, teacher__feedback__success=99.0, train__epochs=1, optimizer__weight_decay=0.0)
    own, start = weights(tmp_path / "run" / "model"), weights(tmp_path / "m")
    assert all(torch.equal(own[k], start[k]) for k in start)
    assert all(row["loss"] == 0 for row in rows(tmp_path / "run") if "loss" in row)
    assert "teacher_kl_after" not in told
    assert "reward/total_after" in told


def test_a_stopped_run_goes_on_bit_for_bit(settings, tmp_path, monkeypatch):
    values = recipe_of(settings, tmp_path)
    verb.run(DistillRecipe.model_validate(merge(values, {"run.dir": str(tmp_path / "whole")})))
    stopped_and_resumed(merge(values, {"run.dir": str(tmp_path / "cut")}), 5, monkeypatch)
    first, second = (weights(tmp_path / name / "model") for name in ("whole", "cut"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    taught = [row["feedback/taught"] for row in rows(tmp_path / "whole") if "feedback/taught" in row]
    assert taught
    assert all(share > 0 for share in taught)


@pytest.mark.parametrize("pull", [0.0, 0.5])
def test_micro_batches_change_nothing(settings, tmp_path, pull):
    values = recipe_of(settings, tmp_path, text=" but {text}") | {"loss": {"top_k": 6, "reward_weight": pull}}
    for name, size in (("one", 10_000), ("many", 30)):
        distil(
            values, run__micro_tokens=size, run__dir=str(tmp_path / name), train__max_steps=2, model__dtype="float64"
        )
    first, second = (weights(tmp_path / name / "model") for name in ("one", "many"))
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=2e-6, atol=5e-8)  # files hold float32


def test_given_alone_the_section_brings_its_prompt_and_no_policy_gradient():
    base = ["--model.path", "m", "--data.path", "d", "--rollout.samples", "2",
            "--reward.parts", "{r: {builtin: length}}", "--teacher.path", "live"]  # fmt: skip
    recipe = load_recipe(DistillRecipe, None, [*base, "--teacher.feedback.success", "0.5"])
    assert (recipe.teacher.prompt, recipe.reward_weight) == (REPROMPT, 0.0)
    assert not recipe.gradient_through_samples
    own = load_recipe(
        DistillRecipe, None,
        [*base, "--teacher.feedback", "{}", "--teacher.prompt", "{solution}", "--loss.reward_weight", "2"],
    )  # fmt: skip
    assert (own.teacher.prompt, own.reward_weight) == ("{solution}", 2.0)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"teacher.prompt": "{prompt} again"}, "it has neither"),
        ({"reward": None}, "give a section `reward`"),
        ({"reward": None, "teacher.feedback.success": None, "teacher.feedback.solution": None}, "section `reward`"),
        ({"train.on_policy": 0.5}, "train.on_policy 1"),
        ({"rollout.samples": 1}, "raise rollout.samples"),
        ({"teacher.feedback.solution": "so"}, "must hold {answer}"),
        ({"teacher.feedback.success": None}, "solution is about solutions"),
        ({"loss": {"tail": False}}, "loss.tail is about"),
        ({"loss": {"top_k": 5, "name": "minillm"}}, "minillm is another loss"),
        ({"loss": {"top_k": 5}, "teacher": {"endpoint": {"url": "http://x", "model": "m"}}}, "own likeliest"),
        ({"loss.reward_weight": 1.0, "rollout.top_p": 0.9}, "a reward takes a policy gradient"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_runs(settings, tmp_path, extra, said):
    values = merge(recipe_of(settings, tmp_path), extra)
    if values["teacher"].get("feedback", {}).get("solution", "") is None:
        del values["teacher"]["feedback"]["solution"]
    with pytest.raises(ValueError, match=said):
        DistillRecipe.model_validate(values)


def test_without_a_policy_gradient_answers_may_be_sampled_otherwise(settings, tmp_path):
    DistillRecipe.model_validate(merge(recipe_of(settings, tmp_path), {"rollout.top_p": 0.9}))
