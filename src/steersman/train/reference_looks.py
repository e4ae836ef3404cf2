"""What the policy says to held prompts, and how far it has gone from the reference there."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from steersman.config.sections import Section
from steersman.data import TrainingSet
from steersman.distributed.micro import my_micro_batches
from steersman.model import Policy, at_hand, context_length, whole_weights
from steersman.ops.masked import masked_sum
from steersman.ops.text import perplexity, text_stats
from steersman.plan.memory import SamplingLoad
from steersman.recipe.sections import RolloutConfig
from steersman.run.progress import ProgressLine
from steersman.run.seed import SamplingStream
from steersman.setup.generators import open_generator, sample_on_all_ranks
from steersman.setup.reference import Reference, divergence
from steersman.train.experience import tokens_of
from steersman.train.looks import answer_row
from steersman.train.session import Session
from steersman.train.tally import Tally
from steersman.types import Prompt, Sample, Stats


class SamplesConfig(Section):
    """Answers sampled on held prompts at every look at held-out data: KL to the reference, and text to read."""

    prompts: int | None = Field(
        default=None, ge=0, description="how many; 0 is off; null is 16 where the method has a reference, else 0"
    )
    max_new_tokens: int = Field(default=48, ge=1, description="longest answer, in tokens")
    stop: list[str] = Field(default_factory=list, description="strings that end an answer")
    eos_token_id: list[int] = Field(
        default_factory=list, description="ids that end an answer; empty takes the model's own"
    )

    def count(self, has_reference: bool) -> int:
        """How many prompts are answered."""
        return self.prompts if self.prompts is not None else 16 if has_reference else 0


class ReferenceLooks:
    """The same prompts, answered again and again with the same random streams, at temperature 1.

    `held_out/kl` estimates KL(pi || pi_ref) in nats per response (of at most `max_new_tokens` tokens). It is the
    mean over sampled responses of the sum over their steps of the whole distribution's divergence,

        E_{y ~ pi} sum_t KL(pi(. | y_<t) || pi_ref(. | y_<t)),

    which has the expectation of sum_t log pi/pi_ref without the noise of the sampled token, and is never below 0.
    `held_out/perplexity` is that of the responses under the reference.
    """

    def __init__(
        self, policy: Policy, reference: Reference, prompts: list[Prompt], config: SamplesConfig, session: Session
    ) -> None:
        self.policy, self.reference, self.prompts, self.session = policy, reference, prompts, session
        rollout = RolloutConfig(
            max_new_tokens=config.max_new_tokens, stop=config.stop, eos_token_id=config.eos_token_id
        )
        self.engine, self.sampling = open_generator(rollout, policy), rollout.sampling()

    def sampled(self) -> SamplingLoad:
        """What a look samples, for the forecast of memory."""
        longest, new_tokens = max(len(p.ids) for p in self.prompts), self.sampling.max_new_tokens
        return SamplingLoad(
            self.policy, len(self.prompts), longest, new_tokens, self.engine.limits(len(self.prompts))
        )

    @torch.no_grad()
    def look(self) -> Stats:
        """Samples, writes the answers to samples.jsonl once per step, and measures."""
        if not self.prompts:
            return {}
        with whole_weights(self.policy):
            samples = sample_on_all_ranks(
                self.engine, self.prompts, self.sampling, progress=ProgressLine("answers to held prompts"),
                seed=(self.session.config.seed, SamplingStream.TRAINING_LOOK),
            )  # fmt: skip
        self._write(samples)
        stats: Stats = {"held_out/length": sum(len(s.ids) for s in samples) / len(samples)}
        with at_hand(self.reference.separate):
            return stats | text_stats([s.text for s in samples]) | self._distance(samples)

    def _distance(self, samples: list[Sample]) -> Stats:
        tally, lengths = Tally(), torch.tensor([len(s.prompt.ids) + len(s.ids) for s in samples])
        for part in my_micro_batches(lengths, self.session.config.micro_tokens):
            tokens = tokens_of([samples[i] for i in part.rows.tolist()])
            hidden, hidden_ref = self.policy.hidden(tokens), self.reference.hidden(tokens)
            kl = divergence(hidden, self.policy.head(), hidden_ref, self.reference.head()).sum()
            logp_ref = masked_sum(self.reference.logp_from(tokens, hidden_ref).logp.cpu(), tokens.mask)
            if part.counts:
                tally.add("kl", kl, len(part.rows))
                tally.add("logp_ref", logp_ref, int(tokens.mask.sum()))
        means = tally.means()
        return {"held_out/kl": means["kl"], "held_out/perplexity": perplexity(-means["logp_ref"])}

    def _write(self, samples: list[Sample]) -> None:
        self.session.log.samples(self.session.step, [answer_row(s) for s in samples])


def reference_looks(
    policy: Policy, reference: Reference, data: TrainingSet[Any], config: SamplesConfig, session: Session
) -> ReferenceLooks | None:
    """The looks at the first different prompts of the data; None where no answer fits.

    Prompts that leave no room for an answer in the model's context are passed over.
    """
    count, context = config.count(True), context_length(policy.model)
    room = None if context is None else context - config.max_new_tokens
    fitting: list[list[int]] = []
    for group in data.groups:
        if len(fitting) == count:
            break
        one = group[0].prompt
        if one not in fitting and (room is None or len(one) <= room):
            fitting.append(one)
    if not fitting:
        return None
    prompts = [Prompt(one, policy.tokenizer.decode(one), index=i) for i, one in enumerate(fitting)]
    return ReferenceLooks(policy, reference, prompts, config, session)
