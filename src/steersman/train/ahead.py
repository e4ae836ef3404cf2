"""The on-policy loop with its sampler ahead: batches are made while the policy learns from earlier ones.

Iteration t learns from batch t. With `rollout.ahead: k` batch b may begin once b - k iterations are done, so
every token comes from weights of version b - k or newer: the staleness limit holds by construction, also after a
resume.
`rollout.in_flight` says what the weights of a batch are:

    finish   batch b is sampled by version max(0, b - k) exactly; new weights wait until older batches are sampled.
             The schedule is a function of the recipe, and a run that was killed goes on to the same weights.
    cut      new weights go to the servers at once; answers under way are cut and go on under them.

Sampling, rewards and learning overlap: batches are sampled one after another, in order, and each is then rewarded
while the next is sampled; a reward is never called twice at a time, not by a look at held-out prompts either.
Everything that was sampled ahead is in the checkpoint.

Of several ranks the first does all of this, and the others get each batch when it is due.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from steersman.atomic import write_atomic
from steersman.distributed.ranks import alone, ranks
from steersman.jsonl import append_jsonl, jsonl_text, read_jsonl
from steersman.reward import Scores
from steersman.rollout.remote.schedule import Schedule
from steersman.setup.generators import MainRankGenerator
from steersman.train.on_policy import Clock, OnPolicy
from steersman.train.roles import Roles
from steersman.types import Prompt, Sample, Stats, SteersmanError

Batch = tuple[list[Sample], Scores]
LEDGER = "rollouts.jsonl"
"""In the run folder: a row whenever a batch is begun, sampled, rewarded or used, with its prompts and versions."""


class Ahead(OnPolicy):
    """An on-policy run whose batches are sampled up to `rollout.ahead` iterations before they are learned from."""

    def __init__(self, recipe: Any, roles: Roles, prompts: Sequence[Prompt], batches: Any) -> None:
        super().__init__(recipe, roles, prompts, batches)
        rollout = recipe.rollout
        engine: Any = roles.engine  # the recipe allows no other engine with `ahead`
        made = partial(Schedule, ahead=rollout.ahead, cut=rollout.in_flight == "cut")
        if ranks().world == 1:
            roles.engine = self.schedule = made(engine)
        else:
            self._of_ranks: MainRankGenerator = engine
            if schedule := engine.wrap_engine(made):
                self.schedule = schedule
        self.ledger = Path(recipe.run.dir) / LEDGER
        self.under_way: dict[int, Future[Batch]] = {}
        self.next_batch = 0
        self._now = threading.local()

    def next_samples(self, clock: Clock) -> Batch:
        """The batch of this iteration, when it is there, on every rank."""
        if ranks().world > 1:
            self._of_ranks.send_first()
        samples, scores = ranks().from_main(self._due, "a batch that was sampled ahead")
        clock.lap("rollout")
        lag = [self.done - v for s in samples for v in s.version or []]
        self._lag: Stats = {"ahead/lag": sum(lag) / len(lag), "ahead/lag_max": float(max(lag))}
        if max(lag) > self.recipe.rollout.ahead:
            raise SteersmanError(
                f"batch {self.done} has tokens of {max(lag)} versions ago, and rollout.ahead is "
                f"{self.recipe.rollout.ahead}: this is a fault of steersman's, please report it"
            )
        if ranks().main:
            self._note(self.done, "used", samples)
        return samples, scores

    def _due(self) -> Batch:
        """Begins all batches that may begin, and waits for this iteration's."""
        if not self.next_batch:
            self._forget_what_follows()  # of a run that died before its first checkpoint
        while self.next_batch <= self.done + self.recipe.rollout.ahead:
            self._begin(self.next_batch, None if self.algorithm.resampling() else self.next_prompts())
        batch = self.under_way[self.done].result()
        del self.under_way[self.done]
        return batch

    def adapt(self, stats: Stats) -> None:
        super().adapt(stats)
        stats |= self._lag
        if self._lag["ahead/lag_max"] and "ratio_gap" in stats:
            stats["ahead/ratio_gap"] = stats.pop(
                "ratio_gap"
            )  # how far the policy has moved: no fault, so not watched

    def _begin(self, number: int, prompts: list[Prompt] | None) -> None:
        self.next_batch = number + 1
        self.under_way[number] = self.schedule.begin(number, lambda: self._make(number, prompts))

    def _make(self, number: int, prompts: list[Prompt] | None) -> Batch:
        """Samples and rewards one batch, in a thread of the schedule's.

        Where a method draws prompts anew by their rewards, a batch takes its prompts when it is its turn, and the
        next one waits for its rewards too: the order of prompts is then the same every time.
        """
        self._now.number, self._now.redraws = number, self.algorithm.resampling() > 0

        def batch() -> Batch:
            asked = self.next_prompts() if prompts is None else prompts
            self._note(number, "begun", (), asked)
            return self.sample(asked, None, number)

        with alone():
            made = self.schedule.sample(number, batch) if self._now.redraws else batch()
        self._note(number, "rewarded", made[0])
        return made

    def _scored(self, prompts: list[Prompt], seed: tuple[int, ...], clock: Clock) -> Batch:
        engine, roles, n = self.schedule.engine, self.roles, self.recipe.rollout.samples

        def draw() -> list[Sample]:
            return engine.generate(prompts, roles.sampling, n=n, seed=seed, record_support=True)

        samples = draw() if self._now.redraws else self.schedule.sample(self._now.number, draw)
        self._note(self._now.number, "sampled", samples)
        return samples, roles.score(samples)

    def _note(self, batch: int, stands: str, samples: Sequence[Sample], prompts: Sequence[Prompt] = ()) -> None:
        """Writes down where a batch stands: its samples, or its prompts before there are any."""
        asked = [*prompts, *(sample.prompt for sample in samples)]
        versions = [v for sample in samples for v in sample.version or []]
        row: dict[str, Any] = {"batch": batch, "stands": stands, "prompts": list({p.index: None for p in asked})}
        if versions:
            row["versions"] = [min(versions), max(versions)]
        append_jsonl(self.ledger, row)

    # -- what a resumed run needs -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Waits for the batches under way and keeps them whole. The order of prompts is that of rank 0, which alone
        takes any."""

        def of_main() -> dict[str, Any]:
            kept = {number: batch.result() for number, batch in sorted(self.under_way.items())}
            ahead = [{"number": number, **_stored(*batch)} for number, batch in kept.items()]
            order = {"batches": self.batches.state_dict(), "waiting": self.waiting}
            return {"ahead": ahead, "begun": self.next_batch, **order}

        mine = ranks().from_main(of_main, "what was sampled ahead")
        return {**super().state_dict(), **mine}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the batches that were sampled ahead; one that would be too old now, because `rollout.ahead` was
        lowered, has its prompts sampled again."""
        super().load_state_dict(state)
        ranks().from_main(lambda: self._take_up(state), "what was sampled ahead")

    def _take_up(self, state: dict[str, Any]) -> None:
        self.next_batch = state["begun"]
        self.schedule.restart_at(self.done)
        self._forget_what_follows()
        again, home = [], {prompt.index: prompt for prompt in self.prompts}
        for kept in state["ahead"]:
            number, (samples, scores) = kept["number"], _restored(kept, home)
            oldest = min(v for s in samples for v in s.version or [self.done])
            if number - oldest > self.recipe.rollout.ahead:
                again.append((number, list({s.prompt.index: s.prompt for s in samples}.values())))
                continue
            self.under_way[number] = Future()
            self.under_way[number].set_result((samples, scores))
            self._note(number, "rewarded", samples)
        self.schedule.restart_at(again[0][0] if again else self.next_batch)
        for number, prompts in again:
            self._begin(number, prompts)
        self.next_batch = state["begun"]

    def _forget_what_follows(self) -> None:
        """Of the ledger stays what the checkpoint's iterations have used; what came after is done again."""
        rows = [row for row in read_jsonl(self.ledger) if row["stands"] == "used" and row["batch"] < self.done]
        write_atomic(self.ledger, jsonl_text(rows))


FIELDS = ("ids", "logp", "finish", "text", "index", "support", "mask", "version")
"""What a checkpoint keeps of a sample; its prompt is found by its index."""


def _stored(samples: list[Sample], scores: Scores) -> dict[str, Any]:
    """A batch as plain lists and tensors, which a checkpoint holds."""
    rows = [{name: getattr(s, name) for name in FIELDS} | {"prompt": s.prompt.index} for s in samples]
    return {"samples": rows, "total": scores.total, "parts": dict(scores.parts), "per_token": scores.per_token}


def _restored(kept: dict[str, Any], home: dict[int, Prompt]) -> Batch:
    samples = [Sample(home[row["prompt"]], **{name: row[name] for name in FIELDS}) for row in kept["samples"]]
    return samples, Scores(kept["total"], kept["parts"], kept["per_token"])
