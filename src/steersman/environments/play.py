"""Episodes while they are played: what each environment is asked and answers, and what comes of it.

Who speaks when is decided in `schedules.py`.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from steersman.data.examples import Message
from steersman.environments.calls import read_reply
from steersman.environments.classes import FaultError
from steersman.environments.conversation import Conversation, in_segments
from steersman.environments.port import Answer, Episode, Reply
from steersman.environments.text import clean_text
from steersman.environments.workers import Job, TooLateError, Workers
from steersman.guards.raised import keep_traceback, place_of
from steersman.guards.user_code import user_code
from steersman.rollout.sampling import Sampling
from steersman.types import Progress, Prompt, Sample, SteersmanError

if TYPE_CHECKING:
    from steersman.environments.runner import Episodes


@dataclass(slots=True)
class Opened:
    """What the environment opened for an episode: set by the thread that opens it, closed once, by the last to hold
    it."""

    episode: Episode | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def close(self) -> None:
        with self.lock:
            episode, self.episode = self.episode, None
        if episode is not None:
            episode.close()


@dataclass(slots=True)
class EpisodeInPlay:
    """One episode while it is played. `key` names its random streams, whatever is played beside it.

    `talk` is what the policy is shown now, and `messages` the same as messages, the first `shown_first` of which were
    shown first, after `replies_before` replies; `earlier` are conversations that were shown anew since.
    """

    prompt: Prompt
    index: int
    order: int
    seed: int
    key: int
    opened: Opened = field(default_factory=Opened)
    talk: Conversation | None = None
    earlier: list[Conversation] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    shown_first: int = 0
    replies_before: int = 0
    reply: Reply | None = None
    tries: int = 0
    waited: float = 0.0
    asked_at: float = 0.0
    outcome: str = ""
    terminated: bool = True
    onward: list[int] | None = None

    def copy(self) -> EpisodeInPlay:
        """The same moment of the episode, to be laid out further apart from it."""
        return replace(self, talk=None if self.talk is None else self.talk.copy(), earlier=[*self.earlier])

    @property
    def turns(self) -> int:
        """How often the policy has spoken."""
        return sum(len(talk.turns) for talk in [*self.earlier, *([] if self.talk is None else [self.talk])])


@dataclass
class Play:
    """One call of `Episodes.generate`. `waiting` holds the episodes that wait for a reply, by their order."""

    of: Episodes
    games: list[EpisodeInPlay]
    sampling: Sampling
    words: tuple[int, ...]
    record_support: bool
    workers: Workers
    progress: Progress | None
    waiting: dict[int, EpisodeInPlay] = field(default_factory=dict)
    over: int = 0
    tokens: int = 0

    # -- the environment's side --------------------------------------------------------------------------------

    def begin(self) -> None:
        """Opens every episode."""
        for game in self.games:
            self._begin(game)

    def collect(self, *, everything: bool) -> None:
        """Takes what environments have answered: all that are asked, or those that have, and one at least."""
        while self.workers.pending:
            for job in self.workers.take(wait=not self.waiting or everything):
                self._settle(job)
            if self.waiting and not everything:
                return

    def waits_to_speak(self, game: EpisodeInPlay) -> bool:
        """Waits until the episode's environment has answered; False where that ended the episode."""
        while not game.outcome and game.order not in self.waiting:
            for job in self.workers.take(wait=True):
                self._settle(job)
        return self.waiting.pop(game.order, None) is not None

    def _begin(self, game: EpisodeInPlay) -> None:
        opened = game.opened = Opened()

        def begin() -> Any:
            episode = opened.episode = self.of.environment.open()
            turns: list[Any] = [dict(m) for m in game.prompt.turns or []]
            return episode.begin(turns, dict(game.prompt.row), game.seed)

        game.tries += 1
        self._submit(game, begin)

    def _submit(self, game: EpisodeInPlay, call: Any) -> None:
        game.asked_at = time.monotonic()
        in_threads = self.of.config.run_in == "threads"  # a process has its own clock and is ended
        who = f"environment, row {game.prompt.index}, {f'turn {game.turns}' if game.turns else 'its beginning'}"
        limit = self.of.config.time_limit if in_threads else None
        self.workers.submit(game.order, call, limit, who, game.opened.close)

    def _settle(self, job: Job) -> None:
        game = self.games[job.key]
        game.waited += time.monotonic() - game.asked_at
        if game.outcome:
            return
        if job.error is not None:
            self._failed(game, job.error)
        elif game.talk is None:
            try:
                fits = self.of.lay_out_opening(game, job.result, self.sampling.max_new_tokens)
            except (FaultError, TypeError, KeyError) as error:
                return self._failed(game, error)
            assert game.talk is not None
            if not fits:
                return self._failed(game, FaultError(_no_room(game.talk, self.sampling, self.of.limit)))
            self.waiting[game.order] = game
        else:
            self._answer(game, job.result)

    def _answer(self, game: EpisodeInPlay, answer: Answer) -> None:
        talk = game.talk
        assert talk is not None
        talk.add_feedback(answer.reward, "".join(m["content"] for m in answer.messages))
        if answer.done:
            return self._end(game, "done", True)
        limit, before = self._limit(game, answer), game.copy()
        if not limit:
            try:
                if self.of.lay_out_answer(game, answer, self.sampling.max_new_tokens):
                    self.waiting[game.order] = game
                    return
            except FaultError as error:
                return self._failed(game, error)
        game.onward = self._onward(before, answer)
        self._end(game, limit or "token limit", False)

    def _limit(self, game: EpisodeInPlay, answer: Answer) -> str:
        """What truncates the episode behind this answer; "" where it goes on as long as there is room."""
        config = self.of.config
        if answer.truncated:
            return "the environment's limit"
        if game.turns >= config.max_turns:
            return "turn limit"
        return "time limit" if config.episode_limit is not None and game.waited > config.episode_limit else ""

    def _onward(self, game: EpisodeInPlay, answer: Answer) -> list[int] | None:
        """The ids that the next turn would be said behind; None where they leave no room for a token."""
        try:
            if not self.of.lay_out_answer(game, answer, 1):
                return None
        except FaultError:  # what no template shows, nobody would have seen
            return None
        assert game.talk is not None
        return game.talk.context()

    def _failed(self, game: EpisodeInPlay, error: BaseException) -> None:
        """An environment that hung, raised or gave nonsense: as `on_fault` says."""
        config = self.of.config
        if isinstance(error, SteersmanError):
            raise error
        late = isinstance(error, TooLateError)
        what = f"took longer than {config.time_limit:g} s" if late else said_of_fault(error)
        if late:
            game.opened = Opened()  # its thread closes it once the call ends; a process of its own is ended already
        if game.talk is None and game.tries <= config.retries:
            close_episode(game)
            return self._begin(game)
        what = f"{'its beginning' if game.talk is None else f'turn {game.turns}'}: {what}"
        self.of.faults.append(what)
        kept = kept_of_fault(f"environment, row {game.prompt.index}, {what}", error)
        if config.on_fault == "stop":
            raise SteersmanError(
                f"environment, row {game.prompt.index}, {what} (environment.on_fault is stop){kept}"
            ) from error
        if game.talk is not None and game.turns:
            spoken = game.talk if game.talk.turns else game.earlier[-1]
            spoken.add_feedback(config.fault_reward if config.on_fault == "end" else 0.0, "")
        self._end(game, f"fault at {what}", config.on_fault == "end")

    def _end(self, game: EpisodeInPlay, outcome: str, terminated: bool) -> None:
        game.outcome, game.terminated = outcome, terminated
        self.over += 1
        close_episode(game)
        if self.progress is not None:
            self.progress(self.over, len(self.games), self.tokens)

    # -- the policy's side -------------------------------------------------------------------------------------

    def take_reply(self, game: EpisodeInPlay, sample: Sample) -> None:
        """Takes a reply over and gives it to the episode's environment."""
        talk, episode = game.talk, game.opened.episode
        assert talk is not None
        assert episode is not None
        self.tokens += len(sample.ids)
        talk.add_reply(sample)
        reply = game.reply = read_reply(sample.text, self.of.form, cut=sample.finish == "length")
        self._submit(game, lambda: episode.step(reply))

    def samples(self) -> list[Sample]:
        """Every episode as it ended."""
        return [self._sample(game) for game in self.games]

    def _sample(self, game: EpisodeInPlay) -> Sample:
        talk = game.talk
        if talk is None or not game.turns:  # nothing was said: one token that does not count stands for it
            ids = game.prompt.ids if talk is None else talk.prompt.ids
            prompt = Prompt(ids, game.prompt.text, game.prompt.row, game.prompt.index, game.prompt.turns)
            support = [torch.tensor(ids[-1:])] if self.record_support else None
            return Sample(prompt, ids[-1:], [0.0], "length", "", game.index, support, [False], [0], [], game.outcome)
        if game.earlier:
            talks = [*game.earlier, talk]
            sample = in_segments(talks, game.index, terminated=game.terminated, outcome=game.outcome)
        else:
            sample = talk.sample(game.index, terminated=game.terminated, outcome=game.outcome)
        sample.onward = game.onward
        sample.opening, sample.talk = game.messages[: game.shown_first], _as_messages(game, sample.text)
        return sample


