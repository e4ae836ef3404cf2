"""Encoder-decoders in every verb that takes a causal model: tiny T5s and BARTs, run for real."""

from __future__ import annotations

import json
import math

import pytest
import torch
from letter_models import LETTERS, letters, write_jsonl
from tiny_models import allowed_ids, tiny_model, tiny_pair_config
from train_kit import merge, recipe, rows, settings, weights
from transformers import AutoModelForSeq2SeqLM

from steersman.advantage.gae import Advantage
from steersman.algorithms import ALGORITHMS, Coefficients
from steersman.model import Policy, ScalarModel, SharedCritic, load_policy, load_scalar
from steersman.model.encoder_decoder import decoder_start
from steersman.rollout import Engine, Sampling
from steersman.train.experience import tokens_of, trajectory
from steersman.train.policy_update import Learner
from steersman.types import Prompt, SteersmanError
from steersman.update.optimizer import Optimizer, OptimizerConfig
from steersman.verbs import generate, preference, reward_model, rl, sft

STYLES = ["t5", "bart"]
PROMPTS = [[5], [7, 3, 9, 30, 11, 4, 8, 21, 6], [12, 2, 2], [3] * 14, [33, 20], [7, 3, 9, 30, 11, 4, 8, 21, 6]]


def save_pair(folder, style: str):
    """A tiny model of the style on disk, its vocabulary the letters'."""
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(tiny_pair_config(style, len(LETTERS)))
    model.save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=STYLES)
def pair(request, tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def asked(tmp_path, pair):
    return merge(settings(tmp_path, pair), {"iterations": 1, "run.eval_every": 1})


def offline(folder, model, data, **extra):
    plain = {
        "model": {"path": str(model)}, "data": {"path": str(data)}, "train": {"epochs": 2, "batch_size": 3},
        "optimizer": {"lr": 3e-3}, "run": {"dir": str(folder / "run"), "threads": 1},
    }  # fmt: skip
    return merge(plain, extra)


# -- on-policy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pair"), [(name, STYLES[i % 2]) for i, name in enumerate(ALGORITHMS)], indirect=["pair"]
)
def test_every_algorithm_runs(name, asked, tmp_path, pair):
    """Methods by turns on either style: what a style does is tested below."""
    summary = rl.run(recipe(name, asked))
    assert summary["finished"]
    numbers = {k: v for row in rows(tmp_path / "run") for k, v in row.items()}
    assert all(isinstance(v, int | float) and math.isfinite(v) for v in numbers.values()), numbers
    assert ("loss/value" in numbers) == ALGORITHMS[name].critic
    if ALGORITHMS[name].update == "gradient":
        assert numbers["ratio_gap"] < 2e-4
    else:
        assert numbers["trpo/step"] > 0
        assert 0 < numbers["trpo/kl"] <= 0.01
    after, start = weights(tmp_path / "run" / "model"), weights(pair)
    assert any(not torch.equal(after[k], start[k]) for k in start if k in after)
    load_policy(tmp_path / "run" / "model")


