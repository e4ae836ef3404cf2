"""The verb: models and data in, a distilled student out."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from steersman.data import LoadedExamples
from steersman.data.needed import loaded_with_needed
from steersman.distill.alignment import OtherTokenizer
from steersman.distill.endpoint import EndpointTeacher
from steersman.distill.feedback import FeedbackPrompts
from steersman.distill.loop import Distill
from steersman.distill.objective import Distillation
from steersman.distill.recipe import SOURCES, DistillRecipe
from steersman.distill.rows import DistillSet, load, reader
from steersman.distill.teacher import AveragedTeacher, LocalTeacher, Teacher, check_tokens, local_model
from steersman.distill.teacher_looks import TeacherLooks
from steersman.evaluation import Evaluation
from steersman.model import Policy
from steersman.plan.memory import Model, SamplingLoad, announce, largest_load
from steersman.reward import build_reward
from steersman.run.device import device_text
from steersman.run.held_out import NONE_HELD_OUT, holds_out
from steersman.run.preflight import Preflight
from steersman.setup.generators import open_generator
from steersman.setup.models import policy_from, rate_text, save_model
from steersman.setup.reference import Reference
from steersman.train.looks import before_and_after, first_and_last
from steersman.train.moving import MovingAverage
from steersman.train.session import Session
from steersman.types import Stats


def run(recipe: DistillRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Trains, and leaves the student in `<run folder>/model`; returns the summary that the run folder holds."""
    watched, mode = _watched(recipe)
    session = Session(
        "distill", recipe, resume=resume, metric=watched, mode=mode, health=recipe.health,
        headline=("divergence", watched, "held_out/loss", "reward/total", "feedback/taught", "length/mean"),
    )  # fmt: skip
    with ExitStack() as stack, session:  # what samples is still there when an error has the last step saved
        student = policy_from(recipe.model, recipe.run, session.device)
        model = None if recipe.teacher.path is None else local_model(recipe, student)
        rows = reader(recipe, student, None if model is None else model.separate)
        teacher = _teacher(recipe, student, model, rows)
        loaded = load(recipe)
        reward = None
        if recipe.reward is not None:
            reward = build_reward(recipe.reward, student.tokenizer, session.device)
            loaded = loaded_with_needed(loaded, reward.needs)
        train = rows.read(loaded.train)
        held = rows.read(loaded.held_out) if loaded.held_out else _last(train, recipe.rollout.held_out)
        limit = float(recipe.rollout.max_new_tokens)
        objective = Distillation(student, teacher, recipe.loss, limit=limit, reward_weight=recipe.reward_weight)
        engine = open_generator(recipe.rollout, student)
        stack.callback(engine.close)
        shown = recipe.teacher.feedback
        feedback = None if shown is None else FeedbackPrompts(shown, rows, train)
        state = Distill(recipe, objective, train, engine, reward, feedback=feedback)
        looks = TeacherLooks(state, held)
        evaluation = Evaluation(student, recipe.evaluation, session)
        _preflight(session, state, loaded, held, model=model, evaluation=evaluation)
        asked = [len(p.ids) for p in (*train.prompts, *held.prompts)]
        engine.prepare(max(asked) + recipe.rollout.max_new_tokens)
        teacher.check(student.tokenizer, max(_longest_taught(recipe, train), _longest_taught(recipe, held)))
        session.begin(state, state.total)

        def look() -> Stats:
            return {**looks.look(session, session.step), **evaluation.look()}

        if session.start == 0:
            session.observe(0, look())
        session.make_up(look)
        for step in session.steps():
            stats, samples = state.step()
            due = step % recipe.run.eval_every == 0 or step == state.total
            texts = [s.text for s in samples]
            session.observe(step, stats, texts, publish=state.publish, look=look if due else None)
        if session.stopped:
            return session.summary({})
        save_model(student, recipe.model, session.path / "model")
        both = before_and_after(*first_and_last(session))
        if both and not holds_out(dict(recipe.data)):
            session.log.note(NONE_HELD_OUT, style="yellow")
        measured = evaluation.of_saved(again=False)
        return session.summary({"model": str(session.path / "model"), **both, **measured})


