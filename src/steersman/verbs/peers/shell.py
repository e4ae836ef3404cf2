"""The commands of a shell script as words, with what the script itself says of its variables put in.

The text alone is read: nothing is run, no file is opened and the environment is not asked. What the text does not say
(a variable of the environment, one that is set under a condition, the output of a command) stays in its word as it is
written, and the word is marked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

_REDIRECTED = re.compile(
    r"""(?P<operator>&>>?|>[>&|]?|<(?:<<|<-?|[>&])?)(?:[ \t]|\\\n)*
        (?P<target>[<>]\([^)]*\)|(?:\\.|"(?:\\.|[^"\\])*"|'[^']*'|[^\s;&|<>"'\\])*)""",
    re.DOTALL | re.VERBOSE,
)
"""A shell's redirection outside of quotation marks, with the file, descriptor or process that it names."""
_ASSIGNED = re.compile(r"(?P<name>[A-Za-z_]\w*)(?P<index>\[[^\]]*\])?(?P<more>\+?)=")
_NAMED = re.compile(r"\$(?:(\w+)|\{(\w+)(\[(?:[@*]|\d+)\])?\})")
_ALL_OF = re.compile(r"\$(?:[@*]|\{[@*].*\}|\{\w+\[[@*]\].*\})", re.DOTALL)
"""What stands for any number of words: an array, or what the script is given."""
_OPEN = ("if", "while", "until", "for", "select", "case", "{")
_CLOSE = ("fi", "done", "esac", "}")
_LEADS = ("if", "while", "until", "then", "else", "elif", "do", "{", "!", "time")
"""Words behind which a command begins."""
_DECLARES = ("export", "local", "declare", "readonly", "typeset")
_SETS = ("read", "mapfile", "readarray", "unset", "for", "select")
"""Commands that give their words, as names of variables, values that the text does not say."""


@dataclass(frozen=True)
class Word:
    """A word of a command. `unread` says that a part of it is not in the text; `several` that what is missing may be
    any number of words, so that it is no value of one setting."""

    text: str
    unread: bool = False
    several: bool = False


@dataclass(frozen=True)
class _Piece:
    """A part of a word: text, or with `expands` what the shell would put something else for."""

    text: str
    quoted: bool
    expands: bool = False


@dataclass
class _Raw:
    """A word as it is written; `elements` are those of an array that it sets."""

    pieces: list[_Piece] = field(default_factory=list)
    elements: list[_Raw] | None = None

    def add(self, text: str, *, quoted: bool = False, expands: bool = False) -> None:
        self.pieces.append(_Piece(text, quoted, expands))

    def plain(self) -> str:
        """The text in front of all quotation marks and variables."""
        out = ""
        for piece in self.pieces:
            if piece.quoted or piece.expands:
                break
            out += piece.text
        return out


@dataclass(frozen=True)
class _Value:
    """What a variable holds: one text as one word, or the words of an array."""

    words: tuple[Word, ...]
    array: bool = False


def read_commands(text: str) -> list[list[Word]]:
    """Every command of the script as its words, without comments, redirections and the variables that it sets.

    Raises ValueError for a quotation mark or bracket that is not closed, and for a redirection to no file.
    """
    script = _Script(text.replace("\r\n", "\n"))
    commands = list(script.commands())
    if not any(word.text.startswith("--") for words in commands for word in words):
        commands += [words for body in script.kept for words in read_commands(body)]
    return commands


