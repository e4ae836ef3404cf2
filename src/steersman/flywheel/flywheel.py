"""What the loops share: prompts, answers, grades, and the look at held-out prompts after each round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from steersman.data import Batches, mixture, wraps
from steersman.data.needed import with_needed
from steersman.data.rows import BadRows
from steersman.flywheel.players import Player, load_queries, text_of, usable
from steersman.flywheel.refresh import refresh_judge
from steersman.flywheel.sections import LoopRecipe
from steersman.judge.config import JudgeConfig
from steersman.judge.judge import SharedJudge
from steersman.judge.scored import Scorer
from steersman.model import load_tokenizer
from steersman.ops.text import distinct_n, perplexity
from steersman.recipe.sections import ModelConfig
from steersman.run.files.ledger import Ledger, Rows
from steersman.run.seed import SamplingStream
from steersman.train.looks import standard_error
from steersman.train.stopping import Stopping
from steersman.types import Stats, SteersmanError


class Flywheel:
    """A loop's standing parts, and its steps as tables in the ledger.

    `train` and `held` are the prompts; the judge decides what is learned, `gold` (the recipe's `watch`) only looks.
    """

    def __init__(self, ledger: Ledger, recipe: LoopRecipe) -> None:
        self.ledger, self.recipe = ledger, recipe
        ledger.shared = {"parallel": recipe.parallel.model_dump()}
        tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
        self.train, self.held = load_queries(recipe.data, recipe.rollout.held_out, wrap=wraps(tokenizer, recipe.data))
        self.ending, self.paths = Stopping(recipe.stop), list[str]()
        self.judge = self.open_judge(recipe.judge)
        self.gold = Scorer(recipe.watch, ledger.device) if recipe.watch else None
        bad = BadRows(recipe.data.on_bad_row)
        for needs in (self.judge.needs, *(() if self.gold is None else (self.gold.needs,))):
            self.train, self.held = with_needed(self.train, needs, bad), with_needed(self.held, needs, bad)
        if bad.counts:
            ledger.log.note(bad.sentence)
        # Rows carry their prompts as turns already where the recipe wraps them.
        self.data = recipe.data.model_copy(update={"wrap_in_chat": False})
        self.start = self.player(recipe.model.path)
        ledger.at_end(self.start.release)
        size = min(recipe.rollout.prompts, len(self.train))
        mix = mixture(recipe.data, [query.row.part for query in self.train])
        self.batches = Batches(
            len(self.train), size, recipe.run.seed, shuffle=recipe.data.shuffle, drop_last=True, mix=mix
        )

    def open_judge(self, config: JudgeConfig) -> SharedJudge:
        """A judge, with its cache in the run folder."""
        ledger = self.ledger  # not the loop itself, which holds the judge
        stopping = lambda: bool(ledger.signal)  # noqa: E731
        return SharedJudge(config, ledger.path / "judge.jsonl", stopping=stopping, device=ledger.device)

    def player(self, path: str, model: ModelConfig | None = None) -> Player:
        """The model at `path`, in the recipe's precision unless `model` says another; who opens it releases it."""
        config = (model or self.recipe.model).model_copy(update={"path": path, "lora": None})
        return Player(config, self.recipe.run, self.ledger.device)

    def batch(self, number: int) -> list[int]:
        """The prompts of batch `number` (from 0), by place; batches pass over all prompts before any comes again."""
        fresh = Batches(
            self.batches.size, self.batches.batch_size, self.recipe.run.seed, shuffle=self.batches.shuffle,
            drop_last=True, mix=self.batches.mix,
        )  # fmt: skip
        return next(islice(fresh.forever(), number, None))

    def answers(self, name: str, player: Player, batch: int, n: int, seat: int = 0) -> Rows:
        """Table: `n` answers of a player to the prompts of a batch, as they were sampled.

        Players in different seats draw from different random streams, so that a model can meet itself.
        """
        return player.answers(
            self.ledger, name, self.train, self.batch(batch), self.data, self.recipe.rollout, n=n,
            seed=(self.recipe.run.seed, batch, seat), batch=batch,
        )  # fmt: skip

    def grade_rows(self, name: str, source: str, rows: Rows) -> Rows:
        """Table: the usable rows of `source` with the judge's `grade`; ungraded ones are left out and counted."""
        kept, left_out = usable(rows, self.recipe.unfinished)
        if not kept:
            raise SteersmanError(
                f"none of {len(rows)} sampled answers can be used ({left_out_text(left_out)}); raise "
                "rollout.max_new_tokens, or set unfinished to trim or keep"
            )

        def make() -> Rows:
            grades = self.judge.grade([(r["prompt"], r["completion"]) for r in kept], self.columns(kept))
            return [{**r, "grade": g} for r, g in zip(kept, grades, strict=True) if g is not None]

        graded = self.ledger.table(
            name, make, judge=self.about_judge(), made_from=self.ledger.sources(source), left_out=left_out
        )
        if not graded:
            raise SteersmanError(f"the judge graded none of {len(kept)} answers: {self.judge.describe()}")
        return graded

    def columns(self, rows: Rows) -> list[dict[str, Any]]:
        """The data's other columns of each row's prompt, for rewards that need them."""
        return [self.train[r["index"]].columns for r in rows]

    def look(self, number: int, path: str) -> tuple[Stats, Rows]:
        """Answers the held-out prompts with the same random streams each round, and measures them.

        `kl` is nats per answer to the model before round 1, estimated from the answers; `win_rate` is against
        that model's answers by the judge; each `gold/...` has its standard error beside it (`standard_error`).
        """
        name = f"round-{number:02d}/held-out"
        rows = self.ledger.table(
            name, lambda: self._look(path), model=self.ledger.model(path), streams=[SamplingStream.FLYWHEEL_LOOK]
        )
        self.judge.counts.clear()
        before = rows if number == 0 else self.ledger.rows("round-00/held-out")
        stats: Stats = {
            "reward/judge": _mean([r["grade"] for r in rows if r["grade"] is not None]),
            "kl": _mean([r["logp"] - r["logp_start"] for r in rows]),
            "perplexity": perplexity(-sum(r["logp_plain"] for r in rows) / max(sum(r["tokens"] for r in rows), 1)),
            "text/distinct2": distinct_n([r["completion"] for r in rows], 2),
            "length": _mean([r["tokens"] for r in rows]),
            "finish/ended": _mean([float(r["finish"] != "length") for r in rows]),
        }
        if number:
            stats |= self.against(rows, before)
        for part in rows[0]["gold"]:
            values = torch.tensor([r["gold"][part] for r in rows], dtype=torch.float64)
            stats |= {f"gold/{part}": float(values.mean())} | standard_error(f"gold_se/{part}", values)
        return stats, [_shown(r) for r in rows]

    def against(self, rows: Rows, before: Rows) -> Stats:
        """The share of held-out prompts won against the first model's answers, a tie counting half."""
        outcomes = self.judge.compare(
            [(r["prompt"], r["completion"], b["completion"]) for r, b in zip(rows, before, strict=True)],
            [self.held[r["index"]].columns for r in rows],
        )
        shares = [o.share for o in outcomes if o is not None]
        return ({"win_rate/start": _mean(shares)} if shares else {}) | self.judge.stats()

    def ends(self, path: str, stats: Stats) -> bool:
        """Counts in the look at a round's model; whether the loop should end with it, as the section `stop` says.

        Where it goes on and the recipe says `refresh`, the judge of the next round is trained.
        """
        self.paths.append(path)
        number = len(self.paths) - 1
        stop = self.recipe.stop
        self.ending.add(0.0 if stop is None else stats[f"gold/{stop.judge}"], stats["kl"])
        if (why := self.ending.reason) is not None:
            self.ledger.log.note(f"ended after round {number} of {self.recipe.rounds}: {why}")
        elif self.recipe.refresh is not None and 0 < number < self.recipe.rounds:
            self.judge = self.open_judge(refresh_judge(self, number, path))
        return why is not None

    def about_judge(self) -> dict[str, Any]:
        """The judge for provenance, without addresses or names of keys."""
        hidden = {"key_env", "url", "timeout", "retries", "max_wait", "concurrency"}
        return self.judge.config.model_dump(
            mode="json", exclude={"endpoint": hidden, "cache": True}, exclude_defaults=True
        )

    def finish(self, more: dict[str, Any] | None = None) -> dict[str, Any]:
        """Writes the summary: the last round's model, or the best one's where the recipe has `stop`, and the held-out
        numbers before and after."""
        rows = [r for r in self.ledger.metrics() if "reward/judge" in r]
        path, first, last = self.paths[self.ending.best], rows[0], rows[self.ending.best]
        shown = [k for k in last if k not in ("step", "seconds") and not k.startswith(("judge/", "data/"))]
        compared = {
            f"{k}_{when}": r[k] for k in shown if k in first for when, r in (("before", first), ("after", last))
        }
        return self.ledger.summary({"model": path, **compared, **(more or {})})

    def _look(self, path: str) -> Rows:
        rollout = self.recipe.rollout
        with self.player(path) as player:
            rows, samples = player.answer(
                self.held, range(len(self.held)), self.data, rollout, n=1,
                seed=(self.recipe.run.seed, SamplingStream.FLYWHEEL_LOOK),
            )  # fmt: skip
        logp = [sum(s.logp) for s in samples]  # as sampled from, beside the whole starting model
        logp_start = self.start.logp(samples, rollout.temperature)
        plain = self.start.logp(samples)
        columns = [self.held[r["index"]].columns for r in rows]
        grades = self.judge.grade([(r["prompt"], r["completion"]) for r in rows], columns)
        texts = [r["completion"] for r in rows]
        gold = self.gold([r["prompt"] for r in rows], texts, columns) if self.gold is not None else {}
        gold.pop("total", None)
        self.start.release()
        return [
            {
                **r, "logp": logp[i], "logp_start": logp_start[i], "logp_plain": plain[i], "grade": grades[i],
                "gold": {part: values[i] for part, values in gold.items()},
            }
            for i, r in enumerate(rows)
        ]  # fmt: skip


def left_out_text(counts: dict[str, int]) -> str:
    """ "3 empty, 2 unfinished", or "none left out"."""
    return ", ".join(f"{n} {reason}" for reason, n in counts.items() if n) or "none left out"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    reward = {"judge": row["grade"], **row["gold"]}
    return {
        "index": row["index"], "prompt": text_of(row["prompt"]), "completion": row["completion"],
        "finish": row["finish"], "reward": {k: v for k, v in reward.items() if v is not None},
    }  # fmt: skip
