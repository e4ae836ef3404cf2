"""How a model is asked to play a person with a goal, and how its message is read."""

from __future__ import annotations

from collections.abc import Sequence

from steersman.data.examples import Message
from steersman.ops.text import whole_sentences

END = "[[END]]"
"""What a simulated user writes to leave."""
PLAY = """You play a person who writes to an assistant. Stay in character and never act as the assistant.
Who you are: {character}
What you want: {goal}

The conversation so far:
{so_far}

Write this person's next message, one to three sentences, and nothing else. If the goal is reached, or the person
would give up, write only {end}."""


def as_talk(turns: Sequence[Message], roles: dict[str, str]) -> str:
    """A conversation as text, each turn behind the name of its role."""
    return "\n\n".join(f"{roles.get(m['role'], m['role'])}: {m['content']}" for m in turns)


def play(character: str, goal: str, turns: Sequence[Message]) -> str:
    """What the model that plays the person is asked for its next message."""
    so_far = as_talk(turns, {"user": "You", "assistant": "The assistant"}) or "(nothing yet)"
    return PLAY.format(character=character, goal=goal, so_far=so_far, end=END)


def first_paragraph(text: str, *, cut: bool = False) -> str:
    """The first paragraph of what the model wrote for the person, without the name of the role in front.

    Where a limit `cut` the text within that paragraph, what follows the last whole sentence is left out.
    """
    first, more = (part.strip() for part in text.strip().partition("\n\n")[::2])
    if cut and not more:
        first = whole_sentences(first) or first
    return first.partition(":")[2].strip() if first.lower().startswith(("you:", "user:", "me:")) else first
