"""KTO and BCO from files to a model: numbers from plain forward passes, resume, held prompts, what is refused."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from letter_models import letters, write_jsonl
from pydantic import ValidationError
from tiny_models import tiny_model
from train_kit import merge, plain, rows, weights

from steersman import cli
from steersman.data import Encoded, EncodedSet, Feedback
from steersman.data.rows import Row
from steersman.loss.feedback import auto_weights
from steersman.model import LoraConfig, Policy, load_policy
from steersman.objectives.feedback import BCOConfig, FeedbackObjective, KTOConfig, mismatched
from steersman.setup import reference
from steersman.setup.reference import AdaptersOff, answer_logp, divergence
from steersman.train.reference_looks import ReferenceLooks, SamplesConfig
from steersman.train.tally import Tally
from steersman.types import Prompt, SteersmanError, Tokens
from steersman.verbs import feedback, preference
from steersman.verbs.feedback import RECIPES

WORDS = [
    "yes it is.",
    "no",
    "a cat, a dog",
    "ok",
    "look there",
    "so she said",
    "hm",
    "what?",
    "go on",
    "far",
]


def encoded(labels: str = "+-+-+", same_prompt: bool = False) -> EncodedSet[Feedback]:
    random = torch.Generator().manual_seed(5)
    data: EncodedSet[Feedback] = EncodedSet()
    for number, sign in enumerate(labels):
        ids = torch.randint(3, 97, (4 + number,), generator=random).tolist()
        prompt = [7, 8] if same_prompt else [7, 8 + number]
        data.groups.append([Encoded(prompt, ids, [True] * len(ids))])
        data.examples.append(Feedback("p", "c", sign == "+", Row({}, "f", number), weight=1.0 + number))
    return data


def objective(config, seed: int = 1) -> FeedbackObjective:
    policy, reference = (Policy(tiny_model("llama", seed=s, scale=2.0).double(), None) for s in (seed, 2))
    made = FeedbackObjective(policy, reference.requires_grad_(False), encoded(), encoded(), config, 10_000)
    made.read_reference(range(5))
    return made


def plain_logp(policy: Policy, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logits = policy.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) - 1 + t, token] for t, token in enumerate(answer))


def test_kto_equals_the_paper_on_plain_forward_passes():
    made = objective(KTOConfig(beta=0.05, desirable_weight="auto", undesirable_weight=2.0, nll=0.5))
    assert made.weights == (1.0, 2.0)
    batch = [0, 1, 4]
    made.look(batch)
    one = [made.train.groups[i][0] for i in batch]
    with torch.no_grad():
        apart = [
            plain_logp(made.module, a.prompt, b.response) - plain_logp(made.reference, a.prompt, b.response)
            for a, b in zip(one, one[1:] + one[:1], strict=True)
        ]
    point = max(0.0, float(sum(apart)) / 3)
    assert made.threshold == pytest.approx(point, rel=1e-9)
    total = 0.0
    for i, e in zip(batch, one, strict=True):
        own, ref = (float(plain_logp(m, e.prompt, e.response).detach()) for m in (made.module, made.reference))
        lead = 0.05 * (own - ref - point)
        if made.train.examples[i].label:
            loss = 1.0 / (1 + math.exp(lead)) - 0.5 * own / len(e.response)
        else:
            loss = 2.0 / (1 + math.exp(-lead))
        total += (1 + i) * loss
    found = made.loss(batch, made.denominator(batch), Tally())
    assert float(found.detach()) == pytest.approx(total / (1 + 2 + 5), rel=1e-9)


def test_bco_shift_follows_both_labels():
    made = objective(BCOConfig(beta=0.05, shift_decay=0.75))
    reward = 0.05 * (answer_logp(made.module, made.train.first, 10_000) - made.reference_logp[id(made.train)])
    assert made.threshold == 0.0
    means = {True: 0.0, False: 0.0}
    for batch in ([0, 1, 2], [3], [0, 4], [1, 2, 3]):  # one batch has one label only, which leaves the other mean
        tally = Tally()
        for i in batch:  # micro-batches of one
            made.loss([i], 1.0, tally)
        made.update_threshold(tally.means())
        for label in (True, False):
            of = [float(reward[i]) for i in batch if made.train.examples[i].label == label]
            if of:
                means[label] = 0.75 * means[label] + 0.25 * sum(of) / len(of)
        assert made.threshold == pytest.approx(sum(means.values()) / 2, rel=1e-9)


def test_apo_of_single_answers_reads_no_others(monkeypatch):
    """The paper on plain forward passes; nothing of other prompts is read, so a batch may be of one row."""
    made = objective(KTOConfig(name="apo_zero_unpaired", beta=0.05, desirable_weight=1.5, undesirable_weight=0.5))
    monkeypatch.setattr("steersman.objectives.feedback.answer_logp", lambda *a: pytest.fail("read other answers"))
    made.look([0, 1, 4])
    total = 0.0
    for i in (0, 1, 4):
        e = made.train.groups[i][0]
        own, ref = (float(plain_logp(m, e.prompt, e.response).detach()) for m in (made.module, made.reference))
        above = 1 / (1 + math.exp(-0.05 * (own - ref)))
        total += (1 + i) * (1.5 * (1 - above) if made.train.examples[i].label else 0.5 * above)
    found = made.loss([0, 1, 4], made.denominator([0, 1, 4]), Tally())
    assert float(found.detach()) == pytest.approx(total / (1 + 2 + 5), rel=1e-9)
    made.update_threshold({"reward/liked": 3.0})
    assert made.threshold == 0.0
    recipe = {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"batch_size": 1}}
    RECIPES["kto"].model_validate(merge(recipe, {"loss.name": "apo_zero_unpaired"}))


@pytest.mark.parametrize("config", [KTOConfig(), KTOConfig(name="apo_zero_unpaired"), BCOConfig()])
def test_micro_batches_add_up(config):
    made = objective(config)
    made.look([0, 1, 2, 3, 4])
    parameters = list(made.module.parameters())
    whole = torch.autograd.grad(made.loss([0, 1, 2, 3, 4], 5.0, Tally()), parameters)
    parts = [torch.autograd.grad(made.loss([i], 5.0, Tally()), parameters) for i in range(5)]
    for k, g in enumerate(whole):
        torch.testing.assert_close(sum(p[k] for p in parts), g, rtol=1e-7, atol=1e-11)


def test_mismatched_answers_answer_another_prompt_and_fit():
    data = encoded()
    found = mismatched(data, [2, 0, 4], context=None)
    assert [e.prompt for e in found] == [data.groups[i][0].prompt for i in (2, 0, 4)]
    assert [e.response for e in found] == [data.groups[i][0].response for i in (0, 4, 2)]
    data.groups[1][0].prompt = data.groups[0][0].prompt  # pairs split in two give the same prompt twice
    found = mismatched(data, [0, 1, 2], context=6)
    assert [e.response for e in found] == [data.groups[i][0].response[:4] for i in (2, 2, 0)]
    assert mismatched(encoded(same_prompt=True), [0, 1, 2], None) == []


def test_weights_balance_the_counts():
    assert auto_weights(30, 10) == (1.0, 3.0)
    assert auto_weights(10, 40) == (4.0, 1.0)
    made = objective(KTOConfig())  # three likes, two dislikes
    assert made.weights == (1.0, 1.5)


def test_the_held_out_auc_counts_all_pairs():
    made = objective(KTOConfig())
    assert made.held_out is not None
    label = [e.label for e in made.held_out.examples]
    rewards = torch.cat([made._run(made.held_out, [row])[1]["reward"] for row in range(len(label))])
    wins = [
        (up > down) + 0.5 * (up == down)
        for up, liked in zip(rewards.tolist(), label, strict=True)
        for down, other in zip(rewards.tolist(), label, strict=True)
        if liked and not other
    ]
    assert made.evaluate()["held_out/auc"] == pytest.approx(sum(wins) / len(wins))


# Whole runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path, mini):
    table = [{"prompt": f"say {w}", "completion": f" {w} {w}", "label": i % 3 > 0} for i, w in enumerate(WORDS * 3)]
    return {
        "model": {"path": str(mini)},
        "data": {"path": str(write_jsonl(tmp_path / "feedback.jsonl", table)), "held_out": 0.3},
        "train": {"epochs": 2, "batch_size": 6},
        "optimizer": {"lr": 3e-3},
        "samples": {"prompts": 3, "max_new_tokens": 5},
        "run": {"dir": str(tmp_path / "run"), "threads": 1, "eval_every": 3, "save_every": 2},
    }


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(name, asked, tmp_path, monkeypatch):
    summary = feedback.run(RECIPES[name].model_validate(asked))
    assert summary["finished"]
    again = RECIPES[name].model_validate(merge(asked, {"run.dir": str(tmp_path / "cut")}))
    with monkeypatch.context() as patch:
        whole = FeedbackObjective.update_threshold

        def stop(self, stats):
            whole(self, stats)
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt

        calls: list[int] = []
        patch.setattr(FeedbackObjective, "update_threshold", stop)
        with pytest.raises(KeyboardInterrupt):
            feedback.run(again)
    assert max(row["step"] for row in rows(tmp_path / "cut")) == 3  # the checkpoint is of step 2
    feedback.run(again, resume=True)
    one, two = ([plain(row) for row in rows(tmp_path / d)] for d in ("run", "cut"))
    assert one == two
    assert {"held_out/auc", "held_out/kl", "held_out/perplexity", "held_out/logp/liked", "threshold"} <= set(one[-1])
    assert one[0]["held_out/kl"] == pytest.approx(0.0, abs=1e-5)
    assert one[-1]["held_out/kl"] > 1e-4
    a, b = (weights(tmp_path / d / "model") for d in ("run", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    told = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in told} == {0, 3, 6, len(one) - 1}
    assert len([row for row in told if row["step"] == 0]) == 3


@pytest.mark.parametrize("name", ["dpo", "tdpo2"])
def test_an_interrupted_run_on_pairs_goes_on_as_if_nothing_had_happened(name, asked, tmp_path, monkeypatch):
    table = [{"prompt": f"say {w}", "chosen": f" {w} yes", "rejected": f" no {w}"} for w in WORDS * 3]
    write_jsonl(tmp_path / "feedback.jsonl", table)
    changes = {"loss": {"name": name, "nll": 0.1}, "optimizer.schedule": "cosine", "optimizer.warmup": 2}
    read = preference.PreferenceRecipe.model_validate
    preference.run(read(merge(asked, changes)))
    again = read(merge(asked, changes | {"run.dir": str(tmp_path / "cut")}))
    with monkeypatch.context() as patch:
        whole, calls = preference.PairObjective.denominator, []

        def stop(self, batch):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return whole(self, batch)

        patch.setattr(preference.PairObjective, "denominator", stop)
        with pytest.raises(KeyboardInterrupt):
            preference.run(again)
    preference.run(again, resume=True)
    one, two = ([plain(row) for row in rows(tmp_path / d)] for d in ("run", "cut"))
    assert one == two
    a, b = (weights(tmp_path / d / "model") for d in ("run", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_pairs_split_in_two_learn_to_tell_liked_from_disliked(asked, tmp_path):
    table = [{"prompt": f"say {w}", "chosen": f" {w} yes", "rejected": " no no no"} for w in WORDS * 2]
    data = {"data.path": str(write_jsonl(tmp_path / "pairs.jsonl", table)), "train.epochs": 6}
    summary = feedback.run(RECIPES["kto"].model_validate(merge(asked, data)))
    assert summary["held_out/auc"] > 0.9


@pytest.mark.parametrize("verb", ["kto", "bco"])
def test_one_label_only_is_refused(verb, asked, tmp_path, capsys):
    table = [{"prompt": w, "completion": f" {w}", "label": True} for w in WORDS]
    write_jsonl(tmp_path / "feedback.jsonl", table)
    given = [f"--{k}.{n}={json.dumps(v)}" for k, section in asked.items() for n, v in section.items()]
    assert cli.main([verb, *[x for one in given for x in one.split("=", 1)]]) == 2
    told = capsys.readouterr().err
    assert "feedback.jsonl" in told
    assert "labels are true" in told
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_one_label_that_is_left_after_the_length_limit_is_refused(asked, tmp_path):
    table = [{"prompt": "a", "completion": " ok" if i % 2 else " far" * 12, "label": i % 2 > 0} for i in range(10)]
    write_jsonl(tmp_path / "feedback.jsonl", table)
    recipe = RECIPES["kto"].model_validate(
        merge(asked, {"data.held_out": 0, "data.on_too_long": "drop", "data.max_length": 20})
    )
    with pytest.raises(SteersmanError, match="thumbs up, and 5 were too long"):
        feedback.run(recipe)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.batch_size": 1}, "reference point"),
        ({"loss.undesirable_weight": -1.0}, "undesirable_weight"),
        ({"loss.beta": 0.0}, "beta"),
        ({"model.scratch": {"model_type": "llama"}}, "sft"),
    ],
)
def test_settings_that_can_not_work_are_refused(asked, changes, words):
    with pytest.raises(ValidationError, match=words):
        RECIPES["kto"].model_validate(merge(asked, {"loss": {}} | changes))


# Reference and held prompts, which the pair losses share ------------------------------------------------------


def test_the_reference_of_adapters_is_the_model_without_them(mini):
    policy, plain_one = load_policy(mini, lora=LoraConfig(r=2)), load_policy(mini, trainable=False)
    with torch.no_grad():
        for p in (p for p in policy.parameters() if p.requires_grad):
            p.add_(0.1 * torch.ones_like(p))
    reference = AdaptersOff(policy)
    tokens = Tokens.from_ids([[3, 4], [5]], [[6, 7, 8], [9, 10]])
    with torch.no_grad():
        expected, moved = plain_one.logp(tokens).logp, policy.logp(tokens).logp
        torch.testing.assert_close(reference.logp(tokens).logp, expected)
        torch.testing.assert_close(reference.logp_from(tokens, reference.hidden(tokens)).logp, expected)
    assert (moved - expected).abs().max() > 0.01


def test_sampled_kl_is_that_of_all_answers(mini):
    """Enumerated: answers of at most two tokens to one prompt; the estimate's expectation is the exact KL."""
    policy, reference = (Policy(tiny_model("llama", vocab=5, seed=s, scale=4.0), None) for s in (0, 1))

    def per_state(prompt):
        tokens = Tokens.from_ids([prompt], [[0]])
        h, r = policy.hidden(tokens), reference.hidden(tokens)
        return (
            divergence(h, policy.head(), r, reference.head())[0],
            policy.head().log_softmax(h)[0].exp(),
            (policy.head().log_softmax(h)[0] - reference.head().log_softmax(r)[0]),
        )

    with torch.no_grad():
        first, prob, ratio = per_state([3, 4])
        exact = estimate = 0.0
        for a in range(5):
            kl, p, q = per_state([3, 4, a])
            estimate += prob[a] * (first + kl)
            exact += prob[a] * (ratio[a] + (p * q).sum())
    torch.testing.assert_close(estimate, exact)
    assert estimate > 0.02


