"""A plan's numbers against arithmetic by hand, and against what models really hold."""

from __future__ import annotations

import pytest
from tiny_models import tiny_model

from steersman.cli import main
from steersman.model import shape_of
from steersman.plan.devices import cluster
from steersman.plan.layouts import Layout, Role, Work, layouts, weigh
from steersman.types import SteersmanError

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
    assert found["actor"] == (B7 + 3 * B7) * 2 / 8
    assert found["critic"] == found["actor"]
    assert found["reference"] == B7 * 2 / 8
    layer = 4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096
    assert found["a layer put together, and the next"] == (2 * layer + 2 * 32_000 * 4096) * 2
    kept = 16_384 * 4096 * 32 * 2 + 34 * 16_384 * 4096
    sampling = B7 * 2 + 8 * 2 * 32 * 32 * 128 * 1024 * 2
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
    assert "6.738 G weights" in said
