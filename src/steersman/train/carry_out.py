"""The end of every offline verb on a policy: the preflight's table of models, the training, the model on disk."""

from __future__ import annotations

from typing import Any

from steersman.model import Policy
from steersman.run.preflight import Preflight
from steersman.train.models import save_model
from steersman.train.offline import Offline, restore_best
from steersman.train.preflight import policy_role
from steersman.train.reference import Reference
from steersman.train.session import Session


def carry_out(
    pre: Preflight,
    session: Session,
    state: Offline,
    recipe: Any,
    policy: Policy,
    longest: int,
    reference: Reference | None = None,
) -> dict[str, Any]:
    """Shows what will be trained, trains it, and leaves the model in `<run folder>/model`; returns the summary.

    `longest` is the longest sequence (tokens). Raises SteersmanError where the models will not fit.
    """
    tokens = recipe.run.micro_tokens
    pre.role(policy_role("policy", policy, recipe.model.path, tokens, longest))
    if isinstance(reference, Policy):
        pre.role(policy_role("reference", reference, reference.model.name_or_path, tokens, longest, trained=False))
    pre.check()
    pre.show()
    if not trained(session, state, recipe.train.keep):
        return session.summary({})
    save_model(policy, recipe.model, session.path / "model")
    return session.summary({"model": str(session.path / "model"), **state.objective.evaluate()})


def trained(session: Session, state: Offline, keep: str) -> bool:
    """Trains, and takes up the best checkpoint again where `keep` says so; False where a signal ended the run."""
    state.run(session)
    if session.stopped:
        return False
    if keep == "best":
        restore_best(session, state)
    return True