def _as_messages(game: EpisodeInPlay, last: str) -> list[Message]:
    """What was said in the conversation of now, up to the policy's last reply."""
    talk = game.messages[game.shown_first :]
    replies = [i for i, m in enumerate(talk) if m["role"] == "assistant"]
    if len(replies) < game.turns - game.replies_before:
        return [*talk, {"role": "assistant", "content": last}]
    return talk[: replies[-1] + 1] if replies else []


def _no_room(talk: Conversation, sampling: Sampling, limit: int) -> str:
    return (
        f"the episode begins with {len(talk.prompt.ids)} tokens, which with {sampling.max_new_tokens} of a reply are "
        f"more than {limit}"
    )


def said_of_fault(error: BaseException) -> str:
    """What is said of an episode's fault, with the line of the user's own file that raised it."""
    own = "" if isinstance(error, FaultError) else place_of(error)
    return f"{type(error).__name__}: {clean_text(str(error), 300)}{own}"


def kept_of_fault(who: str, error: BaseException) -> str:
    """Keeps the traceback of a fault, and says where; "" where it was not raised by code of the user's."""
    told_only = isinstance(error, FaultError) and error.__cause__ is None and not hasattr(error, "__notes__")
    return "" if told_only or isinstance(error, TooLateError) else keep_traceback(who, error)


def close_episode(game: EpisodeInPlay) -> None:
    """Closes the episode's environment; what that raises is of no use to anybody any more."""
    with suppress(Exception), user_code("environment, closing an episode"):
        game.opened.close()
