"""`steersman reward`: a reward model from whatever people said: pairs, rankings, ratings, thumbs or steps."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, cast

from steersman.atomic import write_atomic
from steersman.data import (
    LOADERS,
    EncodedSet,
    LoadedExamples,
    Order,
    Training,
    TrainingSet,
    attributes,
    describe,
    encode,
    layout,
    mixture,
    preferences,
    recognise_kind,
    training,
)
from steersman.data.shapes import NOUNS, Kind
from steersman.distributed.pieces import full_tensor
from steersman.extras import installed
from steersman.model import (
    AttributeModel,
    GatedModel,
    ScalarModel,
    context_length,
    whole_weights,
)
from steersman.model.bottleneck import BOTTLENECK
from steersman.model.ensemble import ENSEMBLE
from steersman.model.general import GENERAL
from steersman.objectives.reward_bottleneck import BottleneckReward
from steersman.objectives.reward_ensemble import EnsembleReward
from steersman.objectives.reward_gating import GatingReward
from steersman.objectives.reward_general import GeneralPreferenceReward
from steersman.objectives.reward_pairs import PairwiseReward, RankingReward
from steersman.objectives.reward_points import FeedbackReward, RatingReward, StepReward
from steersman.plan.memory import Load, Model, announce
from steersman.run.preflight import Preflight
from steersman.run.report.calibration import calibration_png
from steersman.run.seed import stream
from steersman.setup.models import rate_text, reward_from, save_model, scalar_from
from steersman.statistics.reward_report import Report
from steersman.train.offline import Offline
from steersman.train.session import Session
from steersman.types import SteersmanError
from steersman.verbs.offline_run import train_and_restore
from steersman.verbs.preflight import describe_run
from steersman.verbs.reward_of_pairs import of_pairs
from steersman.verbs.reward_recipe import RewardModelRecipe

KINDS: tuple[Kind, ...] = ("preference", "ranking", "rating", "feedback", "steps")
LEARNS = {
    "preference": "Bradley-Terry on pairs; a pair on which raters differ has their share as its label",
    "ranking": "all answers of a prompt in one forward; {loss}",
    "rating": "regression on {names}, in the data's units",
    "feedback": "the log-odds of a thumb up",
    "steps": "the log-odds that an answer is right so far, at the end of each step",
}
METRIC = {"preference": ("held_out/accuracy", "max"), "ranking": ("held_out/accuracy", "max")}
"""What ranks checkpoints; for other kinds the held-out loss does."""


def run(recipe: RewardModelRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Trains, and leaves the model in `<run folder>/model`; returns the summary that the run folder holds.

    `evaluation.json` holds everything that was measured on held-out data, `calibration.png` its picture.
    """
    kind = _kind(recipe)
    metric, mode = METRIC.get(kind, ("held_out/loss", "min"))
    session = Session(
        "reward", recipe, resume=resume, metric=metric, mode=mode,
        headline=("loss", "accuracy", metric), health=recipe.health,
    )  # fmt: skip
    with session:
        if recipe.stage == "evaluate":
            return _evaluate(session, recipe, kind)
        if recipe.stage == "gating":
            return _gating(session, recipe)
        return _train(session, recipe, kind)


Objective = PairwiseReward | RankingReward | RatingReward | FeedbackReward | StepReward


def _kind(recipe: RewardModelRecipe) -> Kind:
    if recipe.stage == "gating":
        if recipe.kind not in ("auto", "preference"):
            raise SteersmanError(f"kind: {recipe.kind}, but the gating stage learns from preferences (or rankings)")
        return "preference"
    return recognise_kind(recipe.data, KINDS) if recipe.kind == "auto" else recipe.kind


