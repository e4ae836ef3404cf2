"""`steersman simulate-users`: personas talk with candidates, a judge compares, and people say how far to believe it.

    each persona pursues its goal with each candidate for some turns  ->  conversations-NAME.jsonl
    the judge compares the candidates' conversations, persona by persona  ->  battles.jsonl
    the same judge compares what people have judged  ->  agreement.jsonl, shown beside every verdict

A candidate that says nothing where another one answers has lost that comparison; the judge is not asked.
Without enough judgements of people the verdict says that it is unchecked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from pydantic import Field, model_validator
from rich.table import Table

from steersman.config.dump import changed_keys
from steersman.config.sections import Section, key_names
from steersman.data.examples import Message, user
from steersman.guards.terminal import printable
from steersman.judge import Judge, JudgeConfig, open_judge
from steersman.judge.personas import END, first_paragraph, play
from steersman.judge.scored import as_text
from steersman.people.agreement import ENOUGH, Agreement, agreement
from steersman.people.sources import open_judgements
from steersman.people.talkers import Said, Talker, TalkerConfig, Turns, open_talker
from steersman.run.console import new_console
from steersman.run.files.ledger import Ledger, Rows
from steersman.run.run_config import STEPS_ONLY, RunConfig
from steersman.statistics.estimates import Estimate, share
from steersman.statistics.ratings import Battle, ratings
from steersman.types import Progress, Stats, SteersmanError

HANDLING = frozenset({"url", "key_env", "timeout", "retries", "max_wait", "concurrency", "batch", "device"})
"""Keys of a speaker that say how it is reached, and not what it says."""


class Persona(Section):
    """Someone with a goal."""

    character: str = Field(description="who it is, and how this person writes")
    goal: str = Field(description="what this person wants to get from the conversation")
    opening: str = Field(default="", description="the first message; empty: the simulated user writes it")


class HumanConfig(Section):
    """People's judgements that check the judge."""

    folder: str | None = Field(default=None, description="folder or file of judgements; null: there are none")
    needed: int = Field(default=ENOUGH, ge=10, description="decided items below which no agreement is stated")


class SimulateRecipe(Section):
    """Personas, the candidates that they talk with, and who judges."""

    candidates: dict[str, TalkerConfig] = Field(description="name: {path} or {endpoint}; the first is the yardstick")
    personas: dict[str, Persona] = Field(description="name: {character, goal, opening}")
    user: TalkerConfig = Field(description="the model that plays the personas")
    judge: JudgeConfig = Field(description="who compares two conversations")
    human: HumanConfig = HumanConfig()
    turns: int = Field(default=3, ge=1, description="messages of the user in a conversation, at most")
    conversations: int = Field(default=1, ge=1, description="conversations of each persona with each candidate")
    run: RunConfig = RunConfig()

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return key_names(run=STEPS_ONLY)

    @model_validator(mode="after")
    def _enough(self) -> SimulateRecipe:
        if len(self.candidates) < 2 or not self.personas:
            raise ValueError("give two candidates at least, and one persona at least")
        if any(not all(c.isalnum() or c in "-_." for c in name) or name.startswith(".") for name in self.candidates):
            raise ValueError("candidates: names are made of letters, digits, -, _ and .; they become files")
        return self


@dataclass(slots=True)
class Talk:
    """A conversation; `cut` counts, by role, the messages that a limit ended."""

    messages: Turns = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=lambda: {"user": 0, "assistant": 0})


@dataclass(frozen=True, slots=True)
class Meeting:
    """The conversations of candidates `a` and `b` with the same persona."""

    a: str
    b: str
    one: dict[str, Any]
    other: dict[str, Any]