@pytest.mark.parametrize("family", ["t5", "bart", "t5-gated", "mt5", "mbart", "pegasus", "marian", "t5gemma"])
@pytest.mark.parametrize(
    ("temperature", "cut"),
    [(0.7, {}), (1.3, {"top_p": 0.9}), (1.0, {"top_p": 0.9, "top_k": 12, "min_new_tokens": 2})],
)
def test_the_first_ratio_is_one_and_the_gradient_is_reinforces(family, temperature, cut):
    scale = 8.0 if family == "t5gemma" else 2.0  # it normalises its states; larger weights spread its logits
    policy = Policy(tiny_model(family, vocab=len(LETTERS), scale=scale), letters())
    engine = Engine(policy.model, policy.tokenizer, max_batch=5, eos_token_id=[2, 5, 17])
    prompts = [Prompt(ids, "", index=i) for i, ids in enumerate(PROMPTS)]
    sampling = Sampling(max_new_tokens=11, temperature=temperature, **cut)
    samples = engine.generate(prompts, sampling, n=3, seed=5, record_support=True)
    assert len({len(s.ids) for s in samples}) > 1
    tokens, algorithm = tokens_of(samples), ALGORITHMS["ppo"](beta=0.0, epochs=1, minibatches=1)
    traj = trajectory(samples, tokens, torch.zeros(len(samples)), algorithm)
    adv = torch.where(traj.mask, torch.randn(traj.mask.shape, generator=torch.Generator().manual_seed(1)), 0.0)
    learner = Learner(
        algorithm, policy, Optimizer(policy.parameters(), OptimizerConfig(lr=1e-12), 1), temperature=temperature,
        micro_tokens=40,
    )  # fmt: skip
    expected = reinforce_gradient(policy.model, samples, adv, temperature)
    got = {}
    for name, p in policy.model.named_parameters():
        if p.requires_grad:  # Pegasus's table of positions is a constant
            p.register_post_accumulate_grad_hook(lambda p, name=name: got.__setitem__(name, p.grad.clone()))
    stats = learner.update(tokens, traj, Advantage(adv), Coefficients(), torch.Generator().manual_seed(0))
    assert stats["ratio_gap"] < 2e-4
    assert stats["kl/old"] < 1e-6
    assert got.keys() == expected.keys()
    for name, g in expected.items():
        torch.testing.assert_close(got[name], g, rtol=2e-3, atol=3e-5 * max(1.0, float(g.abs().max())))


def reinforce_gradient(model, samples, adv, temperature):
    """grad of -sum_t A_t log pi(a_t) / tokens, row by row, unpadded, over the model's own logits."""
    total = torch.zeros(())
    for row, sample in enumerate(samples):
        read = torch.tensor([[*decoder_start(model), *sample.ids[:-1]]])
        every = torch.ones_like(read)  # a pad token among them is no padding
        logits = model(
            torch.tensor([sample.prompt.ids]), decoder_input_ids=read, decoder_attention_mask=every
        ).logits[0] / temperature  # fmt: skip
        for t, token in enumerate(sample.ids):
            kept = logits[t][sorted(allowed_ids(sample.support[t], logits.shape[1]))] if sample.support else logits[t]
            total = total - adv[row, t] * (logits[t, token] - kept.logsumexp(0))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(total / sum(len(s.ids) for s in samples), list(named.values()))
    return dict(zip(named, gradients, strict=True))


def test_nlpos_mask_is_the_lagging_copys_nucleus_and_the_end(asked):
    from test_every_algorithm import on_policy

    state = on_policy("nlpo", asked, algorithm__mask_top_p=0.5, algorithm__mask_min_tokens=1)
    samples, _ = state.sample(state.next_prompts())
    masker = state.roles.mask.model
    for sample in samples:
        read = torch.tensor([[masker.config.decoder_start_token_id, *sample.ids[:-1]]])
        with torch.no_grad():
            p = masker(torch.tensor([sample.prompt.ids]), decoder_input_ids=read).logits[0].softmax(-1)
        for t, token in enumerate(sample.ids):
            better = p[t][p[t] > p[t, token]].sum()
            assert token in state.roles.engine.end_ids or better < 0.5 + 1e-5


@pytest.mark.parametrize("init", ["policy", "shared"])
def test_critics_start_at_zero_and_learn(asked, init):
    from test_every_algorithm import on_policy, snapshot

    state = on_policy("ppo", asked, critic__init=init)
    critic = state.roles.learner.critic
    assert isinstance(critic, SharedCritic if init == "shared" else ScalarModel)
    samples, scores = state.sample(state.next_prompts())
    tokens, traj, _ = state.experience(samples, scores)
    assert not state.roles.learner.value(tokens, traj).value.any()
    before = snapshot(critic)
    assert state.iteration().stats["loss/value"] > 0
    assert any(not torch.equal(p, before[n]) for n, p in critic.named_parameters())


