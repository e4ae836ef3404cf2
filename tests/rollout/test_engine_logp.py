"""What the engine records is what a plain forward says, for every family, whatever shares the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rollout_oracle import ENDS, allowed, oracle_logp, plain_logits, ragged
from tiny_models import allowed_ids, tiny_model
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config

from steersman.rollout import Engine, Sampling
from steersman.rollout.cache import LiveCache
from steersman.rollout.sampling import ActionLimit, uniforms
from steersman.types import Prompt

SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.5},
    {"top_k": 5},
    {"top_p": 0.8, "temperature": 1.5},
    {"min_p": 0.2, "temperature": 1.5},
    {"top_k": 9, "top_p": 0.9, "min_p": 0.05, "temperature": 2.0},
]


def window_model(kind: str):
    """A window on every layer (Mistral), and on some (Qwen2), shorter than the sequences."""
    common = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "sliding_window": 7,
        "eos_token_id": 2,
    }  # fmt: skip
    if kind == "mistral":
        config = MistralConfig(**common, head_dim=8)
    else:
        config = Qwen2Config(**common, use_sliding_window=True, max_window_layers=1)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(3)
    return model


def assert_recorded(model, samples, sampling: Sampling, atol: float = 5e-5) -> None:
    for s in samples:
        logits = plain_logits(model, s.prompt.ids, s.ids)
        if sampling.temperature:
            logits = logits / sampling.temperature
        for t in range(min(sampling.min_new_tokens, len(s.ids))):
            logits[t, list(ENDS)] = -torch.inf
        cuts = (sampling.top_k, sampling.top_p, sampling.min_p)
        sets = [allowed(row, *cuts) for row in logits]
        assert torch.tensor(s.logp).tolist() == pytest.approx(oracle_logp(logits, s.ids, sets), abs=atol)
        if s.support is not None:
            assert [allowed_ids(ids, logits.shape[1]) for ids in s.support] == sets


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(s) or "plain")
def test_recorded_logp_is_that_of_a_plain_forward(live_model, setting):
    sampling = Sampling(12, **setting)
    samples = Engine(live_model, max_batch=4, eos_token_id=ENDS).generate(
        ragged(7), sampling, n=2, seed=1, record_support=True
    )
    assert [(s.prompt.index, s.index) for s in samples] == [(i, j) for i in range(7) for j in range(2)]
    if setting != {"top_k": 5}:  # no end token may be among so few
        assert {len(s.ids) for s in samples} != {12}, "ends at different times, so that rows leave and enter"
    assert all((s.support is not None) == sampling.truncates for s in samples)
    assert_recorded(live_model, samples, sampling)


@pytest.mark.parametrize("kind", ["mistral", "qwen2 mixed"])
def test_windows_shorter_than_the_sequences(kind):
    model = window_model(kind)
    sampling = Sampling(30, temperature=0.8)
    samples = Engine(model, max_batch=3, eos_token_id=ENDS).generate(ragged(6), sampling, seed=1)
    assert_recorded(model, samples, sampling)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "t5", "bart"])
def test_the_live_cache_rewinds_without_a_trace(name, monkeypatch):
    live_model = tiny_model(name)
    rewinds = []
    rewind = LiveCache._rewind
    monkeypatch.setattr(LiveCache, "_rewind", lambda self, column: (rewinds.append(column), rewind(self, column)))
    samples = Engine(live_model, max_batch=3, eos_token_id=ENDS).generate(ragged(12), Sampling(40), n=4, seed=2)
    assert rewinds
    assert_recorded(live_model, samples, Sampling(40))


def test_minimum_length_bans_the_end_and_says_so(live_model):
    sampling = Sampling(12, min_new_tokens=6)
    samples = Engine(live_model, max_batch=4, eos_token_id=ENDS).generate(
        ragged(9), sampling, n=2, seed=4, record_support=True
    )
    assert min(len(s.ids) for s in samples) > 6
    assert any(s.finish == "eos" for s in samples)
    assert_recorded(live_model, samples, sampling)


def test_the_engine_gives_what_transformers_generates_greedily(live_model):
    prompts = ragged(6)
    samples = Engine(live_model, max_batch=3).generate(prompts, Sampling(16, temperature=0))
    for s in samples:
        ids = torch.tensor([s.prompt.ids])
        whole = live_model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, pad_token_id=2,
            use_cache=False,  # the library's own cache takes a T5's decoder to be as deep as its encoder
        )  # fmt: skip
        read = 1 if live_model.config.is_encoder_decoder else len(s.prompt.ids)
        assert s.ids == whole[0, read:].tolist()
        logits = plain_logits(live_model, s.prompt.ids, s.ids).log_softmax(-1)
        assert s.logp == pytest.approx([row[v].item() for row, v in zip(logits, s.ids, strict=True)], abs=5e-5)


def test_a_sample_does_not_depend_on_its_company(live_model):
    prompts, sampling = ragged(7), Sampling(14)

    def ids(prompts, n, **engine):
        out = Engine(live_model, eos_token_id=ENDS, **engine).generate(prompts, sampling, n=n, seed=(5, 1))
        return {(s.prompt.index, s.index): s.ids for s in out}

    whole = ids(prompts, 3, max_batch=64)
    assert len({tuple(v) for v in whole.values()}) == 21
    for other in (
        ids(prompts, 3, max_batch=1),
        ids(prompts[::-1], 3, max_batch=5, prefill_tokens=20),
        ids(prompts, 1, max_batch=3),
        ids(prompts[2:4], 2, max_batch=2, prefill_tokens=1),
    ):
        assert other == {key: whole[key] for key in other}


def test_every_token_is_the_inverse_transform_of_its_own_uniform(live_model):
    """Replayed from plain forwards: the cumulative probability crosses token t's uniform at the sampled id."""
    samples = Engine(live_model, max_batch=3, eos_token_id=ENDS).generate(ragged(6), Sampling(12), n=2, seed=3)
    for s in samples:
        p = plain_logits(live_model, s.prompt.ids, s.ids).softmax(-1)
        above = p.cumsum(-1)[range(len(s.ids)), s.ids]
        below = above - p[range(len(s.ids)), s.ids]
        u = torch.from_numpy(uniforms(3, s.prompt.index, 0, s.index, 12)[: len(s.ids)]).double()
        assert ((below - 2e-5 < u) & (u < above + 2e-5)).all()


