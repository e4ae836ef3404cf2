"""Who of the episodes speaks when.

| schedule | when a reply is sampled | repeats |
| --- | --- | --- |
| `turn_by_turn` | all replies of turn k in one call, once every environment has answered | bit for bit |
| `joining` | as rows of the running batch fall free, in the order in which earlier replies ended | bit for bit |
| `as_answers_come` | as environments answer | to rounding |

In `joining` an episode takes its place in the line when its reply ends, not when its environment answers. So what is
computed together follows from what was sampled alone: an answer that comes early waits for its turn, and one that is
late when its turn comes is waited for, and nothing is decoded meanwhile. So that this is rare, an episode's turn may
come no sooner than `overlap_steps` steps of decoding after its reply ended, as long as others are decoded.
"""

from __future__ import annotations

from collections import deque

from steersman.environments.play import EpisodeInPlay, Play
from steersman.rollout.port import Generator, Joinable
from steersman.types import Prompt


def turn_by_turn(play: Play, generator: Generator) -> None:
    """All episodes take their turns in step."""
    while play.over < len(play.games):
        play.collect(everything=True)
        _speak(play, generator)


def as_answers_come(play: Play, generator: Generator) -> None:
    """Those that have their answer go on while others wait."""
    while play.over < len(play.games):
        play.collect(everything=False)
        _speak(play, generator)


def joining(play: Play, batch: Joinable) -> None:
    """Turns join the running batch while others are decoded; a turn that ended or waits holds no row."""
    delay, step = play.of.config.overlap_steps, 0
    line, speaking = deque((game, 0) for game in play.games), {}
    while line or batch.busy:
        room, taken = batch.room if line else 0, []
        while line and len(taken) < room and (line[0][1] <= step or not (taken or batch.busy)):
            game, due = line.popleft()
            step = max(step, due)
            if play.waits_to_speak(game):
                taken.append(game)
        if taken:
            numbers = batch.join([_asked(g) for g in taken], [(*play.words, g.turns) for g in taken])
            speaking |= dict(zip(numbers, taken, strict=True))
        if batch.busy:
            step += 1
            for number, sample in batch.advance().items():
                game = speaking.pop(number)
                play.take_reply(game, sample)
                line.append((game, step + delay))


def _speak(play: Play, generator: Generator) -> None:
    """One reply of every episode that waits for one, in the order of the prompts."""
    games, play.waiting = [play.waiting[order] for order in sorted(play.waiting)], {}
    by_turn: dict[int, list[EpisodeInPlay]] = {}
    for game in games:
        by_turn.setdefault(game.turns, []).append(game)
    for turn, some in sorted(by_turn.items()):
        asked, seed = [_asked(g) for g in some], (*play.words, turn)
        replies = generator.generate(asked, play.sampling, n=1, seed=seed, record_support=play.record_support)
        for game, reply in zip(some, replies, strict=True):
            play.take_reply(game, reply)


def _asked(game: EpisodeInPlay) -> Prompt:
    assert game.talk is not None
    return Prompt(game.talk.context(), "", {}, game.key)