def test_lora_leaves_the_reference_in_place(asked, tmp_path):
    rl.run(recipe("grpo", asked, model__lora={"r": 2, "alpha": 16}, iterations=2, optimizer__lr=0.05))
    found = rows(tmp_path / "run")
    assert found[1]["kl"] == pytest.approx(0, abs=1e-5)
    assert found[2]["kl"] > 1e-4
    AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "model")


def test_a_resumed_run_ends_with_the_same_weights(asked, tmp_path):
    whole = merge(asked, {"iterations": 3, "run.dir": str(tmp_path / "whole")})
    rl.run(recipe("ppo", whole))
    parts = merge(asked, {"iterations": 3, "run.dir": str(tmp_path / "parts")})
    steps = rl.OnPolicy.iteration
    calls = []

    def stop_at_two(self):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return steps(self)

    rl.OnPolicy.iteration = stop_at_two
    try:
        with pytest.raises(KeyboardInterrupt):
            rl.run(recipe("ppo", parts))
    finally:
        rl.OnPolicy.iteration = steps
    rl.run(recipe("ppo", parts), resume=True)
    a, b = weights(tmp_path / "whole" / "model"), weights(tmp_path / "parts" / "model")
    assert all(torch.equal(a[k], b[k]) for k in a)


# -- offline ---------------------------------------------------------------------------------------------------


def test_sft_learns_to_answer_and_generate_says_it(pair, tmp_path, capsys):
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": w, "completion": w[::-1]} for w in ("ab", "cd", "ef")] * 4)
    asked = offline(tmp_path, pair, data, **{"train.epochs": 30, "train.batch_size": 12, "optimizer.lr": 0.02})
    summary = sft.run(sft.SFTRecipe.model_validate(asked))
    assert rows(tmp_path / "run")[-1]["loss"] < 0.05
    shown = capsys.readouterr().out
    assert "[[source: ab" in shown
    assert "target: ]]ba</s>" in shown
    out = tmp_path / "out.jsonl"
    said = {
        "model": {"path": summary["model"]}, "prompts": ["ab", "ef"], "greedy": True, "out": str(out),
        "rollout": {"max_new_tokens": 8},
    }  # fmt: skip
    generate.run(generate.GenerateRecipe.model_validate(said))
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(f["prompt"], f["completion"], f["finish"]) for f in found] == [("ab", "ba", "eos"), ("ef", "fe", "eos")]


