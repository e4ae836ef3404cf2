"""`steersman wheel`: what people say today makes the model of tomorrow, if it passes its gates and people prefer it.

    each turn:  collect -> sift -> mix -> train -> measure -> gates -> serve to a share -> A/B test -> keep or not

Every step is a table or a stage of the ledger: made once, with where it came from, and not again after a kill. A
turn waits for judgements twice: to begin, and until its A/B test is decided.

    judgements.folder      grows; whoever collects appends to it
    serving.json           which models answer now; a server reads it
    round-01/collected.jsonl, taken-back.jsonl, kept.jsonl, left-out.jsonl, pairs.jsonl, 1-dpo/, readings.jsonl,
    evaluation.jsonl, gates.jsonl, test.jsonl, decision.jsonl, each with its provenance
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

from steersman.data import BadRows, Row, RowError
from steersman.flywheel.players import text_of
from steersman.model import load_tokenizer
from steersman.people.experiments import Experiment, report
from steersman.people.filters import prompt_key, sift
from steersman.people.judgements import Judgement, Judgements, judgement, plain
from steersman.people.outcomes import outcomes_of
from steersman.people.serving import ServedModel, Serving
from steersman.people.sources import half_written, open_judgements
from steersman.people.store.database import StoreAwayError
from steersman.people.wheel.gates import check
from steersman.people.wheel.lessons import is_held_out
from steersman.people.wheel.measuring import Measuring
from steersman.people.wheel.page import write_page
from steersman.people.wheel.recipe import LEARNS, WheelRecipe
from steersman.people.wheel.training import Training
from steersman.run.files.ledger import Ledger, Rows
from steersman.statistics.estimates import Estimate
from steersman.types import Stats, SteersmanError


class WaitingError(Exception):
    """The turn can not go on before more judgements are in, or their store is back; the message says which."""


def run(recipe: WheelRecipe, *, resume: bool = False, source: Judgements | None = None) -> dict[str, Any]:
    """Turns the wheel as far as the judgements allow, and returns the summary that the run folder holds.

    `source` gives the judgements in the place of the recipe's folder. The summary's `state` is `done`, or says what
    the wheel waits for: run the verb again with --resume when it is there, or let it `poll`.
    """
    with Ledger(
        "wheel", recipe, resume=resume, rounds=recipe.turns, headline=("human/accuracy", "win_rate")
    ) as ledger:
        wheel = Wheel(ledger, recipe, source)
        if ledger.done < 0:
            ledger.finish_round(0, {}, [])
        state = wheel.turn()
        summary = ledger.summary({"state": state, **wheel.decisions()})
        write_page(ledger.path, recipe, summary)
        return summary
    return ledger.summary({"state": "stopped"})


class Wheel:
    """The models that are served, and the turns that change them."""

    def __init__(self, ledger: Ledger, recipe: WheelRecipe, source: Judgements | None) -> None:
        self.ledger, self.recipe = ledger, recipe
        self.bad = BadRows(recipe.judgements.on_bad_row, "judgements.on_bad_row")
        self.source = source or open_judgements(recipe.judgements.folder, self.bad)
        tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
        self.chats = bool(tokenizer.chat_template)
        self.data = recipe.limits.data(recipe.judgements.folder, chats=self.chats)
        self.current = ServedModel("turn-00", recipe.model.path)
        self.reached = False

    def turn(self) -> str:
        """Turns as often as it can, and says what it waits for, or that it is done.

        While a test runs, `serving.json` stays as it is until the test is decided; turns that are done are only read.
        """
        for number in range(1, self.recipe.turns + 1):
            one = Turn(self, number)
            if number > self.ledger.done and not self.rows(number, "test"):
                self.serve(number, None)
            while True:
                try:
                    decision = one.go()
                    break
                except WaitingError as waiting:
                    self.serve(number, one.candidate if one.testing else None)
                    self.ledger.log.note(f"the wheel waits: {waiting}")
                    write_page(self.ledger.path, self.recipe, {"state": str(waiting), **self.decisions()})
                    if self.recipe.poll is None:
                        return str(waiting)
                self._pause(self.recipe.poll)
            self.ledger.log.note(f"turn {number}: {decision['decision']}: {decision['reason']}")
            if decision["decision"] == "promoted":
                self.current = one.candidate
        self.serve(self.recipe.turns, None)
        return "done"

    def said(self) -> list[Judgement]:
        """All judgements so far.

        A row that somebody is still writing, and a store that was there before and is away now, are waited for as
        judgements are; raises WaitingError then. At the beginning, and by a wheel that does not poll, an absent store
        raises StoreAwayError: its address may be wrong.
        """
        self.bad.counts.clear()  # of this reading, not of all that were
        try:
            found = list(self.source)
        except RowError as bad:
            file = half_written(self.recipe.judgements.folder)
            if file is None:
                raise
            raise WaitingError(
                f"the last line of {file} has no end; where nobody is writing it, it was cut short: remove it"
            ) from bad
        except StoreAwayError as away:
            if self.recipe.poll is None or not self.reached:
                raise
            raise WaitingError(f"{away}; it is asked again in {self.recipe.poll:g} seconds") from away
        self.reached = True
        return found

    def serve(self, number: int, candidate: ServedModel | None) -> None:
        """Writes down which models answer people now, where the file says something else."""
        _, salt = self.split(number)
        told = Serving(number, self.current.absolute(), None if candidate is None else candidate.absolute(), salt)
        path = self.ledger.path / "serving.json"
        if not path.exists() or path.read_text(encoding="utf-8") != told.text:
            told.write(path)

    def split(self, number: int) -> tuple[float, str]:
        """The share of users who meet a turn's candidate, and the salt that draws them: those that its test began
        with, whatever the recipe says since."""
        for row in self.rows(number, "test"):
            return row["share"], row["salt"]
        experiment = self.recipe.experiment
        share, own = (1.0, "") if experiment is None else (experiment.share, experiment.salt)
        return share, f"{own}/{self.recipe.run.seed}/{number}"

    def decisions(self) -> dict[str, Any]:
        """The decisions so far, with candidates' folders as this process finds them, and the model that serves."""
        decisions = [self.rows(n, "decision") for n in range(1, self.recipe.turns + 1)]
        made = [{**row, "path": self.found(row["path"])} for rows in decisions for row in rows]
        return {"model": self.current.path, "serving": self.current.name, "decisions": made}

    def rows(self, number: int, name: str) -> Rows:
        """A table that is there, or nothing."""
        return self.ledger.rows(f"round-{number:02d}/{name}")

    def found(self, inside: str) -> str:
        """The path of a candidate's folder, which tables name within the run folder; empty where there is none."""
        return str(self.ledger.path / inside) if inside else ""

    def judgements(self, number: int, name: str) -> list[Judgement]:
        """The judgements of a table of every turn up to `number`."""
        return [
            judgement(Row(row, f"round-{n:02d}/{name}.jsonl", i))
            for n in range(1, number + 1)
            for i, row in enumerate(self.rows(n, name), 1)
        ]

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.ledger.check()
            time.sleep(min(0.2, seconds))


