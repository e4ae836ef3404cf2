"""The end of every offline verb on a policy: the preflight's table of models, the training, the model on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from steersman.evaluation import Evaluation
from steersman.model import Policy, bytes_to_come, keep_away
from steersman.plan.memory import Model, SamplingLoad, announce
from steersman.run.preflight import Preflight
from steersman.setup.models import policy_from, rate_text, save_model
from steersman.setup.reference import Reference, reference_from
from steersman.train.moving import copy_to_move, moving
from steersman.train.offline import Offline, restore_best
from steersman.train.routers import RouterBalance
from steersman.train.session import Session


def policy_to_train(recipe: Any, device: torch.device) -> Policy:
    """The policy of an offline recipe, as its `model` and `train` sections ask for it."""
    watched = recipe.train.router_loss is not None
    return policy_from(recipe.model, recipe.run, device, pack=recipe.train.pack or None, routers=watched)


def carry_out(
    pre: Preflight,
    session: Session,
    state: Offline,
    recipe: Any,
    policy: Policy,
    longest: int,
    frozen: Mapping[str, Policy] = MappingProxyType({}),
    sampled: SamplingLoad | None = None,
) -> dict[str, Any]:
    """Shows what will be trained, trains it, and leaves the model in `<run folder>/model`; returns the summary.

    What the section `evaluation` asks for is measured at every look. `longest` is the longest sequence (tokens),
    `frozen` are the policies of `frozen_models`, `sampled` what is sampled now and then. Raises SteersmanError where
    the models will not fit.
    """
    evaluation = Evaluation(policy, recipe.evaluation, session)
    state.beside, sampled = evaluation.look, evaluation.larger(sampled)
    if recipe.train.router_loss is not None:
        assert policy.routers is not None
        state.balance = RouterBalance(policy.routers, recipe.train.router_loss)
    models = [Model("policy", policy.model, recipe.model.path, policy, recipe.optimizer)]
    for name, other in frozen.items():
        models.append(Model(name, other.model, other.model.name_or_path, coming=bytes_to_come(other)))
    beside = {} if state.moving is None else state.moving.beside()
    models += [Model(f"reference's {name}", kept, "of the policy's weights") for name, kept in beside.items()]
    pre.fact("optimizer.lr", rate_text(policy, recipe.optimizer.lr))
    announce(pre, session.device, models, state.load(longest), sampled)
    for note in policy.notes:
        pre.fact("model", note)
    pre.check()
    pre.show()
    if not train_and_restore(session, state, recipe.train.keep):
        return session.summary({})
    save_model(policy, recipe.model, session.path / "model")
    measured = evaluation.of_saved(again=recipe.train.keep == "best")
    return session.summary({"model": str(session.path / "model"), **state.objective.evaluate(), **measured})


def reference_of(recipe: Any, policy: Policy) -> Reference:
    """The reference of an offline recipe: a frozen copy of the policy where it is to move."""
    if recipe.moving_reference is not None:
        return copy_to_move(policy, recipe.model, recipe.run)
    return reference_from(recipe.reference, recipe.model, recipe.run, policy)


def read_or_follow(
    pre: Preflight,
    state: Offline,
    recipe: Any,
    reference: Reference | None,
    *,
    read: Callable[[Sequence[int]], None],
) -> None:
    """Has `read` read a reference that stays, once, before training, and lets one that moves follow the policy.
    Refuses one that would never move."""
    section = recipe.moving_reference
    if section is None:
        state.prepare = read
        return
    assert reference is not None
    assert reference.separate is not None
    pre.fact("reference", f"{section.describe()}; what the loss leads to is counted from where it then is")
    if section.first > state.total:
        pre.refuse(
            f"moving_reference: the reference moves for the first time after update {section.first:,}, and the run "
            f"has {state.total:,}; give a smaller moving_reference.every, such as {max(1, state.total // 8):,}"
        )
    policy: Any = state.objective.module
    state.moving = moving(section, reference.separate, policy)


def frozen_models(wait: bool, **references: Reference | None) -> dict[str, Policy]:
    """Of the references those with weights of their own, by their role's name; where they `wait`, it is in the CPU's
    memory until they are read."""
    there = {name: reference.separate for name, reference in references.items() if reference is not None}
    found = {name: model for name, model in there.items() if model is not None}
    if wait:
        for model in found.values():
            keep_away(model)
    return found


def train_and_restore(session: Session, state: Offline, keep: str) -> bool:
    """Trains, and takes up the best checkpoint again where `keep` says so; False where a signal ended the run."""
    state.run(session)
    if session.stopped:
        return False
    if keep == "best":
        restore_best(session, state)
    return True