def test_packing_is_refused(pair, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    with pytest.raises(SteersmanError, match="leave packing off"):
        sft.run(sft.SFTRecipe.model_validate(offline(tmp_path, pair, data, **{"train.pack": 64})))


PAIRS = [{"prompt": f"q {c}", "chosen": "aa", "rejected": f"b{c}b"} for c in "abcdef"]


@pytest.mark.parametrize("loss", ["dpo", "tdpo2", "simpo", "orpo"])
def test_preferences_move_apart(loss, pair, tmp_path):
    data = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    asked = offline(tmp_path, pair, data, **{"loss.name": loss, "train.epochs": 8})
    preference.run(preference.PreferenceRecipe.model_validate(asked))
    found = rows(tmp_path / "run")
    steps = [row for row in found if "loss" in row]
    assert steps[-1]["loss"] < steps[0]["loss"]
    if loss == "dpo":
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_a_reward_model_learns_judges_and_becomes_the_critic(pair, tmp_path, asked):
    data = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    trained = offline(tmp_path, pair, data, **{"train.epochs": 20, "run.dir": str(tmp_path / "judge")})
    summary = reward_model.run(reward_model.RewardModelRecipe.model_validate(trained))
    steps = [row for row in rows(tmp_path / "judge") if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert steps[-1]["loss"] < 0.3
    judge = load_scalar(summary["model"])
    assert judge.notes == []
    rl.run(recipe("ppo", merge(asked, {"reward": {"parts": {"judge": {"model": summary["model"]}}}})))
    numbers = {k: v for row in rows(tmp_path / "run") for k, v in row.items()}
    assert math.isfinite(numbers["reward/judge"])
    assert numbers["reward/judge"] != 0


@pytest.mark.parametrize("family", ["t5gemma", "mbart", "marian", "pegasus"])
def test_other_families_go_from_sft_to_dpo_to_ppo_to_generate(family, tmp_path):
    folder = save_pair(tmp_path / family, family)
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": w, "completion": w[::-1]} for w in ("ab", "cd", "ef")] * 4)
    taught = offline(tmp_path, folder, data, **{"run.dir": str(tmp_path / "sft")})
    model = sft.run(sft.SFTRecipe.model_validate(taught))["model"]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    liked = offline(tmp_path, model, pairs, **{"loss.name": "dpo", "run.dir": str(tmp_path / "dpo")})
    model = preference.run(preference.PreferenceRecipe.model_validate(liked))["model"]
    asked = merge(settings(tmp_path, model), {"iterations": 1})
    if family in ("marian", "pegasus"):  # transformers has no classifier of these
        with pytest.raises(SteersmanError, match=r"no sequence classifier of type.*critic\.init: shared"):
            rl.run(recipe("ppo", asked))
        asked = merge(asked, {"critic.init": "shared"})
    rl.run(recipe("ppo", asked))
    assert next(row["ratio_gap"] for row in rows(tmp_path / "run") if "ratio_gap" in row) < 1e-5
    said = {"model": {"path": str(tmp_path / "run" / "model")}, "prompts": ["ab"], "out": str(tmp_path / "out.jsonl")}
    generate.run(generate.GenerateRecipe.model_validate({**said, "rollout": {"max_new_tokens": 4}}))
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


# -- refusals --------------------------------------------------------------------------------------------------


def test_a_response_longer_than_the_decoders_context_is_refused(tmp_path):
    folder = save_pair(tmp_path / "bart", "bart")  # 64 positions
    asked = settings(tmp_path, folder)
    with pytest.raises(SteersmanError, match=r"64 new tokens do not fit the decoder's context.*room for 63"):
        rl.run(recipe("rloo", asked, rollout__max_new_tokens=64))
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b" * 63}])
    with pytest.raises(SteersmanError, match=r"64 response tokens exceed 64 of prompt, 63 of response"):
        sft.run(sft.SFTRecipe.model_validate(offline(tmp_path, folder, data)))
    engine = Engine(load_policy(folder).model, letters())
    with pytest.raises(SteersmanError, match="room for a response of 63"):
        engine.generate([Prompt([5], "")], Sampling(64))
    with pytest.raises(SteersmanError, match="prompt 4 has 65 tokens; the encoder's context is 64"):
        engine.generate([Prompt([5] * 65, "", index=4)], Sampling(3))


def test_a_model_without_a_start_token_is_refused(tmp_path):
    folder = save_pair(tmp_path / "t5", "t5")
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        kept = {k: v for k, v in json.loads(path.read_text()).items() if k != "decoder_start_token_id"}
        path.write_text(json.dumps(kept))
    with pytest.raises(SteersmanError, match=r"names no decoder_start_token_id.*the pad token's id for T5"):
        load_policy(folder)


def test_texts_in_a_script_that_the_tokenizer_lacks_are_refused(pair, tmp_path, asked):
    """Every verb would else learn to say `<unk>`, or be asked `<unk>`."""
    rows_there = [{"prompt": f"где кот {i}", "completion": "кот дома"} for i in range(12)]
    data = write_jsonl(tmp_path / "d.jsonl", rows_there)
    told = r"d\.jsonl, line 1: \d+% of all tokens.*'<unk>'.*use another model"
    with pytest.raises(SteersmanError, match=told):
        sft.run(sft.SFTRecipe.model_validate(offline(tmp_path, pair, data)))
    with pytest.raises(SteersmanError, match=told):
        rl.run(recipe("rloo", merge(asked, {"data.path": str(data)})))
