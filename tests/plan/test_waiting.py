"""Memory of models that wait in the CPU's memory until they are read: preflight and plan, against sums by hand."""

from __future__ import annotations

import torch
from letter_models import save_mini
from tiny_models import tiny_model

from steersman.model import load_policy, shape_of
from steersman.plan.costs import HOST_BANDWIDTH, weigh
from steersman.plan.devices import cluster
from steersman.plan.layouts import Layout, Role, Work
from steersman.plan.memory import CONTEXT, Load, Model, foresee
from steersman.plan.routes import routes
from steersman.update.optimizer import OptimizerConfig


def bytes_of(model) -> int:
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))


def test_preflight_counts_what_waits_in_its_own_phase_only(tmp_path):
    actor, copy, small = load_policy(str(save_mini(tmp_path / "model"))), tiny_model("llama"), tiny_model("llama")
    models = [
        Model("actor", actor.model, "", actor, OptimizerConfig()),
        Model("reference", copy, "", coming=bytes_of(copy)),
        Model("reward", small, "", coming=bytes_of(small)),
    ]
    phases = {phase.name: phase.shares for phase in foresee(torch.device("cuda"), models, Load(64, 16))}
    assert phases["update"]["weights"] == bytes_of(actor.model)
    assert phases["score"]["weights"] == bytes_of(actor.model)
    assert phases["score"]["one model that waited"] == max(bytes_of(copy), bytes_of(small))
    assert phases["score"]["process"] == CONTEXT
    models = [models[0], Model("reference", copy, ""), Model("reward", small, "")]
    here = {phase.name: phase.shares for phase in foresee(torch.device("cpu"), models, Load(64, 16))}
    assert "score" not in here
    assert here["update"]["weights"] == sum(map(bytes_of, (actor.model, copy, small)))


def test_plan_counts_what_waits_when_it_is_read_and_its_way():
    size, there = shape_of("7b"), cluster("1xH100-80GB")
    work = Work(samples=4, prompt=64, new=64, epochs=1, micro=512, weight=2, compute=2)
    actor, one = Role("actor", size, trained=10**6, adapter_parameters=10**6), Layout("replicas", 1)
    stays = [actor, Role("reference", size), Role("reward", size)]
    waits = [actor, Role("reference", size, offloaded=True), Role("reward", size, offloaded=True)]
    before, after = weigh(one, stays, work, there), weigh(one, waits, work, there)
    assert "reference" not in after.memory
    whole = 2.0 * size.parameters
    label = "activations, or cache and whole weights while sampling"
    assert before.memory[label] < whole == after.memory[label]
    assert before.peak - after.peak == 2 * whole - (whole - before.memory[label])
    assert after.seconds["move models"] == 2 * whole / HOST_BANDWIDTH
    assert "move models" not in before.seconds
    assert "from the node's memory" in routes(after, waits, work, there)[0]
    sharded = Layout("sharded", 8)
    eight = cluster("8xH100-80GB")
    assert weigh(sharded, waits, work, eight).memory == weigh(sharded, stays, work, eight).memory
