"""Tries an environment without a model: does a seed repeat, do episodes end, what do they pay, how slow are they?"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from steersman.data.examples import Message
from steersman.environments.classes import FaultError
from steersman.environments.play import kept_of_fault, said_of_fault
from steersman.environments.port import Answer, Call, Environment, Episode, Reply
from steersman.guards.user_code import user_code
from steersman.run.seed import sub_seed
from steersman.types import Prompt, SteersmanError

Player = Callable[[random.Random], Reply]


@dataclass(slots=True)
class Findings:
    """`wrong` is what must be mended, `notes` what one should know, `facts` what was measured."""

    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class EpisodeTrace:
    """What one episode did: everything that the environment said, and what it paid."""

    messages: list[str] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    ended: bool = False
    fault: str = ""


def try_episodes(
    environment: Environment, prompts: Sequence[Prompt], *, episodes: int, max_turns: int, time_limit: float,
    low: float, high: float,
) -> Findings:  # fmt: skip
    """Plays episodes at random, each twice with one seed. `low` and `high` are the range that a turn may pay.

    Raises SteersmanError for an environment that asks the process to end, or whose calls take more than `time_limit`
    seconds each.
    """
    found = Findings(notes=environment.findings())
    courses, unlike = [], 0
    for i in range(episodes):
        prompt = prompts[i % len(prompts)]
        with user_code(f"environment, the random player's episode {i + 1}", time_limit * (max_turns + 1)):
            one, two = (play_episode(environment, prompt, i, max_turns) for _ in range(2))
        unlike += (one.messages, one.rewards) != (two.messages, two.rewards)
        courses.append(one)
    if unlike:
        found.notes.append(
            f"{unlike} of {episodes} episodes were otherwise the second time with the same seed and replies: a "
            "resumed run will not be the same bit for bit"
        )
    faults = sorted({c.fault for c in courses if c.fault})
    found.wrong += [f"an episode failed: {fault}" for fault in faults[:5]]
    paid = [r for c in courses for r in c.rewards]
    outside = [r for r in paid if not low <= r <= high]
    if outside:
        found.wrong.append(f"{len(outside)} rewards lie outside [{low:g}, {high:g}], such as {outside[0]:g}")
    ended = sum(c.ended for c in courses)
    if not ended:
        found.wrong.append(f"none of {episodes} episodes ended within {max_turns} turns")
    if environment.pays and len(set(paid)) == 1:
        found.notes.append(f"every reward of the random player is {paid[0]:g}: it may be too rare to learn from")
    seconds = [s for c in courses for s in c.seconds]
    totals = [sum(c.rewards) for c in courses]
    found.facts |= {
        "episodes that ended": f"{ended} of {episodes}, within {max_turns} turns",
        "a random player earns": f"{sum(totals) / len(totals):.3g} on average, {max(totals):.3g} at best",
        "time per step": f"{sum(seconds) / max(len(seconds), 1):.2g} s, {max(seconds, default=0):.2g} at most",
        "longest message": f"{max((len(s) for c in courses for s in c.messages), default=0)} characters",
    }
    return found


def try_one_episode(environment: Environment, prompt: Prompt) -> list[str]:
    """What one short episode at random shows before a run: what failed, and whether its seed repeats."""
    one, two = (play_episode(environment, prompt, 0, 2) for _ in range(2))
    found = environment.findings()
    if one.fault:
        found.append(f"an episode failed: {one.fault}")
    elif (one.messages, one.rewards) != (two.messages, two.rewards):
        found.append("the same seed gives another episode: a resumed run will not be the same bit for bit")
    return found


def play_episode(environment: Environment, prompt: Prompt, number: int, max_turns: int) -> EpisodeTrace:
    """One episode of a random player; the number names its streams."""
    out = EpisodeTrace()
    try:
        with closing(environment.open()) as episode:
            _play(episode, player_of(environment), out, prompt, number, max_turns)
    except SteersmanError:
        raise
    except (SystemExit, Exception) as error:
        fault = str(error) if isinstance(error, FaultError) else said_of_fault(error)
        out.fault = f"{fault}{kept_of_fault('environment, one episode at random', error)}"
    return out


def _play(episode: Episode, player: Player, out: EpisodeTrace, prompt: Prompt, number: int, max_turns: int) -> None:
    luck = random.Random(sub_seed(0, "player", number))
    turns: list[Message] = [dict(m) for m in prompt.turns or []]  # type: ignore[misc]
    begun = episode.begin(turns, dict(prompt.row), sub_seed(0, "check", number))
    if turns and not begun:  # without data there may be no prompt either
        raise FaultError("begin gave no message")
    out.messages.append("".join(m["content"] for m in begun))
    while len(out.rewards) < max_turns and not out.ended:
        start = time.monotonic()
        answer: Answer = episode.step(player(luck))
        out.seconds.append(time.monotonic() - start)
        out.messages.append("".join(m["content"] for m in answer.messages))
        out.rewards.append(answer.reward)
        out.ended = answer.done or answer.truncated


def player_of(environment: Environment) -> Player:
    """Who says any of the actions, or calls any tool with any arguments, or says words; and stops now and then."""
    if environment.actions:
        return lambda luck: _plain(luck.choice(list(environment.actions)))
    if environment.tools:
        return lambda luck: _called(luck, environment.tools)
    return lambda luck: _plain(luck.choice(["yes", "no", "a", "1", "", "hello there", "\u00e9\U0001f600"]))


def _plain(text: str) -> Reply:
    return Reply(text, text)


def _called(luck: random.Random, tools: Sequence[dict[str, Any]]) -> Reply:
    if luck.random() < 0.2:
        return _plain("done")
    function = luck.choice(list(tools))["function"]
    properties = function["parameters"].get("properties", {})
    return Reply("", "", (Call(function["name"], {name: _any(luck, p) for name, p in properties.items()}),))


def _any(luck: random.Random, schema: dict[str, Any]) -> Any:
    if "enum" in schema:
        return luck.choice(schema["enum"])
    kind = schema.get("type")
    makers: dict[Any, Callable[[], Any]] = {
        "integer": lambda: luck.randint(-3, 9),
        "number": lambda: luck.uniform(-3, 9),
        "boolean": lambda: luck.random() < 0.5,
        "array": list,
        "object": dict,
        "null": lambda: None,
    }
    return makers.get(kind, lambda: luck.choice(["", "a", "hello"]))()