class Turn:
    """One turn of the wheel: `go` takes up its steps where they were left."""

    def __init__(self, wheel: Wheel, number: int) -> None:
        self.wheel, self.number, self.name = wheel, number, f"round-{number:02d}"
        self.ledger, self.recipe = wheel.ledger, wheel.recipe
        self.share, self.salt = wheel.split(number)
        self.candidate, self.testing = self._served(""), False

    def go(self) -> dict[str, Any]:
        """The decision; raises WaitingError where judgements are missing."""
        made = self.wheel.rows(self.number, "decision")
        if made and self.number <= self.ledger.done:
            self.candidate = self._served(self.wheel.found(made[0]["path"]))
            return made[0]
        self.collect()
        learn, earlier, held_out = self.sift()
        path = self.train(learn, earlier)
        if path is None:
            return self.decide("refused", "no judgement of this turn teaches anything", {})
        self.candidate = self._served(path)
        metrics = Measuring(self.ledger, self.recipe, self.name, self.wheel.data).metrics(
            self.candidate.path, self.wheel.current.path, held_out
        )
        gates = check(self.recipe.gates, metrics)
        about = {"candidate": self.ledger.model(path), "made_from": self.ledger.sources(f"{self.name}/evaluation")}
        self.ledger.table(f"{self.name}/gates", lambda: [asdict(g) for g in gates], **about)
        failed = [f"{g.metric}: {g.reason}" for g in gates if not g.passed]
        if failed:
            return self.decide("refused", "; ".join(failed), metrics)
        if self.recipe.experiment is None:
            return self.decide("promoted", "it passed every gate, and the recipe asks for no test", metrics)
        return self.test(self.recipe.experiment, metrics)

    def _served(self, path: str) -> ServedModel:
        return ServedModel(f"turn-{self.number:02d}", path, self.share)

    def collect(self) -> None:
        """Tables: the judgements that no earlier turn has taken, once there are enough of them and a prompt among all
        is held out, and which of earlier turns are there no more."""
        if not self.wheel.rows(self.number, "collected"):
            said, old = self.wheel.said(), {one.id for one in self.wheel.judgements(self.number - 1, "collected")}
            new = [one for one in said if one.id not in old]
            count, wanted = sum(one.expected is None for one in new), self.recipe.judgements.at_least
            if count < wanted:
                raise WaitingError(f"turn {self.number} begins with {wanted} new judgements, and {count} are in")
            here = {one.id for one in said}
            earlier = [one for one in self.wheel.judgements(self.number - 1, "collected") if one.id in here]
            if not self._held_out(sift([*earlier, *new], self.recipe.sift)[0]):
                raise WaitingError(
                    f"turn {self.number} begins once a prompt is held out, which measures the candidate: of those of "
                    f"{len(earlier) + len(new)} judgements none is yet; raise judgements.held_out "
                    f"({self.recipe.judgements.held_out:g}), or have more prompts judged"
                )
            left_out = dict(self.wheel.bad.counts)
            self.ledger.table(f"{self.name}/collected", lambda: [plain(one) for one in new], left_out=left_out)
        self.ledger.table(f"{self.name}/taken-back", self._taken_back)

    def _taken_back(self) -> Rows:
        old = self.wheel.judgements(self.number - 1, "collected")
        here = {one.id for one in self.wheel.said()} if old else set[str]()
        return [{"id": one.id} for one in old if one.id not in here]

    def sift(self) -> tuple[list[Judgement], list[Judgement], list[Judgement]]:
        """Tables: what this turn keeps and leaves out of its judgements; given are those to learn from, those of
        earlier turns to learn from, and all that are held out.

        Judgements of earlier turns are sifted again by all that is known now, without those that were taken back: a
        rater who is found bad later teaches and measures nothing any more. Raises SteersmanError where none is held
        out, which is before anything is trained.
        """
        taken_back = {row["id"] for row in self.wheel.rows(self.number, "taken-back")}
        rows = [one for one in self.wheel.judgements(self.number, "collected") if one.id not in taken_back]
        kept, left_out = sift(rows, self.recipe.sift)
        mine = {row["id"] for row in self.wheel.rows(self.number, "collected")}
        collected = [f"round-{n:02d}/collected" for n in range(1, self.number + 1)]
        about = {
            "made_from": self.ledger.sources(f"{self.name}/taken-back", *collected),
            "sift": self.recipe.sift.model_dump(),
        }
        self.ledger.table(
            f"{self.name}/left-out",
            lambda: [{"id": one.id, "user": one.user, "reason": why} for one, why in left_out if one.id in mine],
            **about,
        )
        self.ledger.table(f"{self.name}/kept", lambda: [plain(one) for one in kept if one.id in mine], **about)
        held_out = self._held_out(kept)
        if not held_out:
            raise SteersmanError(
                f"judgements.held_out is {self.recipe.judgements.held_out:g}, and of the judgements that turn "
                f"{self.number} has taken none that counts is of a prompt that is held out, so nothing could be said "
                "of the candidate; raise it, and go on with --resume"
            )
        measures = {one.id for one in held_out}
        teach = [one for one in kept if one.id not in measures]
        return [one for one in teach if one.id in mine], [one for one in teach if one.id not in mine], held_out

    def _held_out(self, kept: list[Judgement]) -> list[Judgement]:
        """Those that measure: of prompts that the recipe holds out, and that no turn has learned from.

        A prompt that taught while `judgements.held_out` was smaller measures nothing any more.
        """
        taught = {
            prompt_key(row["prompt"])
            for number in range(1, self.number + 1)
            for kind in dict.fromkeys(LEARNS.values())
            for row in self.wheel.rows(number, kind)
            if row["source"] != "anchor"
        }
        share = self.recipe.judgements.held_out
        return [one for one in kept if is_held_out(one, share) and prompt_key(one.prompt) not in taught]

    def train(self, learn: list[Judgement], earlier: list[Judgement]) -> str | None:
        """The candidate's folder; None where nothing of this turn teaches anything."""
        training = Training(self.ledger, self.recipe, self.name, chats=self.wheel.chats)
        tables = training.tables(learn, earlier)
        return training.run(self.wheel.current.path, tables) if any(tables.values()) else None

    def test(self, experiment: Experiment, metrics: dict[str, Estimate]) -> dict[str, Any]:
        """People meet the candidate, blind, and their choices decide; raises WaitingError until they have.

        What was said of the model that stands while the candidate was trained belongs to no arm.
        """
        names = {"control": self.wheel.current.name, "treatment": self.candidate.name}
        split = {"share": self.share, "salt": self.salt}
        asked = experiment.model_copy(update=names | split).model_dump(mode="json")
        about = {"models": [self.ledger.model(s.path) for s in (self.wheel.current, self.candidate)]}
        collected = {one.id for one in self.wheel.judgements(self.number, "collected")}

        def begin() -> Rows:
            """The experiment, and which judgements came before anybody could meet the candidate."""
            return [{**asked, "before": [one.id for one in self.wheel.said() if one.id not in collected]}]

        (begun,) = self.ledger.table(f"{self.name}/test", begin, **about)
        before = collected | set(begun.pop("before", []))
        if not self.testing and (begun != asked or experiment.share != self.share):
            self.ledger.log.note(
                f"turn {self.number}: its test goes on as it began ({self.name}/test.jsonl); what the recipe says of "
                "the experiment now holds from the next turn on",
                style="yellow",
            )
        self.testing = True
        rows = [one for one in self.wheel.said() if one.id not in before]
        told = report(Experiment(**begun), outcomes_of(rows, **names))
        if told.decision == "wait" and not self.wheel.rows(self.number, "decision"):
            raise WaitingError(
                f"turn {self.number} is tested: {told.primary} (its {told.primary.metric} of {self.candidate.name} "
                f"against {self.wheel.current.name})"
            )
        what = "promoted" if told.decision == "treatment" else "rolled back"
        return self.decide(what, told.reason, metrics, asdict(told))

    def decide(
        self, decision: str, reason: str, metrics: dict[str, Estimate], told: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Table: the decision, which stands; the round is done."""
        row = {
            "turn": self.number, "decision": decision, "reason": reason, "candidate": self.candidate.name,
            "path": self.ledger.model(self.candidate.path)["path"] if self.candidate.path else "",
            "against": self.wheel.current.name, "test": told,
        }  # fmt: skip
        models = [self.ledger.model(s.path) for s in (self.wheel.current, self.candidate) if s.path]
        made = self.ledger.table(f"{self.name}/decision", lambda: [row], models=models)[0]
        stats: Stats = {name: found.value for name, found in metrics.items() if math.isfinite(found.value)}
        stats["promoted"] = float(made["decision"] == "promoted")
        if made["test"] is not None:
            stats["win_rate"] = made["test"]["primary"]["look"]["mean"]
        self.ledger.finish_round(self.number, stats, _shown(self.wheel.rows(self.number, "answers-candidate")))
        return made


def _shown(rows: Rows) -> Rows:
    kept = ("index", "completion", "finish")
    return [{"prompt": text_of(row["prompt"]), **{k: row[k] for k in kept}} for row in rows[:40]]
