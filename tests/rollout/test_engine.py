"""How responses end, what the engine leaves alone, how much it computes, and what it refuses."""

from __future__ import annotations

import weakref

import pytest
import torch
from rollout_oracle import character_tokenizer, ragged
from tiny_models import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.rollout import Engine, Sampling, kv_cache_bytes
from steersman.rollout.decoder import Decoder
from steersman.rollout.engine import end_ids
from steersman.rollout.sampling import ActionLimit
from steersman.rollout.text import Texts
from steersman.types import Prompt, SteersmanError


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", scale=2.0)


def ids_of(samples):
    return [s.ids for s in samples]


# -- ends ------------------------------------------------------------------------------------------------------


def test_ends_are_named_and_the_end_token_is_kept(model):
    samples = Engine(model, character_tokenizer(), max_batch=8).generate(ragged(20), Sampling(30), n=3, seed=0)
    assert {s.finish for s in samples} == {"eos", "length"}
    for s in samples:
        assert (s.ids[-1] == 2) == (s.finish == "eos") == s.terminated
        assert 2 not in s.ids[:-1]
        assert s.finish == "eos" or len(s.ids) == 30
        assert len(s.ids) == len(s.logp)


def test_end_ids_override_and_lists(model):
    free = Engine(model, eos_token_id=()).generate(ragged(9), Sampling(20), seed=0)
    assert {s.finish for s in free} == {"length"}
    ends, tokenizer = {s.ids[7] for s in free}, character_tokenizer()
    for s, other in zip(
        Engine(model, tokenizer, eos_token_id=list(ends)).generate(ragged(9), Sampling(20), seed=0), free, strict=True
    ):
        first = next(t for t, token in enumerate(other.ids) if token in ends)
        assert s.finish == "eos"
        assert s.ids == other.ids[: first + 1]
        assert s.text == tokenizer.decode(other.ids[:first], skip_special_tokens=True)


def test_a_templates_ends_stand_beside_the_models_own(model):
    tokenizer = character_tokenizer()
    assert end_ids(model, tokenizer) == (2,)
    assert end_ids(model, tokenizer, also=[7, 2]) == (2, 7)
    assert end_ids(model, tokenizer, [5], also=[7]) == (5,)


