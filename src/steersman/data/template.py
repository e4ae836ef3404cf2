"""Conversations -> pieces of text, each marked as counting in the loss or not.

The template is the tokenizer's own. A tokenizer without one gets `PLAIN`, a plain text layout without special
tokens other than its own end token.

Only the assistant's turns count. Where a turn begins and ends is found by rendering growing prefixes of the
conversation: what the template adds to "everything so far, ready for a reply" when the reply is put in is
the reply. That needs each rendering to begin with the one before; a template that is not so (it rewrites
earlier turns, say by dropping their thoughts) is refused, unless it marks the turns itself with
`{% generation %}` or only the last turn is trained on, which is the same as at sampling time by construction.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from jinja2 import TemplateError

from steersman.data.examples import Message, calls
from steersman.data.tools import CALLS, THOUGHTS, require_shown, with_text
from steersman.guards.user_code import time_limit
from steersman.types import SteersmanError

T = TypeVar("T")
PLAIN = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + (eos_token or '') + '\n' }}"
    "{% else %}{{ m.content + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
UNTAUGHT_STOP = "\nUser:"
"""Ends an answer of a model whose layout is `PLAIN`: untaught, it would go on with the user's next turn."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Special tokens written in a message are fenced before rendering, so that the tokenizer can tell them from the
# template's own. The marks are noncharacters; a text that holds one has it escaped, and gets it back. A template
# that looks into a message for such a token (to cut off a thought at its end, say) writes something else of the
# fenced text than of the text itself, and is refused: what the message says could not be told from what it writes.
FENCE_OPEN, FENCE_CLOSE, _ESCAPE = "\ufdd0", "\ufdd1", "\ufdd2"
_MARKS = {FENCE_OPEN: _ESCAPE + "o", FENCE_CLOSE: _ESCAPE + "c", _ESCAPE: _ESCAPE + "e"}
_MARKED = re.compile("|".join(_MARKS))
_FENCED = re.compile(f"{FENCE_OPEN}(.*?){FENCE_CLOSE}", re.DOTALL)
_FENCES = (FENCE_OPEN, FENCE_CLOSE, "\\ufdd")
"""What a rendered text holds where a message has fences; the last is what a template makes of one that it escapes."""
_OPENING = re.compile(r"\s*(<\|?|\[)(/?)([A-Za-z_]*(?:think|thought|reason)[A-Za-z_]*)(\|?>|\])\s*\Z", re.IGNORECASE)
"""What a generation prompt ends with where it opens a thought, such as "<think>\\n" or "[THINK]"."""

_PROBE = "reply"
_ROLES = frozenset(("system", "user", "assistant", "tool"))
LIMIT = 60.0
"""Seconds that a template may take for the first conversation that this process shows it."""
_ENDED: set[str] = set()
"""Templates that have written a conversation."""


def pieces(text: str) -> list[tuple[str, bool]]:
    """Rendered text as (piece, whether it is a special token that a message spells), as the messages wrote it."""
    return [(_plain(piece), i % 2 == 1) for i, piece in enumerate(_FENCED.split(text))]


def unfenced(text: str) -> str:
    """Rendered text without the marks."""
    return "".join(piece for piece, _ in pieces(text))