def run(recipe: SimulateRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Lets them talk, judges, and prints the table with how far the judge agrees with people."""
    people = [] if recipe.human.folder is None else list(open_judgements(recipe.human.folder))
    with Ledger("simulate-users", recipe, resume=resume, rounds=0) as ledger:
        _require_same(ledger, recipe)
        judge = open_judge(recipe.judge, ledger.path, stopping=lambda: bool(ledger.signal), device=ledger.device)
        judge.needs([])  # conversations are no rows of data: a reward that needs a column is refused
        opened = {"user": recipe.user} | {f"candidates.{name}": one for name, one in recipe.candidates.items()}
        talkers = {who: open_talker(who, config, recipe.run, ledger.device) for who, config in opened.items()}
        talks = {name: _conversations(ledger, recipe, name, talkers) for name in recipe.candidates}
        talkers["user"].release()
        met = _met(talks)
        about = {"made_from": _sources(ledger, recipe), **_about_battles(recipe)}
        battles = ledger.table("battles", lambda: _battles(recipe, judge, met), **about)
        agrees = agreement(judge, people, needed=recipe.human.needed)
        ledger.table("agreement", lambda: [{"said": str(agrees), "items": agrees.items}])
        if not battles:
            raise SteersmanError(f"no comparison is decided. {' '.join(_doubts(talks, met, battles))}")
        wins = win_rates(recipe, battles)
        stats: Stats = {f"win_rate/{name}": found.value for name, found in wins.items()} | judge.stats()
        ledger.finish_round(0, stats, _shown(talks))
        _show(recipe, battles, wins, agrees)
        for doubt in _doubts(talks, met, battles):
            ledger.log.note(doubt, style="yellow")
        told = {name: found.plain() for name, found in wins.items()}
        return ledger.summary({"win_rates": told, "agreement": str(agrees), "checked": agrees.accuracy is not None})
    return ledger.summary({})


def converse(
    persona: Persona, candidate: Talker, speaker: Talker, *, turns: int, count: int, seed: int
) -> list[Talk]:
    """`count` conversations of a persona with a candidate, up to `turns` messages of the user each.

    A conversation ends when the user leaves, says nothing, or no longer fits into a model's context.
    """
    talks = [Talk() for _ in range(count)]
    going = talks
    for turn in range(turns):
        said = [Said(persona.opening)] * len(going)
        if turn or not persona.opening:
            asked = [user(play(persona.character, persona.goal, talk.messages)) for talk in going]
            told = speaker.reply(asked, (seed, turn, 0))
            said = [Said(first_paragraph(one.text, cut=one.cut), one.cut) for one in told]
        going = _heard(going, [Said() if END in one.text else one for one in said], "user")
        going = _heard(going, candidate.reply([talk.messages for talk in going], (seed, turn, 1)), "assistant")
    return talks


def _heard(talks: list[Talk], said: list[Said], role: str) -> list[Talk]:
    """The conversations in which something was said, which then goes on there."""
    for talk, one in zip(talks, said, strict=True):
        if one.text:
            talk.messages.append({"role": role, "content": one.text})
            talk.cut[role] += one.cut
    return [talk for talk, one in zip(talks, said, strict=True) if one.text]


def win_rates(recipe: SimulateRecipe, battles: Rows) -> dict[str, Estimate]:
    """Each candidate's share won against the first one, with the interval over personas."""
    first, *others = recipe.candidates
    out: dict[str, Estimate] = {}
    for name in others:
        met = [row for row in battles if {row["first"], row["second"]} == {first, name}]
        won = np.array([row["share"] if row["first"] == name else 1 - row["share"] for row in met])
        _, personas = np.unique([row["persona"] for row in met], return_inverse=True)
        if len(met):
            out[name] = share(won, personas)
    return out


def _conversations(ledger: Ledger, recipe: SimulateRecipe, name: str, talkers: dict[str, Talker]) -> Rows:
    """Table: the conversations of every persona with a candidate, persona by persona."""
    candidate = talkers[f"candidates.{name}"]

    def make(span: range, _progress: Progress) -> Rows:
        return [row for place in span for row in talked(place)]

    def talked(place: int) -> Rows:
        persona = list(recipe.personas)[place]
        seed = recipe.run.seed * 1000 + place
        talks = converse(
            recipe.personas[persona], candidate, talkers["user"], turns=recipe.turns, count=recipe.conversations,
            seed=seed,
        )  # fmt: skip
        return [
            {"persona": persona, "number": i, "messages": talk.messages, "cut": talk.cut}
            for i, talk in enumerate(talks)
        ]

    rows = ledger.parts(f"conversations-{name}", len(recipe.personas), make, **_about_talks(recipe, name))
    candidate.release()
    return rows


def _about_talks(recipe: SimulateRecipe, name: str) -> dict[str, Any]:
    """What a candidate's conversations are made from."""
    speakers = {"candidate": recipe.candidates[name], "user": recipe.user}
    return {
        "candidate": name, "user": recipe.user.path or "an endpoint", "turns": recipe.turns,
        "conversations": recipe.conversations, "seeds_from": recipe.run.seed * 1000,
        "speakers": {who: _said_of(one.model_dump(mode="json")) for who, one in speakers.items()},
        "personas": {who: one.model_dump(mode="json") for who, one in recipe.personas.items()},
    }  # fmt: skip


def _about_battles(recipe: SimulateRecipe) -> dict[str, Any]:
    budget = {"max_calls", "max_tokens", "on_budget", "cache"}
    judge = _said_of(recipe.judge.model_dump(mode="json", exclude=budget))
    return {"candidates": list(recipe.candidates), "judge": judge}


def _said_of(section: dict[str, Any]) -> dict[str, Any]:
    """A speaker's settings without those that change nothing of what is said."""
    return {k: _said_of(v) if isinstance(v, dict) else v for k, v in section.items() if k not in HANDLING}


def _require_same(ledger: Ledger, recipe: SimulateRecipe) -> None:
    """Raises SteersmanError where a table that is there was made from other settings: the verdict would be of these,
    and stand beside what the recipe says now."""
    tables = {f"conversations-{name}": _about_talks(recipe, name) for name in recipe.candidates}
    for name, about in {**tables, "battles": _about_battles(recipe)}.items():
        made = ledger.provenance(name)
        changes = changed_keys({k: made[k] for k in about if k in made}, {k: about[k] for k in about if k in made})
        if changes:
            raise SteersmanError(
                f"{ledger.path / name}.jsonl was made with other settings ({'; '.join(changes[:3])}): put them back, "
                "or begin anew with another --run.dir"
            )


def _sources(ledger: Ledger, recipe: SimulateRecipe) -> dict[str, str]:
    return ledger.sources(*(f"conversations-{name}" for name in recipe.candidates))


def _met(talks: dict[str, Rows]) -> list[Meeting]:
    """Every two candidates, conversation by conversation, where the persona spoke to both."""
    return [
        Meeting(a, b, one, other)
        for a, b in combinations(talks, 2)
        for one, other in zip(talks[a], talks[b], strict=True)
        if one["messages"] and other["messages"]
    ]


def _battles(recipe: SimulateRecipe, judge: Judge, met: list[Meeting]) -> Rows:
    """What became of each meeting: 1 the first one served its persona better; two that said nothing tie."""
    heard = [m for m in met if _answered(m.one) and _answered(m.other)]
    outcomes = judge.compare(
        [(_goal(recipe.personas[m.one["persona"]]), _told(m.one), _told(m.other)) for m in heard]
    )
    judged = {id(m): None if o is None else o.share for m, o in zip(heard, outcomes, strict=True)}
    shares = [judged.get(id(m), (1 + _answered(m.one) - _answered(m.other)) / 2) for m in met]
    return [
        {"persona": m.one["persona"], "number": m.one["number"], "first": m.a, "second": m.b, "share": share,
         "by": "judge" if id(m) in judged else "silence"}
        for m, share in zip(met, shares, strict=True)
        if share is not None
    ]  # fmt: skip


def _doubts(talks: dict[str, Rows], met: list[Meeting], battles: Rows) -> list[str]:
    """What a reader of the table has to know of conversations that are none, or not whole."""
    out: list[str] = []
    for name, rows in talks.items():
        spoken = [row for row in rows if row["messages"]]
        silent = sum(not _answered(row) for row in spoken)
        if silent:
            out.append(
                f"candidates.{name} said nothing in {silent:,} of {len(spoken):,} conversations; against a candidate "
                "that answered these count as lost."
            )
        if len(spoken) < len(rows):
            out.append(
                f"user said nothing to candidates.{name} in {len(rows) - len(spoken):,} of {len(rows):,} "
                "conversations, which count for nothing."
            )
    undecided = len(met) - len(battles)
    if undecided:
        out.append(f"judge gave no verdict on {undecided:,} of {len(met):,} comparisons; these are left out.")
    every = [row for rows in talks.values() for row in rows]
    speakers = {f"candidates.{name}": ("assistant", rows) for name, rows in talks.items()} | {"user": ("user", every)}
    for who, (role, rows) in speakers.items():
        cut, count = sum(row["cut"][role] for row in rows), sum(_said(row, role) for row in rows)
        if cut:
            out.append(f"{who}: the limit cut {cut:,} of {count:,} messages; a higher one lets them end.")
    return out


def _goal(persona: Persona) -> str:
    return (
        f"A person came to an assistant.\nWho it is: {persona.character}\nWhat this person wants: {persona.goal}\n"
        "Each answer below is a whole conversation. The better one serves this person better."
    )


def _told(row: dict[str, Any]) -> str:
    turns: list[Message] = row["messages"]
    return as_text(turns)


def _answered(row: dict[str, Any]) -> bool:
    return _said(row, "assistant") > 0


def _said(row: dict[str, Any], role: str) -> int:
    return sum(m["role"] == role for m in row["messages"])


def _show(recipe: SimulateRecipe, battles: Rows, wins: dict[str, Estimate], agrees: Agreement) -> None:
    console, anchor = new_console(), next(iter(recipe.candidates))
    places = {name: i for i, name in enumerate(recipe.personas)}
    fought = [Battle(b["first"], b["second"], b["share"], places[b["persona"]]) for b in battles]
    table = Table("candidate", "rating", "95% interval", f"share won against {printable(anchor)}", "battles")
    for one in ratings(fought, anchor=anchor, seed=recipe.run.seed):
        won = str(wins[one.player]) if one.player in wins else "–"
        table.add_row(
            printable(one.player), f"{one.rating:.0f}", one.interval, won,
            f"{one.battles:,}",
        )  # fmt: skip
    console.print(table)
    style = "bold" if agrees.accuracy is not None else "yellow"
    console.print(f"The judge of these conversations {agrees}.", style=style)


def _shown(talks: dict[str, Rows]) -> Rows:
    return [
        {"index": i, "prompt": f"{row['persona']} with {name}", "completion": _told(row), "finish": "", "reward": {}}
        for i, (name, row) in enumerate((n, r) for n, rows in talks.items() for r in rows[:5])
    ]
