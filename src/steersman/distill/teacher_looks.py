"""How far the student is from its teacher on held-out prompts, answered again and again with the same streams."""

from __future__ import annotations

import torch

from steersman.data import EncodedSet
from steersman.distill.loop import Distill
from steersman.distill.rows import DistillSet
from steersman.distill.teacher import Answer
from steersman.distributed.micro import in_order, my_micro_batches
from steersman.objectives.supervised import SFT
from steersman.run.seed import SamplingStream
from steersman.train.looks import answer_row, standard_error
from steersman.train.session import Session
from steersman.train.tally import Tally
from steersman.types import Stats


class TeacherLooks:
    """`held_out/teacher_kl` is KL(student || teacher) in nats per answer, of the student's own answers: the mean over
    sampled answers of the sum over their tokens of the whole distributions' divergence; `held_out/teacher_kl_se` is
    its standard error over prompts. With another tokenizer it is `held_out/uld`, the sorted distance per token.
    Neither is measured where the teacher reads of other answers to a prompt, of which there is one here. Where the
    data have answers, `held_out/loss` is the student's loss on them, in nats per token.
    """

    def __init__(self, run: Distill, held: DistillSet) -> None:
        self.run, self.held = run, held
        count = run.recipe.rollout.held_out
        self.prompts, self.teacher_prompts = held.prompts[:count], held.teacher_prompts[:count]
        given: EncodedSet = EncodedSet([[e] for e in held.given_answers])
        self.given_loss = (
            SFT(run.objective.policy, given, given, run.recipe.run.micro_tokens) if given.groups else None
        )

    @torch.no_grad()
    def look(self, session: Session, step: int) -> Stats:
        """Samples and measures, and writes the answers to samples.jsonl."""
        stats = {} if self.given_loss is None else self.given_loss.evaluate()
        if not self.prompts:
            return stats
        seed = (self.run.recipe.run.seed, SamplingStream.TRAINING_LOOK)
        own = self.run.student_answers(self.prompts, 1, seed, self.teacher_prompts)
        stats |= {f"held_out/{name.replace('length/mean', 'length')}": x for name, x in own.stats.items()}
        stats |= {} if self.run.feedback is not None else self._distance(own.answers)
        session.log.samples(step, [answer_row(s) for s in own.samples])
        return stats

    def _distance(self, answers: list[Answer]) -> Stats:
        objective, teacher = self.run.objective, self.run.objective.teacher
        cost = torch.tensor([max(len(a.prompt), len(a.teacher_prompt)) + len(a.response) for a in answers])
        parts = my_micro_batches(cost, self.run.recipe.run.micro_tokens)
        if not teacher.reads_ids:
            tally = Tally()
            for part in parts:
                some = [answers[i] for i in part.rows.tolist()]
                objective.loss(some, 1, tally if part.counts else Tally())
            return {"held_out/uld": tally.means()["divergence"]}
        teacher.prepare(answers)
        found = []
        for part in parts:
            apart = objective.answer_divergence([answers[i] for i in part.rows.tolist()], "reverse_kl")
            found += [(part.rows, apart)] if part.counts else []
        teacher.forget(answers)
        kl = in_order(found).double()
        return {"held_out/teacher_kl": float(kl.mean())} | standard_error("held_out/teacher_kl_se", kl)