def _plain(piece: str) -> str:
    for mark, written in _MARKS.items():
        piece = piece.replace(written, mark)
    return piece


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation; `counts` is True for what the assistant says."""

    text: str
    counts: bool


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """How a tokenizer lays out conversations. `own` is False for the plain default."""

    tokenizer: Any
    source: str
    own: bool
    fenced: re.Pattern[str] | None

    @property
    def sentence(self) -> str:
        if self.own:
            return "the tokenizer's own chat template"
        return 'the default template "plain" (User: ... Assistant: ...), because the tokenizer has none'

    def render(self, messages: Sequence[Message], *, for_reply: bool = False) -> str:
        """The conversation as text; with `for_reply` it ends where the assistant is to speak.

        Raises SteersmanError for a conversation that the template refuses, and for one with a special token in its
        text that the template cuts or changes.
        """
        text = self._rendered(messages, for_reply)
        self._require_fences(text, messages, for_reply)
        return text

    def _rendered(self, messages: Sequence[Message], for_reply: bool = False, fences: bool = True) -> str:
        return self._tried(messages, lambda turns: self._apply(turns, for_reply, fences))

    def _tried(self, messages: Sequence[Message], write: Callable[[Sequence[Message]], T]) -> T:
        """What `write` makes of the turns. Raises SteersmanError where the template refuses them."""
        try:
            with time_limit("the chat template", None if self.source in _ENDED else LIMIT):
                try:
                    written = write(messages)
                except TypeError:  # a template that joins a call's arguments to text wants them as text
                    written = write([_calls_as_text(m) for m in messages])
            _ENDED.add(self.source)
            return written
        except SteersmanError:
            raise
        except Exception as error:  # a template is a program of whoever made the model
            roles = ", ".join(m["role"] for m in messages)
            why = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}".rstrip(": ")
            raise SteersmanError(
                f"the chat template refuses a conversation of {roles}: {why}; change the turns or the template"
            ) from error

    def _require_fences(self, text: str, messages: Sequence[Message], for_reply: bool = False) -> None:
        """Raises SteersmanError where the fenced text is not what the template writes without fences."""
        if self.fenced is None or not any(mark in text for mark in _FENCES):
            return
        whole = re.compile(f"{FENCE_OPEN}({self.fenced.pattern}){FENCE_CLOSE}")
        if whole.sub("\\1", text) == self._rendered(messages, for_reply, fences=False):
            return
        names = dict.fromkeys(self.fenced.findall(json.dumps(messages, ensure_ascii=False)))
        raise SteersmanError(
            f"a message spells special tokens of the tokenizer ({' '.join(names)}), and the chat template cuts or "
            "changes the message there, so that its text can not be told from the template's own tokens; put a "
            "thought into a field of its own (reasoning_content), take the tokens out of the text, or read them as "
            "tokens (data.allow_special_tokens: true)"
        )

    def _apply(self, messages: Sequence[Message], for_reply: bool, fences: bool) -> str:
        fenced, tools = self._for_template(messages, fences)
        return self.tokenizer.apply_chat_template(
            fenced, tools=tools, chat_template=self.source, tokenize=False, add_generation_prompt=for_reply
        )

    def _for_template(self, messages: Sequence[Message], fences: bool = True) -> tuple[list[Any], Any]:
        """The turns with the data's special tokens fenced, and the tools that stand on one of them."""

        def safe(value: Any) -> Any:
            return self._fence(value, fences)

        fenced = [
            {k: v if k == "role" and v in _ROLES else safe(v) for k, v in m.items() if k != "tools"} for m in messages
        ]
        return fenced, next((safe(m["tools"]) for m in messages if "tools" in m), None)

    def segments(
        self, messages: Sequence[Message], start: int = 0, turns: Literal["all", "last"] = "all"
    ) -> list[Segment]:
        """The rendered conversation up to its last reply, cut where the assistant begins and ends.

        Assistant turns before message `start` belong to the prompt and do not count; of the others all count,
        or only the last one.

        Raises SteersmanError for a template that is not prefix-stable on this conversation.
        """
        require_shown(self._rendered, messages)
        speaks = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= start]
        speaks = speaks if turns == "all" else speaks[-1:]
        if self.own and _GENERATION.search(self.source):
            return self._marked(messages, speaks)
        out: list[Segment] = []
        done = ""
        for i in speaks:
            before = self.render(messages[:i], for_reply=True)
            after = self._rendered(messages[: i + 1])
            thought = None if after.startswith(before) else self._in_thought(messages[: i + 1], before)
            if thought is None:
                self._require_fences(after, messages[: i + 1])
            else:
                after = thought
            if not (before.startswith(done) and after.startswith(before)):
                raise SteersmanError(_unstable(i, done, before, after, alone=len(speaks) == 1))
            out += [Segment(before[len(done) :], False), Segment(after[len(before) :], True)]
            done = after
        return [s for s in out if s.text]

    def _in_thought(self, messages: Sequence[Message], before: str) -> str | None:
        """`before` with the reply that a model gives to it, where it opens a thought: the rest of the thought, its
        end, and what the template shows of the reply. A reply without a thought ends it at once, empty. None where
        `before` opens none, or the template writes something else into a turn.
        """
        shown = self.render([*messages[:-1], {"role": "assistant", "content": _PROBE}])
        at = _in_common(before, shown)
        opening = _OPENING.match(before[at:])
        if opening is None or opening[2] or not shown[at:].startswith(_PROBE):
            return None
        begins, ends = f"{opening[1]}{opening[3]}{opening[4]}", f"{opening[1]}/{opening[3]}{opening[4]}"
        reply = messages[-1]
        if calls(reply):
            return None
        thought, closed, said = reply["content"].rpartition(ends)
        given = next((str(reply.get(name)) for name in THOUGHTS if reply.get(name)), None)
        if given is not None:
            thought, said = given + "\n", "\n\n" + reply["content"]
        elif not closed:
            thought, said = "\n", "\n\n" + said.lstrip("\n")
        if thought.lstrip().startswith(begins):
            thought = thought.lstrip()[len(begins) :].removeprefix("\n")
        return before + self._fence(thought) + ends + self._fence(said) + shown[at + len(_PROBE) :]

    def _marked(self, messages: Sequence[Message], speaks: list[int]) -> list[Segment]:
        """The same by the template's own `{% generation %}` marks. What lies in them counts, except for what the
        generation prompt writes of the first reply: that is never the model's to say."""
        text, spans = self._tried(messages, self._with_marks)
        first = self.render(messages[: speaks[0]], for_reply=True) if speaks else text
        thought = None
        if not text.startswith(first):
            thought = self._in_thought(messages[: speaks[0] + 1], first)
        if thought is not None and len(speaks) == 1:
            return [Segment(first, False), Segment(thought[len(first) :], True)]
        if thought is not None:
            raise SteersmanError(
                f"the chat template asks for a reply that begins with a thought (...{unfenced(first)[-20:]!r}) and "
                f"shows turn {speaks[0] + 1} without one, so a model would not be asked for what it learned. Train "
                "on the last turn only (data.assistant_turns: last), which ends the thought, or cut the "
                "conversations so that each has one reply"
            )
        self._require_fences(text, messages)
        out, at, begins = [], 0, _in_common(text, first)
        for begin, end in spans:
            begin = max(begin, begins)
            if end > begin:
                out += [Segment(text[at:begin], False), Segment(text[begin:end], True)]
                at = end
        return [s for s in [*out, Segment(text[at:], False)] if s.text]

    def _with_marks(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and where in it the template's marks begin and end."""
        from transformers.utils.chat_template_utils import render_jinja_template

        fenced, tools = self._for_template(messages)
        made: Any = render_jinja_template(
            conversations=[fenced],
            tools=tools,
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        (text,), (spans,) = made
        return text, spans

    def _fence(self, value: Any, fences: bool = True) -> Any:
        """A value with every text in it, names of fields too, escaped; with `fences`, its special tokens fenced."""
        if isinstance(value, dict):
            return {self._fence(name, fences): self._fence(x, fences) for name, x in value.items()}
        if isinstance(value, list):
            return [self._fence(x, fences) for x in value]
        if not isinstance(value, str):
            return value
        text = _MARKED.sub(lambda m: _MARKS[m.group()], value)
        if self.fenced is None or not fences:
            return text
        return self.fenced.sub(f"{FENCE_OPEN}\\g<0>{FENCE_CLOSE}", text)


def _in_common(a: str, b: str) -> int:
    """How many letters two texts begin with that are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _calls_as_text(message: Message) -> Message:
    made: Any = {name: with_text(x) if name in CALLS else x for name, x in message.items()}
    return made


def chat_template(tokenizer: Any, *, allow_special_tokens: bool = False) -> ChatTemplate:
    """The tokenizer's chat template, or the plain default where it has none."""
    source = None
    if tokenizer.chat_template:
        try:
            source = tokenizer.get_chat_template()
        except ValueError as error:  # several templates, none of them the default one
            raise SteersmanError(f"{tokenizer.name_or_path}: {error}") from error
    names = sorted(special_tokens(tokenizer), key=len, reverse=True)
    fenced = re.compile("|".join(map(re.escape, names))) if names and not allow_special_tokens else None
    return ChatTemplate(tokenizer, source or PLAIN, source is not None, fenced)


def special_tokens(tokenizer: Any) -> set[str]:
    """The strings that the tokenizer reads as control tokens, those of its vocabulary included."""
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return added | set(tokenizer.all_special_tokens)


def template_ends(tokenizer: Any) -> list[int]:
    """The tokens that end a reply: the tokenizer's eos, and what its chat template writes after a reply."""
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if not tokenizer.chat_template:
        return ids
    template = chat_template(tokenizer)
    talk: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tail = template.render(talk).rpartition("b")[2]
    special = set(tokenizer.convert_tokens_to_ids(list(special_tokens(tokenizer))))
    found = [i for i in tokenizer.encode(tail, add_special_tokens=False) if i in special]
    return list(dict.fromkeys([*ids, *found[:1]]))


def _unstable(turn: int, done: str, before: str, after: str, *, alone: bool) -> str:
    shorter, longer = (done, before) if not before.startswith(done) else (before, after)
    at = _in_common(shorter, longer)
    parts = (unfenced(text[max(0, at - 20) : at + 20]) for text in (shorter, longer))
    was, now = (f"...{part!r}" for part in parts)
    if alone:
        return (
            f"the chat template writes turn {turn + 1} otherwise than it asks for it ({was} becomes {now}), so a "
            "model would not be asked for what it learned; use a template whose generation prompt is the beginning "
            "of the reply as it is shown, or one with {% generation %} marks"
        )
    return (
        f"the chat template is not prefix-stable: with turn {turn + 1} added, what stood before it changes "
        f"({was} becomes {now}), so the assistant's part can not be told. Train on the last turn only "
        "(data.assistant_turns: last), use a template with {% generation %} marks, or cut the conversations so that "
        "each has one reply"
    )