def _watched(recipe: DistillRecipe) -> tuple[str, str]:
    """The number of the looks that ranks checkpoints, and whether the least or the most of it is best."""
    if recipe.teacher.feedback is not None:
        return ("held_out/loss", "min") if recipe.reward is None else ("held_out/reward/total", "max")
    return "held_out/uld" if recipe.loss.name == "uld" else "held_out/teacher_kl", "min"


def _teacher(recipe: DistillRecipe, student: Policy, model: Reference | None, rows: Any) -> Teacher:
    if recipe.teacher.endpoint is not None:
        width = student.head().weight.shape[0]
        return EndpointTeacher(recipe.teacher.endpoint, width, student.device)
    assert model is not None
    name, section = recipe.teacher.path or "", recipe.teacher
    if name == "ema":
        assert model.separate is not None
        return AveragedTeacher(MovingAverage(model.separate, student, decay=section.decay, every=section.every))
    if recipe.loss.name == "uld" and model.separate is not None:
        return OtherTokenizer(model.separate, rows.student.codec, name)
    check_tokens(recipe, model, student)
    return LocalTeacher(model, name)


def _longest_taught(recipe: DistillRecipe, rows: DistillSet) -> int:
    """Tokens of the longest prompt as the teacher reads it, with an answer; 0 of no rows."""
    new = recipe.rollout.max_new_tokens
    shown = 0 if recipe.teacher.feedback is None else new
    asked = [len(prompt) + shown + new for prompt in rows.teacher_prompts]
    given = [len(p) + len(e.response) for p, e in zip(rows.teacher_prompts, rows.given_answers, strict=False)]
    return max([0, *asked, *given])


def _last(train: DistillSet, count: int) -> DistillSet:
    """The last few prompts of the training data, looked at where none are held out; their answers are not."""
    return DistillSet(train.prompts[-count:], train.teacher_prompts[-count:]) if count else DistillSet()


def _preflight(
    session: Session, state: Distill, loaded: LoadedExamples[Any], held: DistillSet,
    *, model: Reference | None, evaluation: Evaluation,
) -> None:  # fmt: skip
    recipe, student = state.recipe, state.objective.policy
    train, rollout, loss = recipe.train, recipe.rollout, recipe.loss
    pre = Preflight(f"steersman distill: {loss.name} ({SOURCES[loss.name]})")
    pre.fact("run folder", str(session.path))
    pre.fact("device", device_text(session.device, next(student.parameters()).dtype))
    pre.fact("teacher", state.objective.teacher.describe())
    if state.feedback is not None:
        pre.fact("teacher is shown", state.feedback.describe())
    pre.fact("data", f"{len(state.data):,} prompts, {len(loaded.held_out)} held out; {loaded.left_out.sentence}")
    if held.prompts and not loaded.held_out:
        pre.fact("looks", f"at the last {len(held)} training prompts: {NONE_HELD_OUT}")
    pre.fact("answers", f"{train.on_policy:.0%} of updates on the student's own, the others on the data's")
    pre.fact("optimizer updates", f"{state.total} of {train.batch_size} prompts x {rollout.samples}")
    pre.fact("optimizer.lr", rate_text(student, recipe.optimizer.lr))
    if state.reward is not None:
        pre.fact("reward", state.reward.describe())
    models = [Model("student", student.model, recipe.model.path, student, recipe.optimizer)]
    separate = None if model is None else model.separate
    if separate is not None and separate is not student:
        models.append(Model("teacher", separate.model, recipe.teacher.path or ""))
    models += [Model("teacher's average", kept, "float32") for kept in state.objective.teacher.beside()]
    shown = 0 if state.feedback is None else rollout.max_new_tokens
    prompt = max(state.data.longest, shown + max(map(len, state.data.teacher_prompts)))
    longest = max([prompt + rollout.max_new_tokens, *(len(e) for e in state.data.given_answers)])
    answers = train.batch_size * rollout.samples
    load = largest_load([longest] * answers, longest, recipe.run.micro_tokens, answers)
    sampled = SamplingLoad(student, answers, state.data.longest, rollout.max_new_tokens, state.engine.limits(answers))
    announce(pre, session.device, models, load, evaluation.larger(sampled))
    for i in range(0, len(state.data), max(1, len(state.data) // 3)):
        pre.sample([(state.data.prompts[i].text, False)])
        if i and i >= 2 * max(1, len(state.data) // 3):
            break
    for note in student.notes:
        pre.fact("model", note)
    pre.check()
    pre.show()
