"""A plan's numbers against arithmetic by hand, and against what models really hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_config, tiny_model, tiny_pair_config
from transformers import LlamaModel

from steersman.cli import main
from steersman.config.load import load_recipe
from steersman.model import Adapted, LoraConfig, adapted, shape_of
from steersman.plan.costs import weigh
from steersman.plan.devices import Cluster, Device, cluster
from steersman.plan.layouts import Layout, Role, Work, layouts
from steersman.plan.routes import routes
from steersman.plan.simulate import Lengths, decode, phases, simulate
from steersman.types import SteersmanError
from steersman.update.optimizer import OptimizerConfig
from steersman.verbs.on_policy_recipes import RECIPES as ON_POLICY
from steersman.verbs.plan import optimizer_bytes, work_of

B7 = 2 * 32_000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096) + 4096
"""Parameters of the 7B shape: two tables, 32 layers of attention, feed-forward and two norms, and the last norm."""
PPO = Work(samples=64, prompt=512, new=512, epochs=1, micro=16_384, weight=2, compute=2, checkpointing=True)


def ppo_roles():
    shape = shape_of("7b")
    return [Role("actor", shape, shape.parameters), Role("critic", shape, shape.parameters), Role("reference", shape)]


def test_the_7b_shape_has_7b_parameters():
    shape = shape_of("7b")
    assert shape.parameters == B7
    assert shape.tables == 2 * 32_000 * 4096
    assert shape.largest_layer == 4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096
    assert shape.cache(1000, 2) == 2 * 32 * 32 * 128 * 1000 * 2


def test_memory_by_hand():
    there = cluster("8xH100-80GB")
    found = weigh(Layout("sharded", 8), ppo_roles(), PPO, there).memory
    assert found["actor"] == B7 * (2 + 8) / 8
    assert found["critic"] == found["actor"]
    assert found["reference"] == B7 * 2 / 8
    layer = 4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096
    assert found["a layer put together, and the next"] == (2 * layer + 2 * 32_000 * 4096) * 2
    tokens = 8 * 1024  # a device's share of the 64 responses, in one micro-batch
    one = 2 * (4 + 2 * 2) * 4096 + 2 * (2 * 4096 + 2 * 4096) + 4 * 2 * 11_008
    last = 4 * 32_000 * 4096 + 2 * min(256 << 20, 4 * tokens * 32_000)
    kept = tokens * 4096 * 32 * 2 + one * tokens + max(4 * tokens * 11_008 * 2, last)
    assert found["gradients"] == B7 * 2 / 8 + max(B7 * 2 / 8 - kept, 0)
    sampling = B7 * 2 + 8 * 2 * 32 * 32 * 128 * 1024 * 2 + 2048 * 2 * 32 * 32 * 128 * 2  # and one prefill
    assert found["activations, or cache and whole weights while sampling"] == max(kept, sampling)


def test_seconds_by_hand():
    there = cluster("8xH100-80GB")
    found = weigh(Layout("sharded", 8), ppo_roles(), PPO, there).seconds
    rate = 989e12 * 0.4
    assert found["train"] == pytest.approx(8 * 2 * B7 * 64 * 1024 / 8 / rate)
    assert found["score"] == pytest.approx(2 * 2 * B7 * 64 * 1024 / 8 / rate)
    step = (B7 * 2 + 8 * 2 * 32 * 32 * 128 * (512 + 256) * 2) / (3.35e12 * 0.6)
    assert found["generate"] == pytest.approx(2 * B7 * 8 * 512 / rate + 512 * step)
    assert found["move weights"] == pytest.approx(B7 * 2 / 450e9)


def test_zero_lays_moments_then_gradients_then_weights_in_pieces():
    there, work = cluster("8xH100-80GB"), replace(PPO, weight=4, micro=1024, minibatches=1)
    named = {x.name: x for x in layouts(there, work)}
    names = ("replicas", "moments in pieces", "moments and gradients in pieces", "sharded", "sharded by DeepSpeed")
    found = [weigh(named[name], ppo_roles(), work, there).memory for name in names]
    assert [x["actor"] for x in found] == [
        B7 * (4 + 8),
        B7 * (4 + 12 / 8),
        B7 * (4 + 12 / 8),
        B7 * (4 + 8) / 8,
        B7 * (4 + 12) / 8,
    ]
    assert [x["gradients"] for x in found] == [2 * B7 * 4, 2 * B7 * 4, *[2 * B7 * 4 / 8] * 3]
    assert [x["reference"] for x in found] == [B7 * 4, B7 * 4, B7 * 4, B7 * 4 / 8, B7 * 4 / 8]


def test_zero_is_offered_for_what_it_trains():
    modes = {x.keys.partition("parallel.mode: ")[2] for x in layouts(cluster("8xH100-80GB"), PPO)}  # in bfloat16
    assert not modes & {"zero1", "zero2", "zero3"}


def test_one_device_is_too_small_for_7b_ppo_and_eight_are_not():
    one, eight = cluster("1xH100-80GB"), cluster("8xH100-80GB")
    assert not any(weigh(x, ppo_roles(), PPO, one).fits for x in layouts(one, PPO))
    fits = [x.name for x in layouts(eight, PPO) if weigh(x, ppo_roles(), PPO, eight).fits]
    assert "sharded" in fits
    assert "replicas" not in fits


def test_a_shape_is_what_a_model_has(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.largest_layer == max(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)


@pytest.mark.parametrize("words", ["8xH900-80GB", "H100", "0xH100-80GB", "8 H100-80GB"])
def test_unknown_devices_are_refused_by_name(words):
    with pytest.raises(SteersmanError, match="H100-80GB"):
        cluster(words)


def test_the_verb_prints_layouts_that_name_their_settings(capsys):
    assert (
        main(["plan", "recipes/scale/8-gpus.yaml", "--devices", "8xH100-80GB", "--nodes", "4", "--size", "7b"]) == 0
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "sharded in each node" in said
    assert "of weights + 6.738 G trained" in said


def test_the_optimizer_keeps_what_its_kind_says():
    half, whole = OptimizerConfig(), OptimizerConfig(kind="lion")
    assert optimizer_bytes(half, 2, adapters=False) == 12  # two moments and the copy, in float32
    assert optimizer_bytes(half, 4, adapters=False) == 8
    assert optimizer_bytes(whole, 4, adapters=False) == 4
    assert optimizer_bytes(half, 2, adapters=True) == 8  # adapters are in float32
    muon = OptimizerConfig(kind="muon")
    assert optimizer_bytes(muon, 4, adapters=False) == 4
    assert optimizer_bytes(muon, 4, adapters=True) == 8  # AdamW's


def test_quantised_and_shared_bases_count_once():
    shape = shape_of("8b")
    inside = 32 * shape.largest_layer
    h, i, k = 4096, 14_336, 1024
    added = 32 * 16 * (2 * (h + h) + 2 * (h + k) + 3 * (h + i))
    assert adapted("8b", LoraConfig(r=16)) == Adapted(added, 0)
    role = Role("actor", shape, trained=added, adapter_parameters=added, matrices=0.516)
    assert role.weights(2) == inside * 0.516 + (shape.parameters - inside) * 2 + added * 4
    assert Role("critic", shape, trained=added, adapter_parameters=added, owns_base=False).weights(2) == added * 4


def test_what_is_trained_whole_beside_adapters_is_a_copy_in_the_weights_precision():
    shape, adapters = shape_of("8b"), 10**6
    whole = 128_256 * 4096  # such as the output layer
    role = Role("actor", shape, trained=adapters + whole, adapter_parameters=adapters)
    work = replace(PPO, optimizer_bytes=12, adapter_optimizer_bytes=8)
    assert role.weights(2) == (shape.parameters + whole) * 2 + adapters * 4
    assert role.optimizer(work) == whole * 12 + adapters * 8
    assert role.gradients(work) == whole * 2 + adapters * 4


def test_the_cache_is_of_the_sequences_that_are_decoded_side_by_side():
    there, roles, one = cluster("1xH100-80GB"), ppo_roles()[:1], Layout("replicas", 1)
    work = replace(PPO, samples=40, micro=1024)
    key, token = "activations, or cache and whole weights while sampling", 2 * 32 * 32 * 128 * 2
    few, all_of_them = replace(work, max_batch=16), replace(work, max_batch=64)
    # where rows are given to others later, a quarter more; prefills of 2,048 tokens
    assert weigh(one, roles, few, there).memory[key] == (16 * (1024 + 256) + 2048) * token
    assert weigh(one, roles, all_of_them, there).memory[key] == (40 * 1024 + 2048) * token
    of_eight = replace(few, per_prompt=8)
    assert weigh(one, roles, of_eight, there).memory[key] == (16 * (1024 + 256) + 2 * 512) * token
    rate, bandwidth = 989e12 * 0.4, 3.35e12 * 0.6
    steps = sum((B7 * 2 + rows * 2 * 32 * 32 * 128 * (512 + 256) * 2) / bandwidth for rows in (16, 16, 8))
    found = weigh(one, roles, few, there).seconds["generate"]
    assert found == pytest.approx(2 * B7 * 40 * 512 / rate + 512 * steps)
    apart = Layout("apart", 1, 1)  # where vLLM samples
    two = cluster("2xH100-80GB")
    assert weigh(apart, roles, few, two).seconds["generate"] == weigh(apart, roles, work, two).seconds["generate"]


def test_a_device_of_the_simulation_decodes_no_more_side_by_side_than_the_engine():
    shape = shape_of("135m")
    role, share = Role("actor", shape), np.full(8, 4)
    work = Work(8, 0, 4, 1, 1024, compute=2)
    there = Cluster(Device("fast", 80e9, 1e30, 1e12, 1e12), 1)
    weights, cache = shape.parameters * 2, shape.cache(2, 2)
    for rows in (2, 8):
        found = decode(share, there, role, replace(work, max_batch=rows))
        assert found == pytest.approx(8 // rows * 4 * (weights + rows * cache) / (1e12 * 0.6))


@pytest.mark.parametrize(("engine", "rows"), [("inside", 16), ("process", 16), ("vllm", None)])
def test_the_recipes_batch_is_the_plans_unless_vllm_samples(engine, rows):
    words = ["--rollout.max_batch", "16", "--rollout.engine", engine]
    asked = load_recipe(ON_POLICY["ppo"], Path("recipes/scale/1-gpu.yaml"), words)
    assert work_of(asked, 512).max_batch == rows


def test_activations_are_what_a_layer_keeps():
    """Counted on the saved tensors of transformers' Llama, whose attention repeats keys and values where a mask is
    given; here both have four heads."""
    from steersman.model.shape import shape_from

    def kept_by(layers: int) -> int:
        config = tiny_config("llama")
        config.num_hidden_layers, config.num_key_value_heads = layers, 4
        model = LlamaModel(config)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, torch.Tensor] = {}

        def pack(x):
            if x.untyped_storage().data_ptr() not in own:
                seen[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(input_ids=torch.ones(2, 64, dtype=torch.long), use_cache=False)
        return sum(x.untyped_storage().nbytes() for x in seen.values())

    config = tiny_config("llama")
    config.num_key_value_heads = 4
    shape = shape_from(config, "tiny")
    found = (kept_by(3) - kept_by(2)) / 128
    assert found == pytest.approx(shape.activations(4), rel=0.05)


def test_a_layer_of_a_pair_caches_the_same_however_deep_its_stacks_are():
    from steersman.model.shape import shape_from

    config = tiny_pair_config("bart")
    config.encoder_layers, config.decoder_layers = 2, 5
    shape = shape_from(config, "pair")
    assert (shape.layers, shape.cached) == (2, 2 * config.d_model)


def test_decoding_side_by_side_takes_the_places_that_become_free():
    """Two places, responses of 4, 1 and 2 tokens: 1 and 2 share a place, so three steps of two rows, one of one."""
    shape = shape_of("135m")
    role, work = Role("actor", shape), Work(3, 0, 4, 1, 1024, compute=2)
    weights, cache = shape.parameters * 2, shape.cache(4, 2)
    device = Device("small", (weights + 2.5 * cache) / 0.9, 1e30, 1e12, 1e12)
    found = decode(np.array([4, 1, 2]), Cluster(device, 1), role, work)
    mean = shape.cache(7 / 3 / 2, 2)
    assert found == pytest.approx((3 * (weights + 2 * mean) + weights + mean) / (1e12 * 0.6))


def test_sampling_ahead_hides_the_longest_response():
    """Two devices, lengths all alike: alternating takes both phases, one ahead the longer of the two."""
    shape = shape_of("1b")
    roles, work = [Role("actor", shape, shape.parameters)], Work(64, 16, 128, 1, 8192, compute=2)
    there, alike = cluster("2xH100-80GB"), Lengths(128, 128, spread=1e-6)
    waits, ahead, far = (simulate(there, roles, work, alike, apart=1, ahead=k) for k in (0, 1, 3))
    sampling = decode(np.full(64, 128), there, roles[0], work)
    train, move = phases(there, roles, work, alike, 1)
    assert waits.seconds == pytest.approx(sampling + train + move, rel=0.02)
    assert ahead.seconds == pytest.approx(max(sampling, train), rel=0.05)
    assert far.seconds <= ahead.seconds * 1.001
    assert waits.trainers_wait > 0.1


def test_the_simulation_prints_who_waits(capsys):
    words = ["plan", "recipes/scale/8-gpus.yaml", "--devices", "4xH100-80GB", "--size", "1b", "--simulate", "true"]
    assert main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 apart," in said
    assert "ahead" in said


def test_models_away_between_phases_leave_the_largest_phase():
    """Only the model that learns is there, with its optimizer; the bytes that move are counted by hand."""
    there, roles = cluster("8xH100-80GB"), ppo_roles()
    found = weigh(Layout("away", 8, offloaded=True), roles, PPO, there)
    together = weigh(Layout("sharded", 8), roles, PPO, there)
    learner = B7 * (2 + 8)
    assert found.memory["actor"] == learner / 8
    assert "reference" not in found.memory
    assert "critic" not in found.memory
    assert found.peak < together.peak
    moved = 2 * (learner + learner) + B7 * 2
    assert found.seconds["move models"] == pytest.approx(moved / 8 / 50e9)
    assert f"{moved / 1e9:.1f} GB / 8 devices" in routes(found, roles, PPO, there)[-1]


def test_a_device_that_samples_must_hold_the_whole_actor():
    there = cluster("8xH100-80GB")
    big = [Role("actor", shape_of("70b"), 10)]
    found = weigh(Layout("apart", 7, 1), big, PPO, there)
    assert found.others["a device that samples, at least"] > 140e9
    assert not found.fits


def test_scorers_hold_what_does_not_learn():
    there = cluster("8xH100-80GB")
    whole = weigh(Layout("scoring apart", 6, scorers=2), ppo_roles(), PPO, there)
    assert whole.others["a device that scores"] == B7 * 2 + 1e9  # all of the reference
    found = weigh(Layout("scoring apart", 6, scorers=2, planned=True), ppo_roles(), PPO, there)
    assert "reference" not in found.memory
    assert found.others["a device that scores"] == B7 * 2 / 2 + 1e9
    rate = 989e12 * 0.4
    assert found.seconds["score"] == pytest.approx(2 * B7 * 64 * 1024 * (1 / 6 + 1 / 2) / rate)  # critic, reference


def test_devices_apart_wait_for_each_other_unless_sampling_is_ahead():
    there, layout = cluster("8xH100-80GB"), Layout("apart", 6, 2)
    waits, ahead = (weigh(layout, ppo_roles(), replace(PPO, ahead=k), there) for k in (0, 1))
    assert waits.iteration == sum(waits.seconds.values())
    rest = sum(s for name, s in ahead.seconds.items() if name != "generate")
    assert ahead.iteration == max(ahead.seconds["generate"], rest)


def test_what_can_not_be_run_yet_says_so(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    assert main(["plan", "recipes/scale/8-gpus.yaml", "--devices", "8xH100-80GB", "--size", "7b"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "planned only" in said
    assert "put together on each device from 8 pieces" in said
