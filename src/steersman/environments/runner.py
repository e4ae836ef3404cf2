"""Episodes side by side: who is to speak is sampled together, and environments answer in threads beside it.

By default all episodes take their turns in step: every reply of turn k is sampled in one call, then all environments
answer. What is computed together is then the same in every run, so a run repeats bit for bit where its environments
do. With `overlap` those that have their answer go on while others wait.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from steersman.data import Layout
from steersman.data.examples import Message
from steersman.environments.calls import form_of, read_reply
from steersman.environments.classes import FaultError
from steersman.environments.config import EnvironmentConfig
from steersman.environments.conversation import Conversation, TurnLayout
from steersman.environments.port import Answer, Environment, Episode, Reply
from steersman.environments.telling import as_users, with_tool_descriptions
from steersman.environments.text import shown
from steersman.environments.workers import Job, TooLateError, Workers
from steersman.rollout.port import Generator, Limits, Progress
from steersman.rollout.sampling import Sampling
from steersman.run.seed import sub_seed
from steersman.types import Prompt, Sample, Stats, SteersmanError


@dataclass(slots=True)
class Played:
    """One episode while it is played. `key` names its random streams, whatever is played beside it."""

    prompt: Prompt
    index: int
    order: int
    seed: int
    key: int
    episode: Episode | None = None
    talk: Conversation | None = None
    reply: Reply | None = None
    tries: int = 0
    waited: float = 0.0
    asked_at: float = 0.0
    outcome: str = ""
    terminated: bool = True


class Episodes:
    """A generator whose samples are whole episodes: see `rollout.port.Generator`.

    A sample's `prompt` holds what the episode began with. `mask` is True on what the policy said. Samples of one
    prompt begin alike: they share the environment's seed, not what is drawn for the policy.
    Raises SteersmanError for a template that has no tools or rewrites earlier turns, and for what does not fit.
    """

    def __init__(
        self, generator: Generator, environment: Environment, layout: Layout, ends: Sequence[int],
        config: EnvironmentConfig, context: int | None,
    ) -> None:  # fmt: skip
        self.generator, self.environment, self.config = generator, environment, config
        self.layout = TurnLayout(layout, ends)
        self.limit = min(x for x in (config.max_tokens, context, 1 << 40) if x is not None)
        self.form = self._form()
        self.faults: list[str] = []
        self._probe()

    # -- the port of a generator -----------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        record_support: bool = False,
        progress: Progress | None = None,
    ) -> list[Sample]:
        """`n` episodes of each prompt, those of the first prompt first."""
        words = (seed,) if isinstance(seed, int) else tuple(seed)
        games = self._games(prompts, n, words)
        self.faults = []
        workers = Workers(min(self.config.workers, len(games) or 1))
        play = _Play(self, games, sampling, words, record_support, workers, progress)
        try:
            return play.run()
        finally:
            workers.close()
            for game in games:
                _closed(game)

    def update_weights(self, version: int) -> Stats:
        return self.generator.update_weights(version)

    def close(self) -> None:
        self.generator.close()

    def limits(self, sequences: int) -> Limits:
        return self.generator.limits(sequences)

    # -- how it begins ---------------------------------------------------------------------------------------

    def _games(self, prompts: Sequence[Prompt], n: int, words: tuple[int, ...]) -> list[Played]:
        met: dict[int, int] = {}
        games = []
        for place, prompt in enumerate(prompts):
            again = met[prompt.index] = met.get(prompt.index, -1) + 1
            seed = sub_seed(0, "environment", *words, prompt.index, again)
            for j in range(n):
                key = sub_seed(0, "episode", prompt.index, again, j)
                games.append(Played(prompt, j, place * n + j, seed, key))
        return games

    def opened(self, game: Played, messages: Sequence[Message]) -> None:
        """Lays out what the episode begins with. Raises FaultError where the first reply does not fit behind it."""
        first: list[Message] = [dict(m) for m in messages]  # type: ignore[misc]
        if self.environment.tools and self.config.tell_tools:
            first = with_tool_descriptions(first, self.environment.tools)
        elif self.environment.tools and self.layout.chat:
            first[0] = {**first[0], "tools": self.environment.tools}
        ids, text = self.layout.first(first)
        prompt = Prompt(ids, text, game.prompt.row, game.prompt.index, game.prompt.turns)
        game.talk = Conversation(self.layout, prompt, first)

    def answered(self, game: Played, messages: Sequence[Message], room: int) -> bool:
        """Puts the environment's messages behind the reply; False where another reply does not fit behind them."""
        talk, reply = game.talk, game.reply
        assert talk is not None
        assert reply is not None
        calls = []
        if self.config.tell_tools or not self.layout.chat:
            messages = as_users(messages) if self.layout.chat else messages
        else:
            made = [{"name": c.name, "arguments": c.arguments} for c in reply.calls]
            calls = [{"type": "function", "id": f"call{i:05d}", "function": f} for i, f in enumerate(made)]
            tools = iter(range(len(calls)))
            messages = [
                {**m, "tool_call_id": f"call{next(tools, 0):05d}"} if m["role"] == "tool" else m for m in messages
            ]
        try:
            new = talk.between(self.layout.stand_in(calls), messages)
        except SteersmanError as error:
            raise FaultError(f"the chat template can't show the environment's turn: {error}") from error
        if len(talk.prompt.ids) + len(talk.ids) + len(new) + room > self.limit:
            return False
        talk.heard(new)
        return True

    def _form(self) -> str | None:
        if not self.environment.tools:
            return None
        if self.config.tell_tools or not self.layout.chat:
            return "tagged"
        form = form_of(self.layout.template)
        if form is None:
            raise SteersmanError(
                "environment: the model's chat template shows no tool calls; set environment.tell_tools to tell the "
                "tools in the prompt, or use a model whose template has them"
            )
        return form

    def _probe(self) -> None:
        if self.config.history == "keep":
            return
        first: list[Message] = [{"role": "user", "content": "a"}]
        new: list[Message] = [{"role": "user", "content": "b"}]
        if self.form is not None and not self.config.tell_tools and self.layout.chat:
            first[0]["tools"] = self.environment.tools
            new = [{"role": "tool", "name": "probe", "content": "b"}]
        found = self.layout.rewriting(first, new)
        if found is not None:
            raise SteersmanError(
                f"environment: the chat template shows earlier turns otherwise than they were said ({found}). Set "
                "environment.history: keep, with which the model sees its turns as it said them, or use another "
                "template"
            )


