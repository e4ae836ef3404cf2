"""The distillation loop: prompts -> answers (the student's own, or given) -> teacher -> divergence -> update."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steersman.advantage.group import leave_one_out
from steersman.data import Batches, mixture
from steersman.distill.feedback import FeedbackPrompts
from steersman.distill.objective import Distillation
from steersman.distill.recipe import DistillRecipe
from steersman.distill.rows import DistillSet
from steersman.distill.teacher import Answer
from steersman.distributed.micro import my_micro_batches
from steersman.distributed.ranks import ranks
from steersman.model import whole_weights
from steersman.reward import Scores, ScoreShaping, WeightedSum
from steersman.rollout import Generator
from steersman.run.seed import stream
from steersman.setup.generators import sample_on_all_ranks
from steersman.train.model_optimizer import model_optimizer
from steersman.train.offline import load_trainable, trainable
from steersman.train.session import kept_state
from steersman.train.tally import Tally
from steersman.types import Prompt, Sample, Stats
from steersman.update.optimizer import not_finite


@dataclass(slots=True)
class StudentAnswers:
    """Answers that the student gave, beside the samples that they are."""

    answers: list[Answer]
    samples: list[Sample]
    stats: Stats


class Distill:
    """One run: the student, its optimiser, the order of its data, and what its answers are compared with."""

    def __init__(
        self,
        recipe: DistillRecipe,
        objective: Distillation,
        data: DistillSet,
        engine: Generator,
        reward: WeightedSum | None,
        *,
        feedback: FeedbackPrompts | None = None,
    ) -> None:
        self.recipe, self.objective, self.data, self.engine, self.reward = recipe, objective, data, engine, reward
        self.feedback = feedback
        self.shaping = None if recipe.reward is None else ScoreShaping(recipe.reward)
        train = recipe.train
        lengths = [len(e) for e in data.given_answers] or [len(p.ids) for p in data.prompts]
        self.batches = Batches(
            len(data), train.batch_size, recipe.run.seed, lengths, shuffle=recipe.data.shuffle,
            mix=mixture(recipe.data, data.parts),
        )  # fmt: skip
        steps = max(1, round(train.epochs * len(self.batches)))
        self.total = min(steps, train.max_steps or steps)
        student = objective.policy
        self.optimizer = model_optimizer(student, recipe.optimizer, self.total)
        self.order = self.batches.forever()
        self.done, self.whole = 0, True

    def step(self) -> tuple[Stats, list[Sample]]:
        """One update, on the student's own answers or on given ones."""
        started, rows = time.monotonic(), next(self.order)
        if self.is_on_policy():
            seed = (self.recipe.run.seed, self.done)
            own = self.student_answers([self.data.prompts[i] for i in rows], self.recipe.rollout.samples, seed)
            answers, samples, stats = own.answers, own.samples, own.stats
            stats["time/rollout"] = time.monotonic() - started
        else:
            answers, samples, stats = self.data.answers(rows, self.objective.teacher.text), [], {}
        stats |= self.update([a.after(self.recipe.loss.skip_first) for a in answers])
        self.done += 1
        self.objective.teacher.follow(self.done)
        if samples:
            self.objective.teacher.forget(answers)
        return stats | {"time/step": time.monotonic() - started, "on_policy": float(bool(samples))}, samples

    def publish(self) -> Stats:
        """Hands the new weights to what samples."""
        return self.engine.update_weights(self.done)

    def is_on_policy(self) -> bool:
        """Whether this update is on the student's own answers: a coin with a stream of its own for each step."""
        draw = torch.rand((), generator=stream(self.recipe.run.seed, "own answers", self.done))
        return bool(draw < self.recipe.train.on_policy)

    def student_answers(
        self, prompts: Sequence[Prompt], n: int, seed: Any, taught: Sequence[list[int]] | None = None
    ) -> StudentAnswers:
        """The student's answers to prompts, with what their rewards say of them, and what the teacher reads of that.
        `taught` are the prompts as the teacher reads them, for prompts that are not those of the training data."""
        with whole_weights(self.objective.policy):
            samples = sample_on_all_ranks(self.engine, prompts, self.recipe.rollout.sampling(), n=n, seed=seed)
        train = taught is None
        taught = [self.data.teacher_prompts[p.index] for p in prompts] if taught is None else taught
        answers = [
            Answer(s.prompt.ids, s.ids, [True] * len(s.ids), taught[i // n], s.prompt.index, s.text, s.terminated)
            for i, s in enumerate(samples)
        ]
        stats: Stats = {"length/mean": sum(len(s.ids) for s in samples) / len(samples)}
        stats["finish/length"] = sum(not s.terminated for s in samples) / len(samples)
        scores = None if self.reward is None else self.reward.score(samples)
        if scores is not None:
            stats |= self._worth(answers, scores, training=train)
        if self.feedback is not None and train:
            stats |= self.feedback.show(answers, scores)
        return StudentAnswers(answers, samples, stats)

    def _worth(self, answers: list[Answer], scores: Scores, *, training: bool) -> Stats:
        """Sets each answer's advantage: its shaped score beside the others' to the same prompt, or beside all others'
        where each prompt has one."""
        assert self.shaping is not None
        limit = self.recipe.rollout.max_new_tokens
        terminated, length = (
            torch.tensor([a.ended for a in answers]),
            torch.tensor([len(a.response) for a in answers]),
        )
        shaped, stats = self.shaping(scores.total, terminated, length, limit, update=training)
        group = torch.tensor([a.row if self.recipe.rollout.samples > 1 else 0 for a in answers])
        for answer, advantage in zip(answers, leave_one_out(shaped, group).tolist(), strict=True):
            answer.advantage = advantage
        stats["reward/total"] = float(scores.total.mean())
        return stats | {f"reward/{name}": float(part.mean()) for name, part in scores.parts.items()}

    def update(self, answers: Sequence[Answer]) -> Stats:
        """One optimizer update. Raises NotFiniteError where the loss is no finite number."""
        objective, tally = self.objective, Tally()
        denominator = objective.denominator(answers)
        answers = objective.learned_from(answers)
        objective.teacher.prepare(answers)
        cost = torch.tensor([max(len(a.prompt), len(a.teacher_prompt)) + len(a.response) for a in answers])
        losses, total = [], torch.zeros((), dtype=torch.float64, device=objective.policy.device)
        for part in my_micro_batches(cost, self.recipe.run.micro_tokens):
            some, counted = [answers[i] for i in part.rows.tolist()], tally if part.counts else Tally()
            loss = objective.loss(some, denominator, counted)
            (loss * part.weight).backward()
            losses.append({"loss": loss.detach()})
            total += loss.detach() * part.weight
        ranks().agree(not_finite(losses))
        self.whole = False
        return self.optimizer.step() | tally.means() | {"loss": float(ranks().sum(total.cpu(), "the loss"))}

    def position(self) -> dict[str, Any]:
        shaping = None if self.shaping is None else self.shaping.norm.state_dict()
        return {"batches": self.batches.state_dict(), "shaping": shaping}

    def state_dict(self) -> dict[str, Any]:
        return {
            "done": self.done,
            "model": kept_state(trainable(self.objective.policy)),
            "optimizer": self.optimizer.state_dict(),
            "teacher": self.objective.teacher.state_dict(),
            **self.position(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        load_trainable(self.objective.policy, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.objective.teacher.load_state_dict(state["teacher"])
        self.batches.load_state_dict(state["batches"])
        if self.shaping is not None:
            self.shaping.norm.load_state_dict(state["shaping"])
        self.engine.update_weights(self.done)
