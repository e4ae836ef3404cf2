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
from steersman.environments.play import EpisodeInPlay, Play, close_episode
from steersman.environments.port import Answer, Environment, Reply
from steersman.environments.schedules import as_answers_come, joining, turn_by_turn
from steersman.environments.telling import as_users, with_tool_descriptions
from steersman.environments.workers import Workers
from steersman.guards.user_code import streams_kept
from steersman.rollout.port import Generator, Limits
from steersman.rollout.sampling import Sampling
from steersman.run.seed import sub_seed
from steersman.types import Progress, Prompt, Sample, Stats, SteersmanError

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
        self.tools_in_prompt = config.tell_tools
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
            with streams_kept():  # an environment in a thread may close what is everybody's
                play.begin()
                self._schedule(play)
            return play.samples()
        finally:
            workers.close()
            for game in games:
                close_episode(game)

    def prepare(self, longest: int) -> None:
        """An episode may fill all that it is given."""
        self.generator.prepare(longest if self.limit == _NO_LIMIT else self.limit)

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

    def _games(self, prompts: Sequence[Prompt], n: int, words: tuple[int, ...]) -> list[EpisodeInPlay]:
        met: dict[int, int] = {}
        games = []
        for place, prompt in enumerate(prompts):
            again = met[prompt.index] = met.get(prompt.index, -1) + 1
            seed = sub_seed(0, "environment", *words, prompt.index, again)
            for j in range(n):
                key = sub_seed(0, "episode", prompt.index, again, j)
                games.append(EpisodeInPlay(prompt, j, place * n + j, seed, key))
        return games

    def lay_out_opening(self, game: EpisodeInPlay, messages: Sequence[Message], room: int) -> bool:
        """Lays out what the episode, or a conversation of it, begins with; False where no reply fits behind it."""
        if not messages:
            raise FaultError("begin gave no message" if game.talk is None else "a new conversation has no message")
        first: list[Message] = [dict(m) for m in messages]  # type: ignore[misc]
        tools = self.environment.tools or first[0].get("tools", [])
        if tools and self.tools_in_prompt:
            first[0] = {key: value for key, value in first[0].items() if key != "tools"}  # type: ignore[assignment]
            first = with_tool_descriptions(first, tools, system_turns=self.layout.system_turns)
        elif tools and self.layout.chat:
            first[0] = {**first[0], "tools": tools}
        replies, fits = game.turns, self._shown_anew(game, first, room)
        game.shown_first, game.replies_before = len(first), replies
        return fits

    def lay_out_answer(self, game: EpisodeInPlay, answer: Answer, room: int) -> bool:
        """Puts what the environment says behind the reply, or shows the conversation anew; False where another reply
        does not fit behind it."""
        talk, reply = game.talk, game.reply
        assert talk is not None
        assert reply is not None
        said, messages = self._as_shown(reply, answer.messages)
        try:
            if answer.new_conversation:
                return self.lay_out_opening(game, answer.messages, room)
            talked = [*game.messages, said, *messages]
            segments = self.config.history == "segments" and self.layout.chat
            if not self.layout.joined or (segments and self.layout.rewritten(game.messages, reply.text, talked)):
                return self._shown_anew(game, talked, room)
            new = talk.between(self.layout.stand_in(said.get("tool_calls", ())), messages)
        except SteersmanError as error:
            raise FaultError(f"the chat template can't show the environment's turn: {error}") from error
        game.messages = talked
        if len(talk.prompt.ids) + len(talk.ids) + len(new) + room > self.limit:
            return False
        talk.add_observation(new)
        return True

    def _shown_anew(self, game: EpisodeInPlay, messages: list[Message], room: int) -> bool:
        """Begins a conversation with everything that is to be seen of the earlier ones; one that the template refuses
        leaves the episode as it was."""
        ids, text = self.layout.first(messages)
        prompt = Prompt(ids, text, game.prompt.row, game.prompt.index, game.prompt.turns)
        if game.talk is not None:
            game.earlier.append(game.talk)
        game.talk, game.messages = Conversation(self.layout, prompt, messages), messages
        return len(ids) + room <= self.limit

    def _as_shown(self, reply: Reply, messages: Sequence[Message]) -> tuple[Message, list[Message]]:
        """The policy's turn and the environment's, as the template is to show them."""
        said: Message = {"role": "assistant", "content": reply.text}
        if self.tools_in_prompt or not self.layout.chat:
            return said, list(as_users(messages) if self.layout.chat else messages)
        if reply.calls:
            made = [{"name": c.name, "arguments": c.arguments} for c in reply.calls]
            calls = [{"type": "function", "id": f"call{i:05d}", "function": f} for i, f in enumerate(made)]
            said = {**said, "content": reply.content, "tool_calls": calls}
        tools = iter(range(len(reply.calls)))
        return said, [
            {**m, "tool_call_id": f"call{next(tools, 0):05d}"} if m["role"] == "tool" else m for m in messages
        ]

    def _form(self) -> str | None:
        if not self.environment.tools and not self.config.agent:
            return None
        form = form_of(self.layout.template) if self.layout.chat and not self.tools_in_prompt else None
        if form is not None:
            return form
        if not self.tools_in_prompt and not self.config.agent:
            why = "chat template shows no tool calls" if self.layout.chat else "turns are plain text, without tools"
            raise SteersmanError(
                f"environment: the model's {why}; set environment.tell_tools to tell the tools in the prompt, or use "
                "a model whose chat template has them"
            )
        self.tools_in_prompt = True
        return "tagged"

    def _probe(self) -> None:
        if self.config.history != "refuse" or not self.layout.joined:
            return
        first: list[Message] = [{"role": "user", "content": "a"}]
        new: list[Message] = [{"role": "user", "content": "b"}]
        if self.form is not None and not self.tools_in_prompt:
            first[0]["tools"] = self.environment.tools
            new = [{"role": "tool", "name": "probe", "content": "b"}]
        found = self.layout.rewriting(first, new)
        if found is not None:
            raise SteersmanError(
                f"environment: the chat template shows earlier turns otherwise than they were said ({found}). Set "
                "environment.history: segments, with which each turn is trained behind what the template showed "
                "before it, or keep, with which the model sees its turns as it said them"
            )