@pytest.mark.parametrize("given", ["x", [2, "x"], 2.0, {"a": 1}])
def test_ends_that_are_no_ids_are_named(model, given, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", given)
    with pytest.raises(SteersmanError, match=r"eos_token_id is .*generation_config\.json"):
        end_ids(model, character_tokenizer(), also=[7])


def test_one_token_responses(model):
    samples = Engine(model, max_batch=2).generate(ragged(5), Sampling(1), n=3, seed=0)
    assert [len(s.ids) for s in samples] == [1] * 15


@pytest.mark.parametrize("minimum", [0, 9])
def test_stop_strings_end_where_their_last_token_completes_them(model, minimum):
    tokenizer = character_tokenizer()
    engine = Engine(model, tokenizer, max_batch=4, eos_token_id=())
    free = engine.generate(ragged(12), Sampling(30), n=2, seed=3)

    # strings that occur: across tokens, inside one, and starting inside a two-character token
    def text(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    texts = [text(s.ids) for s in free]
    stop = (texts[0][4:7], texts[5][2:4], "b" + texts[7][3], "\n\n")
    stopped = engine.generate(ragged(12), Sampling(30, stop=stop, min_new_tokens=minimum), n=2, seed=3)
    for s, other in zip(stopped, free, strict=True):
        ends = []  # (tokens, cut) by decoding every prefix
        for count in range(max(minimum, 1), len(other.ids) + 1):
            now, before = text(other.ids[:count]), text(other.ids[: count - 1])
            hits = [at for x in stop for at in range(len(now)) if now.startswith(x, at) and at + len(x) > len(before)]
            if hits:
                ends.append((count, min(hits)))
        if ends:
            count, cut = ends[0]
            assert (s.finish, s.ids) == ("stop", other.ids[:count])
            assert s.text == text(other.ids)[:cut]
        else:
            assert (s.finish, s.ids, s.text) == ("length", other.ids, text(other.ids))
    assert sum(s.finish == "stop" for s in stopped) > 5


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("style", ["llama", "t5"])
def test_a_call_may_be_cut_at_any_step_and_the_next_one_is_whole(style, before):
    """At the first one no row has been let in, and a fresh engine has no cache yet."""
    engine = Engine(tiny_model(style, scale=2.0), max_batch=2, eos_token_id=())
    asked = [iter(range(before))]
    cut = engine.generate(ragged(5), Sampling(8), n=2, seed=1, cut=lambda: next(asked[0], None) is None)
    assert [s.finish for s in cut] == ["length"] * 10
    whole = engine.generate(ragged(5), Sampling(8), n=2, seed=1)
    assert ids_of(whole) == ids_of(
        Engine(engine.model, max_batch=2, eos_token_id=()).generate(ragged(5), Sampling(8), n=2, seed=1)
    )
    for part, s in zip(cut, whole, strict=True):
        assert part.ids == s.ids[: len(part.ids)]
        assert len(part.logp) == len(part.ids) < 8
    assert sum(bool(s.ids) for s in cut) == (2 if before else 0)


def test_stop_strings_that_are_special_tokens(model):
    tokenizer = character_tokenizer()
    engine = Engine(model, tokenizer, eos_token_id=())
    samples = engine.generate(ragged(30), Sampling(40, stop=("</s>",)), seed=0)
    assert any(s.finish == "stop" for s in samples)
    assert all((s.ids[-1] == 2) == (s.finish == "stop") and "</s>" not in s.text for s in samples)


def test_pad_that_is_eos_is_harmless(model):
    prompts = [Prompt([2, 5, 2, 7, 2], "", index=0), Prompt([2], "", index=1), Prompt([9] * 12, "", index=2)]
    alone = [Engine(model).generate([p], Sampling(12), seed=0)[0].ids for p in prompts]
    assert ids_of(Engine(model, character_tokenizer()).generate(prompts, Sampling(12), seed=0)) == alone


def test_text_is_what_the_response_adds_to_the_prompt(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "stories260k" / "hf")
    texts = Texts(tokenizer)
    ids = tokenizer("Once upon a time there was a café and a dog.")["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    for cut in range(1, len(ids)):
        if "�" not in tokenizer.decode(ids[:cut]):
            assert (
                tokenizer.decode(ids[:cut], skip_special_tokens=True) + texts.response(ids[:cut], ids[cut:]) == whole
            )
    assert texts.response(ids[:3], ids[3:5]).startswith(" ")


# -- what it leaves alone, and what it sees -------------------------------------------------------------------


def test_weights_changed_in_place_are_seen():
    model = tiny_model("llama")
    engine, prompts = Engine(model), ragged(5)
    before = ids_of(engine.generate(prompts, Sampling(10), seed=0))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.8)
    after = ids_of(engine.generate(prompts, Sampling(10), seed=0))
    assert after != before
    assert after == ids_of(Engine(model).generate(prompts, Sampling(10), seed=0))


def test_training_mode_comes_back_and_dropout_is_off_meanwhile():
    config = tiny_config("gpt2")
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.5
    model = AutoModelForCausalLM.from_config(config)
    quiet = ids_of(Engine(model.eval()).generate(ragged(5), Sampling(10), seed=0))
    model.train()
    model.transformer.h[1].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    assert ids_of(Engine(model).generate(ragged(5), Sampling(10), seed=0)) == quiet
    assert {name: module.training for name, module in model.named_modules()} == flags
    model(torch.tensor([[3, 4, 5]])).logits.sum().backward()  # nothing of inference mode is left in the module


def test_the_cache_has_memory_during_a_call_only(model):
    """An update comes next, which needs it."""
    engine = Engine(model, max_batch=4)
    layers = engine.decoder.live.live_layers
    first = ids_of(engine.generate(ragged(9), Sampling(20), seed=0))
    longer = engine.generate(ragged(9), Sampling(60), seed=0)
    assert [s.ids[:20] for s in longer] == first
    assert all(x is None for layer in layers for x in (layer.keys, layer.values, layer.live_keys, layer.live_values))
    assert engine.decoder.live.mask is None
    with pytest.raises(KeyboardInterrupt):
        engine.generate(ragged(9), Sampling(20), progress=interrupted)
    assert all(layer.keys is None for layer in layers)
    assert ids_of(engine.generate(ragged(9), Sampling(20), seed=0)) == first


def interrupted(done, total, tokens):
    raise KeyboardInterrupt


def test_bytes_of_the_cache_are_counted(model):
    held, columns = held_while_it_samples(Engine(model, max_batch=4))
    assert held == kv_cache_bytes(model.config, 4, columns, torch.float32)


def held_while_it_samples(engine):
    """Bytes of the cache's keys and values, and its columns."""
    seen = set()

    def look(*_):
        buffers = [x for layer in engine.decoder.live.live_layers for x in (layer.keys, layer.values)]
        seen.add((sum(x.numel() * x.element_size() for x in buffers), buffers[0].shape[2]))

    engine.generate(ragged(9), Sampling(20), seed=0, progress=look)
    (found,) = seen
    return found


def test_bytes_are_counted_where_layers_differ_and_some_keep_no_keys_of_their_own():
    """Gemma 4's full layers have wider heads than its sliding ones; its last ones may read the keys of others."""
    from transformers import Gemma4TextConfig

    config = Gemma4TextConfig(
        vocab_size=97, vocab_size_per_layer_input=97, hidden_size=32, hidden_size_per_layer_input=8,
        intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        layer_types=["sliding_attention", "full_attention", "full_attention"], sliding_window=8,
        per_layer_config={1: {"head_dim": 16}, 2: {"head_dim": 16}}, num_kv_shared_layers=1,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    engine = Engine(AutoModelForCausalLM.from_config(config).eval(), max_batch=4)
    assert len(engine.decoder.live.live_layers) == 2
    held, columns = held_while_it_samples(engine)
    assert held == kv_cache_bytes(config, 4, columns, torch.float32) == 2 * (2 * 8 + 2 * 16) * 4 * columns * 4


# -- how much it computes -------------------------------------------------------------------------------------


def test_one_prefill_at_a_time_waits_for_rows(model, monkeypatch):
    """All rows are free at first: prefills of all of them together would be as large as the live cache."""
    alive, most = weakref.WeakSet(), []
    prefill = Decoder.prefill

    def watched(self, prompts):
        most.append(len(alive))
        cache, logits = prefill(self, prompts)
        alive.add(cache)
        return cache, logits

    monkeypatch.setattr(Decoder, "prefill", watched)
    engine = Engine(model, max_batch=8, prefill_tokens=20)
    samples = engine.generate(ragged(9), Sampling(20, min_new_tokens=20), n=2, seed=0)
    assert len(most) > 4
    assert max(most) <= 1
    monkeypatch.undo()
    assert ids_of(samples) == ids_of(Engine(model).generate(ragged(9), Sampling(20, min_new_tokens=20), n=2, seed=0))


def test_prompts_are_read_once_and_only_live_rows_are_computed(model, monkeypatch):
    read, fed = [], []
    prefill, step = Decoder.prefill, Decoder.step

    monkeypatch.setattr(Decoder, "prefill", lambda self, p: (read.extend(p), prefill(self, p))[1])
    monkeypatch.setattr(Decoder, "step", lambda self, ids, *a: (fed.append(len(ids)), step(self, ids, *a))[1])
    prompts, calls = ragged(9), []
    samples = Engine(model, max_batch=5, prefill_tokens=30).generate(
        prompts, Sampling(20), n=7, seed=0, progress=lambda *a: calls.append(a)
    )
    assert sorted(read) == sorted(p.ids for p in prompts)
    tokens = sum(len(s.ids) for s in samples)
    assert sum(fed) == tokens - len(samples)  # each response's first token came from the prefill
    assert max(fed) == 5
    assert sum(fed) / len(fed) > 4.5, "free rows are filled while anything waits"
    assert calls[-1] == (63, 63, tokens)
    assert calls == sorted(calls)


def test_a_prefill_reads_no_more_than_its_budget(model, monkeypatch):
    shapes = []
    prefill = Decoder.prefill
    monkeypatch.setattr(
        Decoder, "prefill", lambda self, p: (shapes.append((len(p), max(map(len, p)))), prefill(self, p))[1]
    )
    Engine(model, prefill_tokens=40).generate([*ragged(9, longest=50), *ragged(9, longest=10)], Sampling(2), seed=0)
    assert all(rows == 1 or rows * width <= 40 for rows, width in shapes)
    assert max(rows for rows, _ in shapes) > 2
    assert (1, 50) in shapes, "a prompt above the budget is read alone"


# -- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("temperature", 1e-39),
        ("top_k", -1), ("top_p", 0.0),
        ("top_p", 1.5), ("min_p", 2.0), ("min_new_tokens", 11), ("stop", ("",)), ("stop", "text"),
    ],
)  # fmt: skip
def test_sampling_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(SteersmanError, match=rf"sampling\.{field}"):
        Sampling(**{"max_new_tokens": 10, field: value})


@pytest.mark.parametrize(
    ("ids", "words"),
    [([], "prompt 7 is empty"), ([5] * 120, "prompt 7 has 120 tokens.*128"), ([5, 97], "prompt 7.*vocabulary of 97")],
)
def test_prompts_that_can_not_work_are_refused_before_anything_runs(model, ids, words):
    calls = []
    with pytest.raises(SteersmanError, match=words):
        Engine(model).generate(
            [*ragged(3), Prompt(ids, "", index=7)], Sampling(9), progress=lambda *a: calls.append(a)
        )
    assert not calls


def test_a_prompt_that_just_fits_works(model):
    assert Engine(model, eos_token_id=()).generate([Prompt([5] * 119, "")], Sampling(9))[0].finish == "length"


def test_other_refusals(model):
    with pytest.raises(SteersmanError, match="tokenizer"):
        Engine(model).generate(ragged(2), Sampling(5, stop=("x",)))
    with pytest.raises(SteersmanError, match="at least 1"):
        Engine(model).generate(ragged(2), Sampling(5), n=0)
    with pytest.raises(SteersmanError, match="masking policy has 50 tokens"):
        Engine(model).generate(ragged(2), Sampling(5, limit=ActionLimit(tiny_model("llama", vocab=50), 0.9)))
    assert Engine(model).generate([], Sampling(5)) == []


def test_weights_that_are_not_finite_are_named_and_leave_no_trace():
    model = tiny_model("llama")
    engine, prompts = Engine(model, max_batch=4), ragged(9)
    longer = [Prompt([5] * 60, "", index=20), *prompts]  # what gets spoilt lies under the shorter ones' masks
    good = ids_of(engine.generate(longer, Sampling(12), seed=0))
    weight = model.model.layers[0].self_attn.v_proj.weight.data
    kept = weight.clone()
    weight[0, 0] = torch.nan
    with pytest.raises(SteersmanError, match="not finite"):
        engine.generate(prompts, Sampling(12), seed=0)
    weight.copy_(kept)

    def spoil(done, total, tokens):  # while rows are live, so that the cache is spoilt too
        weight[0, 0] = torch.nan

    with pytest.raises(SteersmanError, match="not finite"):
        engine.generate(prompts, Sampling(12), seed=0, progress=spoil)
    weight.copy_(kept)
    assert ids_of(engine.generate(longer, Sampling(12), seed=0)) == good
