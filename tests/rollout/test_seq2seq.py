"""What is particular to sampling from an encoder-decoder: sources read once, starts, texts, refusals."""

from __future__ import annotations

import pytest
import torch
from rollout_oracle import ENDS, character_tokenizer, plain_logits, ragged
from tiny_models import PAIR_FAMILIES, tiny_model
from tokenizers import processors

from steersman.model import Policy
from steersman.model.encoder_decoder import decoder_start
from steersman.rollout import Engine, Sampling
from steersman.train.experience import behaviour_logp, tokens_of
from steersman.types import Prompt, SteersmanError


@pytest.fixture(params=PAIR_FAMILIES)
def pair(request):
    return tiny_model(request.param)


def ids_of(samples):
    return [s.ids for s in samples]


def test_a_source_is_encoded_once_and_only_live_rows_are_decoded(pair):
    engine = Engine(pair, max_batch=5, prefill_tokens=30, eos_token_id=ENDS)
    read, fed = [], []
    pair.get_encoder().register_forward_hook(
        lambda _, args, kwargs, out: read.append(kwargs["attention_mask"].sum(-1).tolist()), with_kwargs=True
    )
    pair.get_decoder().register_forward_hook(
        lambda _, args, kwargs, out: fed.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    prompts = ragged(9)
    samples = engine.generate(prompts, Sampling(20), n=7, seed=0)
    assert sorted(n for lengths in read for n in lengths) == sorted(len(p.ids) for p in prompts)
    assert max(fed) == 5
    assert sum(fed) == len(prompts) + sum(len(s.ids) - 1 for s in samples)


def test_rows_of_very_different_sources_share_a_batch(pair):
    prompts = [Prompt([5], "", index=0), Prompt([7, 2, 0, 2] * 12, "", index=1), Prompt([9] * 3, "", index=2)]
    together = Engine(pair, max_batch=2, eos_token_id=ENDS).generate(prompts, Sampling(15), n=4, seed=1)
    for i, prompt in enumerate(prompts):
        alone = Engine(pair, eos_token_id=ENDS).generate([prompt], Sampling(15), n=4, seed=1)
        assert ids_of(alone) == ids_of(together[4 * i : 4 * i + 4])


def test_the_cache_has_memory_during_a_call_only(pair):
    engine = Engine(pair, max_batch=4)
    first = ids_of(engine.generate(ragged(9), Sampling(20), seed=0))
    wider = [*ragged(9), Prompt([4] * 40, "", index=20)]
    assert ids_of(engine.generate(wider, Sampling(20), seed=0))[:9] == first
    live = engine.decoder.live
    assert not live.buffers
    assert all(x is None for layer in live.self_attention.live_layers for x in (layer.keys, layer.live_keys))
    assert all(layer.keys is None for layer in live.cross_attention)
    assert ids_of(engine.generate(ragged(9), Sampling(20), seed=0)) == first


def test_weights_changed_in_place_are_seen(pair):
    engine, prompts = Engine(pair), ragged(5)
    before = ids_of(engine.generate(prompts, Sampling(10), seed=0))
    with torch.no_grad():
        for p in pair.get_encoder().parameters():
            p.mul_(0.7)
    after = ids_of(engine.generate(prompts, Sampling(10), seed=0))
    assert after != before
    assert after == ids_of(Engine(pair).generate(prompts, Sampling(10), seed=0))


def test_a_text_is_the_responses_own(pair):
    engine = Engine(pair, character_tokenizer(), eos_token_id=())
    samples = engine.generate(ragged(6), Sampling(12), seed=0)
    for s in samples:
        assert s.text == engine.tokenizer.decode(s.ids, skip_special_tokens=True)
    stop = samples[0].text[3:5]
    (stopped,) = engine.generate(ragged(6)[:1], Sampling(12, stop=(stop,)), seed=0)
    assert stopped.finish == "stop"
    assert stopped.text == samples[0].text.split(stop)[0]


def test_a_pad_that_starts_the_decoder_and_ends_texts_is_harmless():
    model = tiny_model("t5")
    model.config.pad_token_id = model.config.eos_token_id = model.config.decoder_start_token_id = 2
    model.generation_config.decoder_start_token_id = 2
    prompts = [Prompt([2, 5, 2], "", index=0), Prompt([2], "", index=1), Prompt([2] * 9, "", index=2)]
    samples = Engine(model, eos_token_id=[2, 11]).generate(prompts, Sampling(12), n=3, seed=0)
    tokens = tokens_of(samples)
    logp = Policy(model, None).logp(tokens).logp
    difference = (logp - behaviour_logp(samples, tokens.mask.shape[1]))[tokens.mask]
    assert difference.abs().max() < 5e-5


def test_what_always_comes_first_is_read_and_not_sampled():
    model = tiny_model("bart")
    tokenizer = character_tokenizer()
    assert decoder_start(model, tokenizer) == (2,)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert decoder_start(model, tokenizer) == (2, 1)  # BART's tokenizer opens every text with its BOS
    model.generation_config.forced_bos_token_id = 7
    assert decoder_start(model) == decoder_start(model, tokenizer) == (2, 7)
    samples = Engine(model, tokenizer, eos_token_id=ENDS).generate(ragged(5), Sampling(8), n=2, seed=0)
    tokens = tokens_of(samples)
    logp = Policy(model, tokenizer).logp(tokens).logp
    for row, s in zip(logp, samples, strict=True):
        after = plain_logits(model, s.prompt.ids, [7, *s.ids]).log_softmax(-1)[1:]
        expected = after[range(len(s.ids)), s.ids].tolist()
        assert s.logp == pytest.approx(expected, abs=5e-5)
        assert row[: len(s.ids)].tolist() == pytest.approx(expected, abs=5e-5)


def test_a_family_whose_rows_can_not_stand_apart_is_refused():
    model = tiny_model("bart")
    table = model.get_decoder().embed_positions
    kind = type(table)

    class Same(kind):
        def forward(self, input_ids, past_key_values_length=0, position_ids=None):
            return super().forward(input_ids, past_key_values_length).expand(len(input_ids), -1, -1)

    table.__class__ = Same
    with pytest.raises(SteersmanError, match="sequences of different ages side by side"):
        Engine(model)


def test_a_family_whose_modules_are_called_in_other_ways_is_refused_by_name():
    from transformers import AutoModelForSeq2SeqLM, M2M100Config

    small = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = M2M100Config(vocab_size=30, d_model=16, encoder_ffn_dim=8, decoder_ffn_dim=8, **small)
    with pytest.raises(SteersmanError, match=r"M2M100ForConditionalGeneration.*not supported.*T5Gemma, BART"):
        Engine(AutoModelForSeq2SeqLM.from_config(config))


@pytest.mark.parametrize("family", PAIR_FAMILIES)
def test_half_precision_models_are_sampled_in_float32(family):
    model = tiny_model(family, scale=1.0).to(torch.bfloat16)
    for s in Engine(model, max_batch=3).generate(ragged(6), Sampling(8), seed=1):
        logits = plain_logits(model, s.prompt.ids, s.ids).log_softmax(-1)
        assert s.logp == pytest.approx([row[v].item() for row, v in zip(logits, s.ids, strict=True)], abs=0.08)


def test_weights_that_are_not_finite_leave_no_trace(pair):
    engine, prompts = Engine(pair, max_batch=4), ragged(9)
    good = ids_of(engine.generate(prompts, Sampling(12), seed=0))
    weight = pair.get_output_embeddings().weight.data
    kept = weight.clone()
    weight[0, 0] = torch.nan
    with pytest.raises(SteersmanError, match="not finite"):
        engine.generate(prompts, Sampling(12), seed=0)
    weight.copy_(kept)
    assert ids_of(engine.generate(prompts, Sampling(12), seed=0)) == good