def _train(session: Session, recipe: RewardModelRecipe, kind: Kind) -> dict[str, Any]:
    if recipe.train.debias and kind != "preference":
        raise SteersmanError(
            f"train.debias learns from pairs, and the data is of kind {kind}; give pairs, or remove it"
        )
    loaded = _read(recipe, kind)
    names = recipe.data.scores or (attributes(loaded.train) if loaded is not None and kind == "rating" else [])
    model: Any = of_pairs(recipe.model, recipe.train, recipe.run, session.device, kind)
    if model is not None:
        pass
    elif kind == "rating" and len(names) > 1:
        model = reward_from(recipe.model, recipe.run, session.device, names)
    else:
        model = scalar_from(recipe.model, recipe.run, session.device)
        model.means(replace(model.meaning, kind=kind, attributes=tuple(names) if kind == "rating" else ()))
    laid = layout(model, recipe.data)
    order = Order(recipe.train.batch_size, recipe.run.seed)
    data = training(
        recipe.data, kind, laid, context=context_length(model.model), order=order, loaded=loaded
    )  # fmt: skip
    objective = _objective(kind, model, data.train, data.held_out, recipe, names)
    state = Offline(
        objective, recipe.train, recipe.optimizer, recipe.run,
        shuffle=recipe.data.shuffle, data=data,
    )  # fmt: skip
    state.start_counts = _has_a_head(model)
    pre = Preflight("steersman reward")
    describe_run(pre, session, recipe.train.batch_size, state.total, data.summary)
    loss = "Plackett-Luce" if recipe.train.loss == "plackett_luce" else "Bradley-Terry over all its pairs"
    pre.fact("recognised", f"{NOUNS[kind]}: {LEARNS[kind].format(loss=loss, names=', '.join(names))}")
    pre.fact("optimizer.lr", rate_text(model, recipe.optimizer.lr))
    _show(pre, session, model, recipe, state.load(int(data.train.lengths.max())))
    if not train_and_restore(session, state, recipe.train.keep):
        return session.summary({})
    worth = cast(PairwiseReward, objective).debias() if recipe.train.debias else {}
    for name, each in worth.items():
        session.log.note(f"debiased: one more of {name} was worth {each:+.4f}")
    save_model(model, recipe.model, session.path / "model")
    return _finish(session, recipe, objective, {"model": str(session.path / "model"), "kind": kind, **_told(worth)})


def _has_a_head(model: Any) -> bool:
    """Whether the head is more than zeros, which score nothing yet; every rank must ask."""
    return bool(full_tensor(model.output.weight).any())


def _read(recipe: RewardModelRecipe, kind: Kind) -> LoadedExamples[Any] | None:
    """The rows, read before the model is; None where they are not kept in memory. Raises SteersmanError for a kind
    that can not be read so."""
    if not recipe.data.large:
        return LOADERS[kind](recipe.data)
    if recipe.data.stream and kind not in ("preference", "feedback"):
        raise SteersmanError(f"data.stream: {NOUNS[kind]} are gone through before the first step; use data.cache")
    if kind == "rating" and not recipe.data.scores:
        raise SteersmanError("data.cache: name the columns of the ratings in data.scores")
    return None


def _told(worth: dict[str, float]) -> dict[str, float]:
    return {f"debiased/{name}": each for name, each in worth.items()}


def _gating(session: Session, recipe: RewardModelRecipe) -> dict[str, Any]:
    loaded = preferences(recipe.data)
    model = _attribute_model(recipe, session)
    laid = layout(model, recipe.data)
    train = _encode(loaded.train, laid, recipe, model)
    held_out = _encode(loaded.held_out, laid, recipe, model) if loaded.held_out else None
    objective = GatingReward(model, train, held_out, recipe.train, recipe.gating, recipe.run.micro_tokens)
    data = Training(train, held_out, describe(loaded, train, laid), mixture(recipe.data, train.parts))
    state = Offline(objective, recipe.train, recipe.optimizer, recipe.run, shuffle=recipe.data.shuffle, data=data)
    pre = Preflight("steersman reward, stage gating (arXiv 2406.12845)")
    describe_run(pre, session, recipe.train.batch_size, state.total, data.summary)
    pre.fact("recognised", f"preferences, to mix {', '.join(objective.names)} by the prompt; trunk and heads stay")
    penalties = zip(objective.names, objective.module.penalty.tolist(), strict=True)
    pre.fact("verbosity", f"{recipe.gating.verbosity}: " + ", ".join(f"{n} {p:+.3f}" for n, p in penalties))
    _show(pre, session, model, recipe, state.load(int(train.lengths.max())))
    if not train_and_restore(session, state, recipe.train.keep):
        return session.summary({})
    sizes = {key: getattr(recipe.gating, key) for key in ("hidden", "layers", "verbosity")}
    model.means(replace(model.meaning, gating=sizes))
    with whole_weights(model):  # which a model reads when it is made
        gated = GatedModel(model.model, model.tokenizer, objective.names)
    gated.gating.load_state_dict(objective.module.state_dict())
    save_model(gated, recipe.model, session.path / "model")
    return _finish(session, recipe, objective, {"model": str(session.path / "model"), "kind": "gating"})


