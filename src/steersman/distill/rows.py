"""The rows that a student is taught on: prompts as it and its teacher read them, and given answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from steersman.data import (
    Demonstration,
    Encoded,
    Layout,
    LoadedExamples,
    Query,
    demonstrations,
    encode,
    encode_prompts,
    layout,
    prompts,
)
from steersman.data.examples import Content
from steersman.data.prompt_template import PromptTemplate
from steersman.distill.recipe import SHOWN, DistillRecipe
from steersman.distill.teacher import Answer
from steersman.model import Policy, context_length
from steersman.types import Prompt


@dataclass(slots=True)
class DistillSet:
    """Rows by place: `prompts` to answer, the same prompts as the teacher reads them, given answers if any, and the
    `examples` that all of it was read from."""

    prompts: list[Prompt] = field(default_factory=list)
    teacher_prompts: list[list[int]] = field(default_factory=list)
    given_answers: list[Encoded] = field(default_factory=list)
    examples: list[Any] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def longest(self) -> int:
        return max(len(p.ids) for p in self.prompts)

    def answers(self, rows: Sequence[int], text: Any = None) -> list[Answer]:
        """The data's own answers to some rows; `text` decodes ids where a teacher reads text."""
        found = []
        for i in rows:
            e = self.given_answers[i]
            told = "" if text is None else text(e.response)
            found.append(Answer(e.prompt, e.response, e.mask, self.teacher_prompts[i], i, told))
        return found


@dataclass(slots=True)
class Reader:
    """How the rows of a recipe become tokens of the student and of the teacher.

    `teacher` is the layout of a teacher with another tokenizer, else the student's own. `template` is
    `teacher.prompt`.
    """

    recipe: DistillRecipe
    student: Layout
    teacher: Layout
    template: PromptTemplate | None
    context: int | None
    teacher_context: int | None

    def read(self, examples: Sequence[Query | Demonstration]) -> DistillSet:
        """Raises SteersmanError for what does not fit, as `encode` and `encode_prompts` do, and for a row in which
        the teacher's prompt can not be made or leaves no room for an answer."""
        data, new = self.recipe.data, self.recipe.rollout.max_new_tokens
        out = DistillSet()
        if all(isinstance(e, Query) for e in examples):
            queries = [e for e in examples if isinstance(e, Query)]
            out.prompts, _, _ = encode_prompts(queries, self.student, data, self.context, new)
            kept = [queries[p.index] for p in out.prompts]
        else:
            given = encode([e for e in examples if isinstance(e, Demonstration)], self.student, data, self.context)
            kept, out.given_answers = given.examples, given.first
            out.prompts = [
                Prompt(e.prompt, self.student.codec.decode(e.prompt, after=False), example.row.data, i)
                for i, (e, example) in enumerate(zip(given.first, given.examples, strict=True))
            ]
        out.prompts = [Prompt(p.ids, p.text, p.row, i) for i, p in enumerate(out.prompts)]
        out.parts, out.examples = [e.row.part for e in kept], list(kept)
        own = self.template is None and self.teacher is self.student
        blank = {} if self.recipe.teacher.feedback is None else dict.fromkeys(SHOWN, "")
        out.teacher_prompts = [
            p.ids if own else self.teacher_prompt(e, blank) for p, e in zip(out.prompts, kept, strict=True)
        ]
        for i, example in enumerate(kept):
            self._check(example, out.teacher_prompts[i], out.given_answers[i] if out.given_answers else None)
        return out

    def _check(self, example: Query | Demonstration, taught: list[int], given: Encoded | None) -> None:
        new = self.recipe.rollout.max_new_tokens if self.recipe.train.on_policy else 0
        if given is not None and self.context is not None and len(given.prompt) + new > self.context:
            raise example.row.fault(
                "too long", f"{len(given.prompt)} prompt tokens and {new} new ones exceed a context of {self.context}"
            )
        new = max(new, len(given.response) if given is not None else 0)
        if self.teacher_context is not None and len(taught) + new > self.teacher_context:
            raise example.row.fault(
                "too long for the teacher",
                f"the prompt as the teacher reads it has {len(taught)} tokens; an answer of {new} exceeds its "
                f"context of {self.teacher_context}",
            )
        if given is not None and self.teacher is not self.student and not all(given.mask):
            raise example.row.fault(
                "several turns", "a teacher with another tokenizer reads answers of one turn; give single answers"
            )

    def teacher_prompt(self, example: Query | Demonstration, shown: Mapping[str, str]) -> list[int]:
        """The prompt as the teacher reads it, with what it is `shown` beside the row's columns."""
        content = example.prompt if self.template is None else teacher_text(example, self.template, shown)
        if isinstance(example, Query):
            return self.teacher.prompt(content)[0]
        return self.teacher.answer(content, example.completion)[0]


def teacher_text(example: Query | Demonstration, template: PromptTemplate, shown: Mapping[str, str]) -> Content:
    """The prompt that the template makes of the row's columns and of what is `shown` by name; {prompt} is the text
    asked, of a conversation its last user's turn, in whose place it stands then, and {completion} the given answer's
    text, of a conversation its first reply. Raises SteersmanError as `PromptTemplate.fill` does, and for a
    conversation without a user's turn."""
    prompt, row = example.prompt, example.row
    data = {**row.data, **shown}
    if isinstance(example, Demonstration):
        given = example.completion
        data["completion"] = given if isinstance(given, str) else given[0]["content"]
    if isinstance(prompt, str):
        return template.fill(replace(row, data={**data, "prompt": prompt}))
    last = max((i for i, m in enumerate(prompt) if m["role"] == "user"), default=None)
    if last is None:
        raise row.fault("no user's turn", f"{template.key} has no user's turn to stand for", "prompt")
    text = template.fill(replace(row, data={**data, "prompt": prompt[last]["content"]}))
    return [{**m, "content": text} if i == last else m for i, m in enumerate(prompt)]


def load(recipe: DistillRecipe) -> LoadedExamples[Any]:
    """Prompts where every update is on the student's own answers, else prompts with given answers; with these too
    where the teacher reads them in its prompt."""
    template = _template(recipe)
    shown = template is not None and "completion" in template.columns
    return demonstrations(recipe.data) if shown or recipe.train.on_policy < 1 else prompts(recipe.data)


def _template(recipe: DistillRecipe) -> PromptTemplate | None:
    written = recipe.teacher.prompt
    return None if written is None else PromptTemplate.parse(written, "teacher.prompt")


def reader(recipe: DistillRecipe, student: Policy, teacher: Policy | None) -> Reader:
    """`teacher` is the model that teaches, where it is in this process and has weights of its own; with loss uld it
    reads tokens of its own."""
    own = other = layout(student, recipe.data)
    if teacher is not None and recipe.loss.name == "uld":
        other = layout(teacher, recipe.data)
    limit = None if recipe.teacher.path is None else context_length((teacher or student).model)
    return Reader(recipe, own, other, _template(recipe), context_length(student.model), limit)