def test_the_seed_decides(live_model):
    engine, prompts = Engine(live_model, max_batch=4, eos_token_id=ENDS), ragged(5)

    def ids(seed):
        return [s.ids for s in engine.generate(prompts, Sampling(10), n=2, seed=seed)]

    assert ids(7) == ids(7) == ids((7,))
    assert ids(7) != ids(8)
    assert ids((7, 0)) != ids((7, 1))


def test_an_index_that_comes_twice_gets_streams_of_its_own():
    prompt = Prompt([5, 6], "")
    out = Engine(tiny_model("llama")).generate([prompt, prompt], Sampling(10), n=2, seed=0)
    assert len({tuple(s.ids) for s in out}) == 4


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_an_action_mask_is_another_models_nucleus_and_the_end_tokens(name):
    policy, other = tiny_model(name), tiny_model(name, seed=9)
    sampling = Sampling(10, temperature=1.3)
    samples = Engine(policy, max_batch=3, eos_token_id=ENDS).generate(
        ragged(7), replace(sampling, limit=ActionLimit(other, 0.6)), n=2, seed=1, record_support=True
    )
    for s in samples:
        sets = [allowed(row, top_p=0.6) | {*ENDS} for row in plain_logits(other, s.prompt.ids, s.ids)]
        logits = plain_logits(policy, s.prompt.ids, s.ids) / 1.3
        assert [allowed_ids(ids, logits.shape[1]) for ids in s.support] == sets
        assert s.logp == pytest.approx(oracle_logp(logits, s.ids, sets), abs=1e-5)


def test_half_precision_models_are_sampled_in_float32():
    model = tiny_model("llama", scale=1.0).to(torch.bfloat16)
    for s in Engine(model, max_batch=3).generate(ragged(6), Sampling(8), seed=1):
        logits = plain_logits(model, s.prompt.ids, s.ids).log_softmax(-1)
        assert s.logp == pytest.approx([row[v].item() for row, v in zip(logits, s.ids, strict=True)], abs=0.05)


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(live_model):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    samples = Engine(live_model.to("cuda"), max_batch=4).generate(ragged(9), Sampling(20), n=2, seed=1)
    assert_recorded(live_model.cpu(), samples, Sampling(20), atol=1e-3)
