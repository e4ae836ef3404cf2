"""What the teacher reads of how an update's answers fared: another answer that succeeded, and words about its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from steersman.advantage.group import first_success
from steersman.data.prompt_template import PromptTemplate
from steersman.data.rows import Row
from steersman.distill.recipe import TeacherFeedback
from steersman.distill.rows import DistillSet, Reader
from steersman.distill.teacher import Answer
from steersman.reward import Scores
from steersman.types import Stats

_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
_END = "</think>"


class FeedbackPrompts:
    """Makes the teacher's prompt of each answer anew, once the answers of an update are scored.

    {solution} of `teacher.prompt` becomes the first other answer to the same prompt whose score is at least
    `success`, {feedback} what the rewards and the data's column say of the answer itself. An answer of which neither
    is known, or whose teacher's prompt would be too long, is not taught.

    Source: arXiv 2601.20802 (SDPO). Departure: a prompt that is too long is cut there.
    """

    def __init__(self, config: TeacherFeedback, rows: Reader, data: DistillSet) -> None:
        self.config, self.rows, self.data = config, rows, data
        self.solution = PromptTemplate.parse(config.solution, "teacher.feedback.solution")
        self.text = PromptTemplate.parse(config.text, "teacher.feedback.text")

    def describe(self) -> str:
        """One line: what is shown."""
        least, column = self.config.success, self.config.column
        parts = [] if least is None else [f"an answer that scores at least {least:g}"]
        parts.append("what the rewards say" + ("" if column is None else f" and the column {column}"))
        return ", ".join(parts)

    def show(self, answers: Sequence[Answer], scores: Scores | None) -> Stats:
        """Sets `teacher_prompt` and `taught` of each answer. Shares of the answers: with a solution beside them, with
        words, taught, and left out as too long; `feedback/solved` is the share of prompts that an answer solved."""
        config, beside, solved = self.config, [-1] * len(answers), set[int]()
        if config.success is not None:
            assert scores is not None
            group = torch.tensor([a.row for a in answers])
            beside = first_success(scores.total, group, config.success, own=config.own).tolist()
            solved = set(group[scores.total >= config.success].tolist())
        said = [self._said(a, scores, i) for i, a in enumerate(answers)]
        if not config.beside_solution:
            said = ["" if at >= 0 else text for at, text in zip(beside, said, strict=True)]
        too_long = 0
        for answer, at, text in zip(answers, beside, said, strict=True):
            answer.taught = at >= 0 or text != ""
            if not answer.taught:
                continue
            found = self._prompt(answer, None if at < 0 else answers[at], text)
            answer.taught = found is not None
            answer.teacher_prompt = found or answer.teacher_prompt
            too_long += found is None
        shares = {
            "solution": sum(at >= 0 for at in beside), "text": sum(text != "" for text in said),
            "taught": sum(a.taught for a in answers), "too_long": too_long,
        }  # fmt: skip
        stats = {f"feedback/{name}": count / len(answers) for name, count in shares.items()}
        return stats | {"feedback/solved": len(solved) / len({a.row for a in answers})}

    def _said(self, answer: Answer, scores: Scores | None, place: int) -> str:
        """What the rewards say of the answer, and below it what its row's column says; "" where neither does."""
        of_reward = "" if scores is None or scores.feedback is None else scores.feedback[place]
        column = self.config.column
        of_row = None if column is None else self.data.examples[answer.row].row.data.get(column)
        return "\n".join(filter(None, (of_reward.strip(), "" if of_row is None else str(of_row).strip())))

    def _prompt(self, answer: Answer, solved: Answer | None, text: str) -> list[int] | None:
        """The teacher's prompt of an answer in token ids; None where it is too long."""
        example, shown = self.data.examples[answer.row], {"solution": "", "feedback": ""}
        if solved is not None:
            reply = solved.text if self.config.thinking else _without_thoughts(solved.text).strip()
            shown["solution"] = self.solution.fill(_with(example.row, "answer", reply))
        if text:
            shown["feedback"] = self.text.fill(_with(example.row, "text", text))
        ids, context = self.rows.teacher_prompt(example, shown), self.rows.teacher_context
        beyond = context is not None and len(ids) + len(answer.response) > context
        return None if beyond or len(ids) > (self.config.max_tokens or len(ids)) else ids


def _with(row: Row, name: str, value: str) -> Row:
    return replace(row, data={**row.data, name: value})


def _without_thoughts(text: str) -> str:
    """The text without its closed thoughts. Behind the last end mark none is looked for: a text of beginnings alone
    would take time that grows with its square."""
    head, end, rest = text.rpartition(_END)
    return _THINKING.sub("", head + end) + rest
