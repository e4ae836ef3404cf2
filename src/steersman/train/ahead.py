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
Everything that was sampled ahead is in the checkpoint. A batch that failed before it had its rewards is there as far
as it came: its samples are rewarded when the run goes on, or its prompts are sampled then, by the weights of then.

Of several ranks the first does all of this, and the others get each batch when it is due.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
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


@dataclass(slots=True)
class Begun:
    """How far a batch came: the prompts that it was given (None where it draws them when it is its turn, after which
    `order` is how the order of prompts stood then), and its samples once they are there."""

    prompts: list[Prompt] | None
    samples: list[Sample] | None = None
    order: dict[str, Any] | None = None


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
        self.begun_as: dict[int, Begun] = {}
        self.again: dict[int, list[Prompt]] = {}
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
        last = self.done + self.recipe.rollout.ahead
        for number in [n for n in self.again if n <= last]:
            self._begin(number, self.again.pop(number))
        while self.next_batch <= last:
            self._begin(self.next_batch, None if self.algorithm.resampling() else self.next_prompts())
            self.next_batch += 1
        for used in [number for number in self.under_way if number < self.done]:
            del self.under_way[used], self.begun_as[used]
        return self.under_way[self.done].result()

    def adapt(self, stats: Stats) -> None:
        super().adapt(stats)
        stats |= self._lag
        if self._lag["ahead/lag_max"] and "ratio_gap" in stats:
            stats["ahead/ratio_gap"] = stats.pop(
                "ratio_gap"
            )  # how far the policy has moved: no fault, so not watched

    def _begin(self, number: int, prompts: list[Prompt] | None) -> None:
        self.begun_as[number] = Begun(prompts)
        self.under_way[number] = self.schedule.begin(number, lambda: self._make(number, prompts))

    def _make(self, number: int, prompts: list[Prompt] | None) -> Batch:
        """Samples and rewards one batch, in a thread of the schedule's.

        Where a method draws prompts anew by their rewards, a batch takes its prompts when it is its turn, and the
        next one waits for its rewards too: the order of prompts is then the same every time.
        """
        self._now.number, self._now.redraws = number, self.algorithm.resampling() > 0

        def batch() -> Batch:
            if prompts is None:
                self.begun_as[number].order = copy.deepcopy(self._order_now())
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
        self.begun_as[self._now.number].samples = samples
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
            ahead, begun, order = [], self.next_batch, None
            for number, prompts in self.again.items():
                asked = [prompt.index for prompt in prompts]
                ahead.append({"number": number, "prompts": asked, **_stored([], None)})
            for number in sorted(n for n in self.under_way if n >= self.done):
                failed, at = self.under_way[number].exception(), self.begun_as[number]
                if failed is None:
                    ahead.append({"number": number, **_stored(*self.under_way[number].result())})
                elif at.prompts is None:  # those after it drew their prompts behind it, and are drawn again too
                    begun, order = number, at.order
                    break
                else:
                    asked = [prompt.index for prompt in at.prompts]
                    ahead.append({"number": number, "prompts": asked, **_stored(at.samples or [], None)})
            return {"ahead": ahead, "begun": begun, **(order or self._order_now())}

        mine = ranks().from_main(of_main, "what was sampled ahead")
        return {**super().state_dict(), **mine}

    def position(self) -> dict[str, Any]:
        """The order of prompts goes with the batches that were begun, whatever becomes of a step."""
        return {name: part for name, part in super().position().items() if name not in self._order_now()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the batches that were sampled ahead; one that would be too old now, because `rollout.ahead` was
        lowered, has its prompts sampled again."""
        super().load_state_dict(state)
        ranks().from_main(lambda: self._take_up(state), "what was sampled ahead")

    def _take_up(self, state: dict[str, Any]) -> None:
        self.next_batch = state["begun"]
        self.schedule.restart_at(self.done)
        self._forget_what_follows()
        home = {prompt.index: prompt for prompt in self.prompts}
        for kept in state["ahead"]:
            number, (samples, scores) = kept["number"], _restored(kept, home)
            asked = kept.get("prompts", list(dict.fromkeys(s.prompt.index for s in samples)))
            prompts = [home[index] for index in asked]
            oldest = min((v for s in samples for v in s.version or [self.done]), default=self.done)
            if not samples or number - oldest > self.recipe.rollout.ahead:
                self.again[number] = prompts
                continue
            self.begun_as[number] = Begun(prompts, samples)
            if scores is None:
                self._note(number, "sampled", samples)
                self.under_way[number] = self.schedule.begin(number, partial(self._reward, number, samples))
                continue
            self.under_way[number] = Future()
            self.under_way[number].set_result((samples, scores))
            self._note(number, "rewarded", samples)
        self.schedule.restart_at(min(self.again, default=self.next_batch), self.under_way)

    def _reward(self, number: int, samples: list[Sample]) -> Batch:
        """The batch of samples that have no rewards yet, in a thread of the schedule's."""
        with alone():
            made = samples, self.roles.score(samples)
        self._note(number, "rewarded", samples)
        return made

    def _forget_what_follows(self) -> None:
        """Of the ledger stays what the checkpoint's iterations have used; what came after is done again."""
        rows = [row for row in read_jsonl(self.ledger) if row["stands"] == "used" and row["batch"] < self.done]
        write_atomic(self.ledger, jsonl_text(rows))


FIELDS = ("ids", "logp", "finish", "text", "index", "support", "mask", "version")
"""What a checkpoint keeps of a sample; its prompt is found by its index."""


def _stored(samples: list[Sample], scores: Scores | None) -> dict[str, Any]:
    """A batch as plain lists and tensors, which a checkpoint holds."""
    rows = [{name: getattr(s, name) for name in FIELDS} | {"prompt": s.prompt.index} for s in samples]
    if scores is None:
        return {"samples": rows}
    return {"samples": rows, "total": scores.total, "parts": dict(scores.parts), "per_token": scores.per_token}


def _restored(kept: dict[str, Any], home: dict[int, Prompt]) -> tuple[list[Sample], Scores | None]:
    samples = [Sample(home[row["prompt"]], **{name: row[name] for name in FIELDS}) for row in kept["samples"]]
    if "total" not in kept:
        return samples, None
    return samples, Scores(kept["total"], kept["parts"], kept["per_token"])
