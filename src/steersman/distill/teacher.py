"""Teachers: what reads an answer and tells its distributions at every token of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steersman.distill.recipe import DistillRecipe
from steersman.model import Policy
from steersman.model.layout import masked_indices, response_slots
from steersman.ops.divergence import Divergence, TeacherStates, TeacherTopK, linear_divergence
from steersman.ops.logprob import Head
from steersman.setup.models import policy_from
from steersman.setup.reference import Reference, reference_from, same_tokens
from steersman.train.moving import MovingAverage, copy_to_move
from steersman.types import SteersmanError, Tokens


@dataclass(slots=True)
class Answer:
    """One answer to learn from, in the student's tokens.

    `teacher_prompt` is the prompt as the teacher reads it, and `text` the answer's text, of a given one only where a
    teacher reads it in tokens of its own. `mask[t]` says whether token t counts. `ended` is False where the length
    limit cut it, `row` its place in the data, `advantage` what the reward found it worth beside others. `taught` is
    False where the teacher knows no more than the student, so that its distance to it counts as 0.
    """

    prompt: list[int]
    response: list[int]
    mask: list[bool]
    teacher_prompt: list[int]
    row: int
    text: str = ""
    ended: bool = True
    advantage: float = 0.0
    taught: bool = True

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)

    def after(self, count: int) -> Answer:
        """The same answer, of which the first `count` tokens do not count."""
        return replace(self, mask=[m and t >= count for t, m in enumerate(self.mask)])


@dataclass(slots=True)
class Reading:
    """A teacher's distributions at the N response tokens of some answers, packed row by row, and the log-probability
    of those very tokens where it was asked for."""

    teacher: TeacherStates | TeacherTopK
    logp: Float[Tensor, " N"] | None = None


@dataclass(slots=True)
class TokenDivergence:
    """How far student and teacher are apart at the N response tokens of some answers, packed row by row: `divergence`
    in nats, the teacher's `logp` of those tokens where it was asked for, and the mass that it did not list where it
    lists tokens."""

    divergence: Float[Tensor, " N"]
    logp: Float[Tensor, " N"] | None = None
    unlisted_mass: Float[Tensor, " N"] | None = None


@dataclass(frozen=True, slots=True)
class Measure:
    """What student and teacher are compared by: the divergence, the share `mix` of the teacher in what a mixed one
    compares both with, the softmax temperature, the student's `top_k` tokens with or without their `tail`
    (`linear_divergence`), and whether the teacher's `logp` of the answers' tokens is wanted."""

    kind: Divergence
    mix: float = 0.5
    temperature: float = 1.0
    top_k: int | None = None
    tail: bool = True
    logp: bool = False


class Teacher:
    """What tells its distributions at every token of an answer."""

    reads_ids: ClassVar[bool] = True
    """Whether it reads the student's token ids; False where it reads the text in tokens of its own."""

    def check(self, tokenizer: Any, longest: int) -> None:
        """Called before training begins. Raises SteersmanError where it can not teach a student of this tokenizer, or
        has no room for texts of `longest` tokens."""

    def prepare(self, answers: Sequence[Answer]) -> None:
        """Called once with all answers of an update, before any of them is read."""

    def forget(self, answers: Sequence[Answer]) -> None:
        """Drops what it keeps of answers that will not come again."""

    def follow(self, done: int) -> None:
        """Called after each update of the student, with how many there were."""

    def beside(self) -> list[nn.Module]:
        """Weights that it holds beside its model's."""
        return []

    def state_dict(self) -> dict[str, Tensor]:
        """What a run that goes on must have of it."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes a `state_dict` up again."""

    def text(self, ids: list[int]) -> str:
        """The text of a given answer, for a teacher that reads text."""
        return ""

    def compare(
        self, answers: Sequence[Answer], hidden: Float[Tensor, "N H"], head: Head, measure: Measure
    ) -> TokenDivergence:
        """How far the student, given by its states `hidden` and its output layer, is from it."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line: which model, and where."""
        raise NotImplementedError


class TokenTeacher(Teacher):
    """A teacher of the student's own token ids."""

    def read(self, answers: Sequence[Answer], *, logp: bool, temperature: float) -> Reading:
        """Its distributions at every response token, and the log-probability of those tokens if asked for."""
        raise NotImplementedError

    def compare(
        self, answers: Sequence[Answer], hidden: Float[Tensor, "N H"], head: Head, measure: Measure
    ) -> TokenDivergence:
        reading = self.read(answers, logp=measure.logp, temperature=measure.temperature)
        divergence = linear_divergence(
            hidden, head, reading.teacher, measure.kind,
            mix=measure.mix, temperature=measure.temperature, top_k=measure.top_k, tail=measure.tail,
        )  # fmt: skip
        return TokenDivergence(divergence, reading.logp, reading.teacher.rest)


class LocalTeacher(TokenTeacher):
    """A model in this process, frozen, of the same token ids."""

    def __init__(self, model: Reference, name: str) -> None:
        self.model, self.name = model, name

    @torch.no_grad()
    def read(self, answers: Sequence[Answer], *, logp: bool, temperature: float) -> Reading:
        tokens = Tokens.from_ids([a.teacher_prompt for a in answers], [a.response for a in answers])
        hidden = self.model.hidden(tokens)
        if not logp:
            return Reading(TeacherStates(hidden, self.model.head()))
        told = self.model.logp_from(tokens, hidden, temperature=temperature).logp
        places = masked_indices(response_slots(tokens), told.device)
        return Reading(TeacherStates(hidden, self.model.head()), told.flatten()[places])

    def describe(self) -> str:
        return self.name


class AveragedTeacher(LocalTeacher):
    """A moving average of the student."""

    def __init__(self, average: MovingAverage) -> None:
        super().__init__(average.copy, f"the student's moving average (decay {average.decay:g})")
        self.average = average

    def follow(self, done: int) -> None:
        self.average.follow(done)

    def beside(self) -> list[nn.Module]:
        return list(self.average.beside().values())

    def state_dict(self) -> dict[str, Tensor]:
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.average.load_state_dict(state)


def local_model(recipe: DistillRecipe, student: Policy) -> Reference:
    """The model that `teacher.path` names, in the precision and on the device that the section asks for."""
    section = recipe.teacher
    assert section.path is not None
    if section.path == "live":
        return student
    if section.path == "ema":
        return copy_to_move(student, recipe.model, recipe.run)
    config = recipe.model.model_copy(update={} if section.dtype == "same" else {"dtype": section.dtype})
    if section.path == "start":
        return reference_from("start", config, recipe.run, student)
    device = student.device if section.device == "same" else torch.device(section.device)
    update = {"path": section.path, "scratch": None, "trust_remote_code": False}
    return policy_from(config.model_copy(update=update), recipe.run, device, trainable=False)


def check_tokens(recipe: DistillRecipe, model: Reference, student: Policy) -> None:
    """Raises SteersmanError where teacher and student read other token ids, by what can be done about it."""
    if model.separate is None:
        return
    path = recipe.teacher.path or ""
    try:
        same_tokens("teacher.path", path, model.separate, student)
    except SteersmanError as error:
        raise SteersmanError(
            f"teacher.path: the tokenizer of {path} ({len(model.separate.tokenizer)} tokens) is not the student's "
            f"({len(student.tokenizer)} tokens), and loss.name {recipe.loss.name} compares them token by token; use "
            "loss.name uld, which compares probabilities in order, or a teacher of the same family"
        ) from error