class _Script:
    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0
        self.variables: dict[str, _Value | None] = {}  # None: the text does not say the value
        self.depth = 0  # of branches, loops and functions around the command
        self.documents: list[str] = []  # the ends of here-documents that begin behind this line
        self.kept: list[str] = []  # here-documents that were read into a variable

    def commands(self) -> Iterator[list[Word]]:
        condition = False
        while self.place < len(self.text):
            raws, operator = self._command()
            bodies = self._bodies() if operator == "\n" else []
            words = self._told(raws, condition, bodies)
            if words:
                yield words
            for body in bodies:
                yield from self._inner(body)
            condition = operator in ("&&", "||")

    def _inner(self, body: str) -> Iterator[list[Word]]:
        """The commands in a here-document, which may be text of any other kind."""
        try:
            yield from read_commands(body)
        except ValueError:
            return

    def _command(self) -> tuple[list[_Raw], str]:
        """The words up to the next end of a command, and what ends it."""
        raws: list[_Raw] = []
        while self.place < len(self.text):
            char = self.text[self.place]
            if self.text.startswith("\\\n", self.place):
                self.place += 2
            elif char == "#":
                end = self.text.find("\n", self.place)
                self.place = len(self.text) if end < 0 else end
            elif char in "\n;|()":
                double = self.text[self.place : self.place + 2] == "||"
                self.place += 2 if double else 1
                return raws, "||" if double else char
            elif self.text.startswith("&&", self.place):
                self.place += 2
                return raws, "&&"
            elif self.text[self.place : self.place + 2] in ("<(", ">("):
                raws.append(_Raw([_Piece(self.text[self.place : (end := self._expansion())], False, expands=True)]))
                self.place = end
            elif (redirected := _REDIRECTED.match(self.text, self.place)) is not None:
                if raws and (plain := raws[-1].plain()).isdigit() and self.text[self.place - 1] == plain[-1]:
                    raws.pop()  # the number of what is redirected
                self._redirect(redirected)
            elif char == "&":
                self.place += 1
                return raws, char
            elif char.isspace():
                self.place += 1
            else:
                raws.append(self._word())
        return raws, "\n"

    def _redirect(self, found: re.Match[str]) -> None:
        """Passes a redirection. Raises ValueError where a setting or nothing stands in the place of its file."""
        target = found["target"]
        if not target or target.startswith("--"):
            raise ValueError(
                f"the shell would redirect with `{found['operator']}`, which stands in front of "
                f"{target or 'no file'}; put quotation marks around a value that has < or >"
            )
        if found["operator"] in ("<<", "<<-"):
            self.documents.append(re.sub(r"[\"'\\]", "", target))
        self.place = found.end()

    def _bodies(self) -> list[str]:
        """The here-documents that begin here."""
        bodies: list[str] = []
        for end in self.documents:
            found = re.compile(rf"^\t*{re.escape(end)}$", re.MULTILINE).search(self.text, self.place)
            stop = len(self.text) if found is None else found.start()
            bodies.append(self.text[self.place : stop])
            self.place = stop if found is None else found.end()
        self.documents.clear()
        return bodies

    def _word(self) -> _Raw:
        """The word that begins here. Raises ValueError for a quotation mark that is not closed."""
        raw, quoted = _Raw(), False
        while self.place < len(self.text):
            char = self.text[self.place]
            if quoted and char == '"':
                quoted, self.place = False, self.place + 1
            elif char == "\\":
                following = self.text[self.place + 1 : self.place + 2]
                if following != "\n":
                    kept = quoted and following not in ('"', "\\", "$", "`")
                    raw.add(f"\\{following}" if kept else following, quoted=True)
                elif not quoted:
                    return raw
                self.place += 2
            elif char in "$`" and (end := self._expansion(quoted)) > self.place + 1:
                told = self.text[self.place : end]
                raw.add(f"$({told[1:-1]})" if char == "`" else told, quoted=quoted, expands=True)
                self.place = end
            elif quoted:
                raw.add(char, quoted=True)
                self.place += 1
            elif char == '"':
                raw.add("", quoted=True)
                quoted, self.place = True, self.place + 1
            elif char == "'":
                end = self._closing("'", self.place + 1)
                raw.add(self.text[self.place + 1 : end], quoted=True)
                self.place = end + 1
            elif char == "(" and _ASSIGNED.fullmatch(raw.plain()) and len(raw.plain()) == len(_text(raw)):
                raw.elements = self._elements()
            elif char.isspace() or char in ";|()&<>":
                return raw
            else:
                raw.add(char)
                self.place += 1
        if quoted:
            raise ValueError('a quotation mark (") is not closed')
        return raw

    def _elements(self) -> list[_Raw]:
        """The words between the brackets of an array, over several lines."""
        self.place += 1
        elements: list[_Raw] = []
        while True:
            raws, operator = self._command()
            elements += raws
            if operator == ")":
                return elements
            if self.place >= len(self.text):
                raise ValueError("the bracket of an array is not closed")

    def _expansion(self, quoted: bool = False) -> int:
        """Where what the shell puts something else for ends: what begins here with `$`, a backtick, `<(` or `>(`."""
        if self.text[self.place] == "`":
            return self._closing("`", self.place + 1) + 1
        following = self.text[self.place + 1 : self.place + 2]
        if following == "'" and not quoted:
            return self._closing("'", self.place + 2) + 1
        if following in ("{", "("):
            depth, pair = 0, {"{": "}", "(": ")"}[following]
            for place in range(self.place + 1, len(self.text)):
                depth += (self.text[place] == following) - (self.text[place] == pair)
                if not depth:
                    return place + 1
            raise ValueError(f"{self.text[self.place : self.place + 20]!r} is not closed")
        named = re.compile(r"[A-Za-z_]\w*|[\d@*#?$!-]").match(self.text, self.place + 1)
        return self.place + 1 if named is None else named.end()

    def _closing(self, char: str, place: int) -> int:
        found = self.text.find(char, place)
        if found < 0:
            raise ValueError(f"a quotation mark ({char}) is not closed")
        return found

    def _told(self, raws: list[_Raw], condition: bool, bodies: list[str]) -> list[Word]:
        """The words of a command with what is known put in; what sets variables is kept in mind instead."""
        while raws and (lead := _bare(raws[0])) in (*_OPEN, *_CLOSE, *_LEADS, "function"):
            opens = lead in _OPEN or (lead == "function" and _bare(raws[-1]) == "{")
            self.depth = max(0, self.depth + opens - (lead in _CLOSE))
            if lead not in _LEADS:
                break
            raws = raws[1:]
        first = _bare(raws[0]) if raws else ""
        maybe = condition or self.depth > 0
        if first in _SETS:
            names = [name for raw in raws[1:] if (name := _bare(raw)).isidentifier()]
            self.variables |= dict.fromkeys(names)
            if first == "read" and bodies and names and not maybe:
                self.kept.append(bodies.pop(0))
                told = _NAMED.sub(self._told_in_text, self.kept[-1].replace("\\\n", " ").strip())
                self.variables[names[-1]] = _Value((Word(told, "$" in told),))
            return []
        assigned = [raw for raw in raws if _ASSIGNED.match(raw.plain())]
        if first in _DECLARES or (assigned and len(assigned) == len(raws)):
            keyed = any(re.fullmatch(r"-\w*A\w*", _bare(raw)) for raw in raws)
            for raw in assigned:
                self._assign(raw, maybe, keyed)
            return []
        while raws and _ASSIGNED.match(raws[0].plain()):
            raws = raws[1:]  # holds for the environment of this command alone
        return [word for raw in raws for word in self._expanded(raw)]

    def _told_in_text(self, found: re.Match[str]) -> str:
        """What stands for a variable in a here-document."""
        return "".join(word.text for word in self._parts(_Piece(found[0], quoted=True, expands=True)))

    def _assign(self, raw: _Raw, maybe: bool, keyed: bool) -> None:
        found = _ASSIGNED.match(raw.plain())
        assert found is not None
        name, old = found["name"], self.variables.get(found["name"])
        if found["index"] or keyed or (maybe and not found["more"]):
            self.variables[name] = None
            return
        if raw.elements is not None:
            words = [word for element in raw.elements for word in self._expanded(element)]
            if maybe:
                words = [Word(f"${{{name}[@]}}", unread=True, several=True)]
            value = _Value(tuple(words), array=True)
        elif any(piece.expands and piece.text.startswith("$(") for piece in raw.pieces):
            self.variables[name] = None  # what a command prints
            return
        else:
            pieces = [replace(raw.pieces[0], text=""), *_behind(raw.pieces, found.end())]
            joined = self._joined(_Raw([replace(piece, quoted=True) for piece in pieces]))
            value = _Value((Word(f" ${name}", unread=True) if maybe else joined,))
        if not found["more"]:
            self.variables[name] = value
        elif name in self.variables and old is None:
            return
        elif old is None or old.array or value.array:
            self.variables[name] = _Value((*(old.words if old else ()), *value.words), array=value.array or bool(old))
        else:
            before, behind = old.words[0], value.words[0]
            unread = before.unread or behind.unread
            self.variables[name] = _Value((Word(before.text + behind.text, unread),))

    def _joined(self, raw: _Raw) -> Word:
        """The word as one, whatever its variables hold."""
        words = self._expanded(raw)
        return Word(" ".join(word.text for word in words), any(word.unread for word in words))

    def _expanded(self, raw: _Raw) -> list[Word]:
        """The words that this one becomes: none for an empty variable, several for an array or for a text with
        spaces outside of quotation marks."""
        if len([piece for piece in raw.pieces if piece.text]) == 1:
            piece = next(piece for piece in raw.pieces if piece.text)
            value = self._value(piece) if piece.expands else None
            if value is not None and value.array and _ALL_OF.fullmatch(piece.text):
                return [part for word in value.words for part in ([word] if piece.quoted else _split(word))]
            if piece.expands and value is None and _ALL_OF.fullmatch(piece.text):
                return [Word(piece.text, unread=True, several=True)]
        done: list[Word] = []
        current: Word | None = None
        for piece in raw.pieces:
            for number, word in enumerate(self._parts(piece)):
                if number and current is not None:
                    done.append(current)
                    current = None
                before = current or Word("")
                current = Word(before.text + word.text, before.unread or word.unread)
            if piece.quoted and current is None:
                current = Word("")
        return done if current is None else [*done, current]

    def _parts(self, piece: _Piece) -> list[Word]:
        """The words of a part of a word, of which the first and the last join what stands beside them."""
        if not piece.expands:
            return [Word(piece.text)]
        value = self._value(piece)
        if value is None:
            return [Word(piece.text, unread=True)]
        words = value.words if not value.array or _ALL_OF.fullmatch(piece.text) else value.words[:1]
        joined = Word(" ".join(word.text for word in words), any(word.unread for word in words))
        return [joined] if piece.quoted else _split(joined)

    def _value(self, piece: _Piece) -> _Value | None:
        """What stands for `$NAME`, `${NAME}`, `${NAME[@]}` or `${NAME[0]}`; None where the text does not say it."""
        found = _NAMED.fullmatch(piece.text)
        value = self.variables.get(found[1] or found[2]) if found else None
        if value is None or found is None or not (index := (found[3] or "[@]")[1:-1]).isdigit():
            return value
        return _Value(value.words[int(index) : int(index) + 1])


def _text(raw: _Raw) -> str:
    return "".join(piece.text for piece in raw.pieces)


def _bare(raw: _Raw) -> str:
    """The word where it is written without quotation marks and variables; else ""."""
    return "" if raw.elements is not None or len(raw.plain()) != len(_text(raw)) else raw.plain()


def _behind(pieces: list[_Piece], place: int) -> list[_Piece]:
    """The pieces behind so many characters."""
    out: list[_Piece] = []
    for piece in pieces:
        out += [replace(piece, text=piece.text[place:])] if len(piece.text) > place else []
        place = max(0, place - len(piece.text))
    return out


def _split(word: Word) -> list[Word]:
    """The parts between spaces, each marked if something in it is not read."""
    return [replace(word, text=part, unread=word.unread and bool("$" in part))
            for part in word.text.split()]  # fmt: skip