def _evaluate(session: Session, recipe: RewardModelRecipe, kind: Kind) -> dict[str, Any]:
    """The held-out rows where the data section holds some out, all rows else."""
    loaded: LoadedExamples[Any] = LOADERS[kind](recipe.data)
    if loaded.held_out:
        loaded.train = loaded.held_out
    model: Any = reward_from(recipe.model, recipe.run, session.device, trainable=False)
    if not _has_a_head(model):
        raise SteersmanError(f"{recipe.model.path}: its head is all zeros, so there is no reward model to evaluate")
    names = (
        list(model.meaning.attributes) or recipe.data.scores or attributes(loaded.train) if kind == "rating" else []
    )
    laid = layout(model, recipe.data)
    data = _encode(loaded.train, laid, recipe, model)
    objective = _objective(kind, model, data, data, recipe, names)
    pre = Preflight("steersman reward, stage evaluate")
    describe_run(pre, session, len(data.groups), 0, describe(loaded, data, laid))
    pre.fact("recognised", NOUNS[kind])
    longest = int(data.lengths.max())
    _show(pre, session, model, recipe, Load(max(recipe.run.micro_tokens, longest), longest))
    session.begin(_Nothing(), 0)
    session.saved_step = 0
    session.observe(0, objective.evaluate())
    return _finish(session, recipe, objective, {"model": recipe.model.path, "kind": kind})


class _Nothing:
    """The state of a run that changes nothing."""

    whole = True

    def position(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _encode(examples: Any, laid: Any, recipe: RewardModelRecipe, model: ScalarModel | AttributeModel) -> EncodedSet:
    return encode(examples, laid, recipe.data, context_length(model.model))


def _objective(
    kind: Kind,
    model: Any,
    train: TrainingSet,
    held_out: EncodedSet | None,
    recipe: RewardModelRecipe,
    names: list[str],
) -> Objective:
    given = (model, train, held_out, recipe.train, recipe.run.micro_tokens)
    match kind:
        case "rating":
            return RatingReward(*given, names)
        case "ranking":
            return RankingReward(*given)
        case "feedback":
            return FeedbackReward(*given)
        case "steps":
            return StepReward(*given)
        case _ if model.meaning.kind == ENSEMBLE and recipe.train.heads > 1:
            return EnsembleReward(*given, stream(recipe.run.seed, "draws of pairs"))
        case _ if model.meaning.kind == BOTTLENECK:
            return BottleneckReward(*given)
        case _ if model.meaning.kind == GENERAL:
            return GeneralPreferenceReward(*given)
        case _:
            return PairwiseReward(*given)


def _attribute_model(recipe: RewardModelRecipe, session: Session) -> AttributeModel:
    model = reward_from(recipe.model, recipe.run, session.device, trainable=False)
    if not isinstance(model, AttributeModel):
        raise SteersmanError(
            f"model.path: {recipe.model.path} is no reward model of several attributes, which gating mixes; train "
            "one first: `steersman reward` on ratings, with two columns in data.scores at least"
        )
    return model


def _show(pre: Preflight, session: Session, model: Any, recipe: RewardModelRecipe, load: Load) -> None:
    trains = any(p.requires_grad for p in model.parameters())
    found = Model("reward model", model.model, recipe.model.path, model if trains else None, recipe.optimizer)
    announce(pre, session.device, [found], load)
    for note in model.notes:
        pre.fact("model", note)
    pre.check()
    pre.show()


def _finish(
    session: Session, recipe: RewardModelRecipe, objective: Objective | GatingReward, told: dict[str, Any]
) -> dict[str, Any]:
    """Everything that is measured on held-out data, written and said."""
    report: Report | None = objective.report(recipe.evaluation)
    if report is None:
        return session.summary(told)
    session.write(lambda: write_atomic(session.path / "evaluation.json", json.dumps(report.plain(), indent=1)))
    curve = report.calibration
    if curve is not None:
        low = 0.5 if report.kind in ("preference", "ranking", "gating") else 0.0
        file = session.path / "calibration.png"
        if installed("matplotlib"):
            session.write(
                lambda: calibration_png(file, curve.predicted, curve.observed, curve.count, low=low, error=curve.ece)
            )
        else:
            session.log.note(
                "calibration.png is drawn where matplotlib is installed: pip install 'steersman[reports]'"
            )
    for line in report.lines():
        session.log.note(line)
    return session.summary({**told, **objective.evaluate(), **report.summary()})
