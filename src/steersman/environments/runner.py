"""A generator of whole episodes: replies are sampled together, and environments answer in threads beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steersman.data import Layout
from steersman.data.examples import Message
from steersman.environments.calls import form_of
from steersman.environments.classes import FaultError
from steersman.environments.config import EnvironmentConfig
from steersman.environments.conversation import Conversation, TurnLayout
from steersman.environments.play import Play, Played, closed
from steersman.environments.port import Environment
from steersman.environments.schedules import as_answers_come, joining, turn_by_turn
from steersman.environments.telling import as_users, with_tool_descriptions
from steersman.environments.workers import Workers
from steersman.rollout.port import Generator, Limits, Progress
from steersman.rollout.sampling import Sampling
from steersman.run.seed import sub_seed
from steersman.types import Prompt, Sample, Stats, SteersmanError

_NO_LIMIT = 1 << 40


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
        self.limit = min(x for x in (config.max_tokens, context, _NO_LIMIT) if x is not None)
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
        play = Play(self, games, sampling, words, record_support, workers, progress)
        try:
            play.begin()
            self._schedule(play)
            return play.samples()
        finally:
            workers.close()
            for game in games:
                closed(game)

    def update_weights(self, version: int) -> Stats:
        return self.generator.update_weights(version)

    def close(self) -> None:
        self.generator.close()

    def limits(self, sequences: int) -> Limits:
        return self.generator.limits(sequences)

    def joinable(self, sampling: Sampling, **room: Any) -> None:
        """Episodes don't join a batch: their turns do."""

    def _schedule(self, play: Play) -> None:
        if not self.config.overlap:
            return turn_by_turn(play, self.generator)
        if self.limit == _NO_LIMIT:
            raise SteersmanError("environment.overlap: the model names no context; set environment.max_tokens")
        count = len(play.games)
        batch = self.generator.joinable(
            play.sampling, rows=-(-count // 2), longest=self.limit - play.sampling.max_new_tokens, sequences=count,
            record_support=play.record_support,
        )  # fmt: skip
        if batch is None:
            return as_answers_come(play, self.generator)
        with batch as opened:
            joining(play, opened)

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