@dataclass
class _Play:
    """One call of `Episodes.generate`."""

    of: Episodes
    games: list[Played]
    sampling: Sampling
    words: tuple[int, ...]
    record_support: bool
    workers: Workers
    progress: Progress | None
    ready: list[Played] = field(default_factory=list)
    over: int = 0
    tokens: int = 0

    def run(self) -> list[Sample]:
        for game in self.games:
            self._begin(game)
        while self.over < len(self.games):
            self.collect(everything=not self.of.config.overlap)
            if self.ready:
                self._speak()
        return [self._sample(game) for game in self.games]

    # -- the environment's side --------------------------------------------------------------------------------

    def collect(self, *, everything: bool) -> None:
        """Takes what environments have answered: all that are asked, or those that have, and one at least."""
        while self.workers.pending:
            for job in self.workers.take(wait=not self.ready or everything):
                self._settle(job)
            if self.ready and not everything:
                return

    def _begin(self, game: Played) -> None:
        def begin() -> Any:
            episode = self.of.environment.open()
            turns: list[Any] = [dict(m) for m in game.prompt.turns or []]
            return episode, episode.begin(turns, dict(game.prompt.row), game.seed)

        game.tries += 1
        self._submit(game, begin)

    def _submit(self, game: Played, call: Any) -> None:
        game.asked_at = time.monotonic()
        self.workers.submit(game.order, call, self.of.config.time_limit)

    def _settle(self, job: Job) -> None:
        game = self.games[job.key]
        game.waited += time.monotonic() - game.asked_at
        if game.outcome:
            return
        if job.error is not None:
            self._failed(game, job.error)
        elif game.talk is None:
            game.episode, messages = job.result
            try:
                self.of.opened(game, messages)
            except (FaultError, TypeError, KeyError) as error:
                return self._failed(game, error)
            assert game.talk is not None
            if len(game.talk.prompt.ids) + self.sampling.max_new_tokens > self.of.limit:
                return self._failed(game, FaultError(_no_room(game.talk, self.sampling, self.of.limit)))
            self.ready.append(game)
        else:
            self._answer(game, job.result)

    def _answer(self, game: Played, answer: Answer) -> None:
        talk = game.talk
        assert talk is not None
        talk.paid(answer.reward, "".join(m["content"] for m in answer.messages))
        limit = self.of.config.episode_limit
        if answer.done or answer.truncated:
            self._end(game, "done" if answer.done else "the environment's limit", answer.done)
        elif len(talk.turns) >= self.of.config.max_turns:
            self._end(game, "turn limit", False)
        elif limit is not None and game.waited > limit:
            self._end(game, "time limit", False)
        else:
            try:
                fits = self.of.answered(game, answer.messages, self.sampling.max_new_tokens)
            except FaultError as error:
                return self._failed(game, error)
            if fits:
                self.ready.append(game)
            else:
                self._end(game, "token limit", False)

    def _failed(self, game: Played, error: BaseException) -> None:
        """An environment that hung, raised or gave nonsense: as `on_fault` says."""
        config = self.of.config
        if isinstance(error, SteersmanError):
            raise error
        late = isinstance(error, TooLateError)
        what = (
            f"took longer than {config.time_limit:g} s"
            if late
            else f"{type(error).__name__}: {shown(str(error), 300)}"
        )
        if game.talk is None and game.tries <= config.retries:
            game.episode = None
            return self._begin(game)
        what = f"{'its beginning' if game.talk is None else f'turn {len(game.talk.turns)}'}: {what}"
        self.of.faults.append(what)
        if config.on_fault == "stop":
            raise SteersmanError(
                f"environment, row {game.prompt.index}, {what} (environment.on_fault is stop)"
            ) from error
        if game.talk is not None and game.talk.turns:
            game.talk.paid(config.fault_reward if config.on_fault == "end" else 0.0, "")
        if late:
            game.episode = None  # its thread still holds it
        self._end(game, f"fault at {what}", config.on_fault == "end")

    def _end(self, game: Played, outcome: str, terminated: bool) -> None:
        game.outcome, game.terminated = outcome, terminated
        self.over += 1
        _closed(game)
        if self.progress is not None:
            self.progress(self.over, len(self.games), self.tokens)

    # -- the policy's side -------------------------------------------------------------------------------------

    def _speak(self) -> None:
        """One reply of every episode that waits for one, in the order of the prompts."""
        games, self.ready = sorted(self.ready, key=lambda g: g.order), []
        by_turn: dict[int, list[Played]] = {}
        for game in games:
            assert game.talk is not None
            by_turn.setdefault(len(game.talk.turns), []).append(game)
        for turn, some in sorted(by_turn.items()):
            prompts = [Prompt(g.talk.asked(), "", {}, g.key) for g in some if g.talk is not None]
            replies = self.of.generator.generate(
                prompts, self.sampling, n=1, seed=(*self.words, turn), record_support=self.record_support
            )
            for game, reply in zip(some, replies, strict=True):
                self.said(game, reply)

    def said(self, game: Played, sample: Sample) -> None:
        """Takes a reply over and gives it to the episode's environment."""
        talk, episode = game.talk, game.episode
        assert talk is not None
        assert episode is not None
        self.tokens += len(sample.ids)
        talk.said(sample)
        reply = game.reply = read_reply(sample.text, self.of.form, cut=sample.finish == "length")
        self._submit(game, lambda: episode.step(reply))

    def _sample(self, game: Played) -> Sample:
        talk = game.talk
        if talk is None or not talk.turns:  # nothing was said: one token that does not count stands for it
            ids = game.prompt.ids if talk is None else talk.prompt.ids
            prompt = Prompt(ids, game.prompt.text, game.prompt.row, game.prompt.index, game.prompt.turns)
            support = [torch.tensor(ids[-1:])] if self.record_support else None
            return Sample(prompt, ids[-1:], [0.0], "length", "", game.index, support, [False], [0], [], game.outcome)
        return talk.sample(game.index, terminated=game.terminated, outcome=game.outcome)


def _no_room(talk: Conversation, sampling: Sampling, limit: int) -> str:
    return (
        f"the episode begins with {len(talk.prompt.ids)} tokens, which with {sampling.max_new_tokens} of a reply are "
        f"more than {limit}"
    )


def _closed(game: Played) -> None:
    episode, game.episode = game.episode, None
    if episode is not None:
        try:
            episode.close()
        except Exception:
            return
