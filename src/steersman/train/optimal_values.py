"""V*(x) of every training prompt, from responses of the policy that training begins with, before it begins.

The scores of the responses are kept in the run folder as they come, so a run that goes on draws none again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from steersman.algorithms.base import OptimalValue
from steersman.run.files.ledger import StoppedError
from steersman.run.files.pieces import Pieces, Rows
from steersman.run.progress import ProgressLine
from steersman.run.seed import SamplingStream
from steersman.setup.generators import piece_size
from steersman.train.on_policy import OnPolicy
from steersman.train.session import Session
from steersman.types import Prompt, SteersmanError

FOLDER = "optimal-values"


def prepare_values(state: OnPolicy, session: Session) -> bool:
    """Gives `state` the optimal value of each prompt, and says which prompts are left out, where its method asks for
    that. False where a signal ended the run meanwhile; what was drawn is kept.

    Raises SteersmanError where too few prompts remain, or where responses would have to be drawn of a policy that has
    been trained already.
    """
    wanted = state.algorithm.optimal_value()
    if wanted is None:
        return True
    pieces = Pieces(session.path / FOLDER, len(state.prompts), _about(state, wanted))
    _require_start(state, pieces)
    pieces.begin()
    try:
        rows = pieces.fill(
            piece_size(state.recipe.rollout, wanted.samples), lambda span, _: _scores(state, wanted, span),
            ProgressLine("responses of the reference"), session.check,
        )  # fmt: skip
    except StoppedError:
        return False
    state.optimal = {p.index: soft_mean(r["score"], wanted.beta) for p, r in zip(state.prompts, rows, strict=True)}
    least = -math.inf if wanted.solved_above is None else wanted.solved_above
    state.left_out = frozenset(i for i, row in enumerate(rows) if max(row["judged"]) <= least)
    left, needed = len(rows) - len(state.left_out), state.recipe.rollout.prompts
    if left < needed:
        raise SteersmanError(
            f"algorithm.solved_above {least:g}: of {len(rows)} prompts {left} have a response of the reference that "
            f"scores above it, and an iteration takes {needed} (rollout.prompts); lower one of the two, or leave "
            "solved_above out, and go on with --resume"
        )
    mean = sum(state.optimal.values()) / len(state.optimal)
    out = f"; {len(state.left_out)} of them left out, no response scored above {least:g}" if state.left_out else ""
    session.log.note(f"optimal value of {len(rows)} prompts: mean {mean:.4g}{out}")
    return True


def soft_mean(scores: Sequence[float], beta: float) -> float:
    """beta log mean exp(r / beta), in float64. Source: arXiv 2505.20686."""
    scaled = torch.tensor(scores, dtype=torch.float64) / beta
    return beta * (float(scaled.logsumexp(0)) - math.log(len(scores)))


def _scores(state: OnPolicy, wanted: OptimalValue, span: range) -> Rows:
    """For each of some prompts the shaped scores of its responses, and the scores before shaping."""
    asked = [state.prompts[i] for i in span]
    seed = (state.recipe.run.seed, SamplingStream.OPTIMAL_VALUES)
    samples = state.roles.generate(asked, seed=seed, n=wanted.samples)
    scores = state.roles.score(samples)
    shaped, _ = state.shape(samples, scores, update=False)
    shape = (len(asked), wanted.samples)
    pairs = zip(shaped.view(shape).tolist(), scores.total.view(shape).tolist(), strict=True)
    return [{"score": score, "judged": judged} for score, judged in pairs]


def _about(state: OnPolicy, wanted: OptimalValue) -> dict[str, Any]:
    """What the scores are of: they are drawn again where any of it is another."""
    recipe = state.recipe
    return {
        "prompts": _digest(state.prompts), "samples": wanted.samples, "seed": recipe.run.seed,
        "model": recipe.model.model_dump(mode="json"), "reward": recipe.reward.model_dump(mode="json"),
        "sampling": asdict(recipe.rollout.sampling()),
        "environment": None if recipe.environment is None else recipe.environment.model_dump(mode="json"),
    }  # fmt: skip


def _digest(prompts: Sequence[Prompt]) -> str:
    """The SHA-256 of the prompts' places and ids."""
    return hashlib.sha256(json.dumps([[p.index, list(p.ids)] for p in prompts]).encode()).hexdigest()


def _require_start(state: OnPolicy, pieces: Pieces) -> None:
    """Raises SteersmanError where responses are missing and the policy is no longer the one that training began
    with."""
    changed = pieces.changes()
    if state.done == 0 or not (changed or pieces.missing(len(state.prompts))):
        return
    why = "; ".join(changed) or f"some are missing in {pieces.folder}"
    raise SteersmanError(
        f"run folder {pieces.folder.parent}: responses for the optimal values would have to be drawn again ({why}), "
        f"and the policy has been trained for {state.done} iterations since. Resume with what the run began with, or "
        "begin a new run in another --run.dir"
    )