def test_held_prompts_report_the_divergence_of_what_was_sampled():
    """KL(pi || pi_ref), not the other way about, from plain forward passes over the sampled answers."""
    policy, reference = (Policy(tiny_model("llama", seed=s, scale=4.0), letters()) for s in (0, 1))
    log = SimpleNamespace(samples=lambda step, rows: None)
    session = SimpleNamespace(config=SimpleNamespace(seed=3, micro_tokens=12), step=0, log=log)
    prompts = [Prompt([5, 6, 7], "a", index=0), Prompt([9], "b", index=1), Prompt([11, 12], "c", index=2)]
    looks = ReferenceLooks(policy, reference, prompts, SamplesConfig(max_new_tokens=6), session)
    made: list = []
    generate = looks.engine.generate
    looks.engine.generate = lambda *a, **k: made.extend(generate(*a, **k)) or made
    told = looks.look()
    total = nats = count = 0.0
    for sample in made:
        ids, first = torch.tensor([sample.prompt.ids + sample.ids]), len(sample.prompt.ids) - 1
        with torch.no_grad():
            p, q = (m.model(ids).logits[0, first:-1].double().log_softmax(-1) for m in (policy, reference))
        total += float((p.exp() * (p - q)).sum())
        nats -= float(q[torch.arange(len(sample.ids)), sample.ids].sum())
        count += len(sample.ids)
    assert told["held_out/kl"] == pytest.approx(total / 3, rel=1e-4)
    assert told["held_out/perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert told["held_out/length"] == count / 3


def test_pairs_with_adapters_measure_kl_and_resume_without_a_second_model(asked, tmp_path, monkeypatch):
    table = [{"prompt": f"say {w}", "chosen": f" {w} yes", "rejected": f" no {w}"} for w in WORDS * 2]
    write_jsonl(tmp_path / "feedback.jsonl", table)
    loaded = []
    monkeypatch.setattr("steersman.setup.reference.policy_from", lambda *a, **k: loaded.append(a))
    changes = {"model.lora": {"r": 2}, "loss": {"name": "tdpo2"}}
    summary = preference.run(preference.PreferenceRecipe.model_validate(merge(asked, changes)))
    assert loaded == []
    assert summary["held_out/kl"] > 0
    assert summary["held_out/accuracy"] > 0.8


def begun(verb, asked, tmp_path, changes, *, resume=False):
    """Runs `kto`, or `dpo` on pairs."""
    if verb == "kto":
        return feedback.run(RECIPES["kto"].model_validate(merge(asked, changes)), resume=resume)
    table = [{"prompt": f"say {w}", "chosen": f" {w} yes", "rejected": f" no {w}"} for w in WORDS * 3]
    write_jsonl(tmp_path / "feedback.jsonl", table)
    return preference.run(preference.PreferenceRecipe.model_validate(merge(asked, changes)), resume=resume)


@pytest.mark.parametrize("verb", ["dpo", "kto"])
def test_a_short_run_asks_the_reference_about_its_own_rows_only(verb, asked, tmp_path, monkeypatch):
    """A trial of a few steps on a large set must not wait for a pass over all of it."""
    real, read = reference.answer_logp, []

    def counted(model, answers, micro_tokens, progress, **how):
        read.append(len(answers))
        return real(model, answers, micro_tokens, progress, **how)

    monkeypatch.setattr(reference, "answer_logp", counted)
    each, losses = 2 if verb == "dpo" else 1, []
    same = {"train.batch_size": 3, "samples.prompts": 0, "optimizer.schedule": "constant", "optimizer.warmup": 0}
    for run, steps in (("whole", 6), ("short", 2)):
        read.clear()
        begun(verb, asked, tmp_path, same | {"train.max_steps": steps, "run.dir": str(tmp_path / run)})
        assert read[0] == steps * 3 * each
        losses.append([row["loss"] for row in rows(tmp_path / run) if "loss" in row])
    assert losses[1] == pytest.approx(losses[0][:2], rel=1e-5)
    assert all(map(math.isfinite, losses[0]))


@pytest.mark.parametrize("verb", ["dpo", "kto"])
def test_what_does_not_fit_is_told_before_the_pass_over_the_data(verb, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "answer_logp", lambda *a, **how: pytest.fail("the reference was read first"))

    def refuse(*a, **k):
        raise SteersmanError("it does not fit")

    monkeypatch.setattr("steersman.verbs.offline_run.announce", refuse)
    with pytest.raises(SteersmanError, match="it does not fit"):
        begun(verb, asked, tmp_path, {"samples.prompts": 0})


@pytest.mark.parametrize("verb", ["dpo", "kto"])
def test_a_run_that_goes_on_takes_up_what_the_reference_said(verb, asked, tmp_path, monkeypatch):
    """Cut in the pass over the data, then in training: no answer is read twice, and the end is the same."""
    monkeypatch.setattr(reference, "ROWS", 4)
    same = {"samples.prompts": 0, "data.held_out": 0, "train.batch_size": 4, "train.epochs": 1}
    begun(verb, asked, tmp_path, same)
    real, read, stop_at = reference.answer_logp, [], [2]

    def counted(model, answers, micro_tokens, progress, **how):
        if len(read) == stop_at[0]:
            raise KeyboardInterrupt
        read.append(len(answers))
        return real(model, answers, micro_tokens, progress, **how)

    monkeypatch.setattr(reference, "answer_logp", counted)
    cut = same | {"run.dir": str(tmp_path / "cut")}
    with pytest.raises(KeyboardInterrupt):
        begun(verb, asked, tmp_path, cut)
    stop_at[0] = 10**6
    objective = FeedbackObjective if verb == "kto" else preference.PairObjective
    with monkeypatch.context() as patch:
        patch.setattr(objective, "denominator", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            begun(verb, asked, tmp_path, cut, resume=True)
    rows_there = len((tmp_path / "feedback.jsonl").read_text().splitlines())
    assert sum(read) == rows_there * (2 if verb == "dpo" else 1)
    count = len(read)
    begun(verb, asked, tmp_path, cut, resume=True)
    assert len(read) == count
    a, b = (weights(tmp_path / d / "model") for d in ("run", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "change", [{"data.max_length": 9, "data.on_too_long": "truncate"}, {"model.dtype": "bfloat16"}]
)
def test_what_the_reference_said_of_other_answers_or_in_another_precision_is_not_taken_up(
    change, asked, tmp_path, monkeypatch
):
    same = {"samples.prompts": 0, "train.max_steps": 2}
    real, read = reference.answer_logp, []

    def counted(model, answers, micro_tokens, progress, **how):
        read.append(len(answers))
        return real(model, answers, micro_tokens, progress, **how)

    monkeypatch.setattr(reference, "answer_logp", counted)
    with monkeypatch.context() as patch:
        patch.setattr(FeedbackObjective, "denominator", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            begun("kto", asked, tmp_path, same)
    before = list(read)
    begun("kto", asked, tmp_path, same, resume=True)
    assert read == before
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    begun("kto", asked, tmp_path, same | change, resume=True)
    assert len(read) > len(before)
