"""Bytes -> text: UTF-8 unless the recipe names another encoding; a file in another one is recognised and refused."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from steersman.types import SteersmanError

_TRIED = 2**16
"""Bytes that a guess looks at."""
_WIDE = {"utf_16": "utf-16", "utf_16_le": "utf-16-le", "utf_16_be": "utf-16-be", "utf_32": "utf-32"}
_NAMES = {
    "gb18030": "gb18030",
    "big5": "big5",
    "shift_jis": "shift_jis",
    "euc_jp": "euc-jp",
    "euc_kr": "euc-kr",
    "cp1251": "cp1251",
    "cp1252": "cp1252",
    **_WIDE,
}
"""The encodings that are told apart, by the recogniser's name, each under the name to type; gb18030 reads GBK and
GB2312, cp1252 reads Latin-1 as it is met."""
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def decode(content: bytes, file: str, encoding: str | None = None, key: str | None = None) -> str:
    """The text of a file, a byte order mark at its beginning left out. `key` is the recipe's key for `encoding`.

    Raises SteersmanError, with the line of the first byte that does not fit and, where none was named, the encoding
    that the file looks to be in.
    """
    if encoding is None and is_wide(content):
        raise SteersmanError(f"{file}: not UTF-8; {not_utf8(content, key)}")
    try:
        text = content.decode(encoding or "utf-8").removeprefix("\ufeff")
        if encoding:
            text.encode("utf-8")  # some encodings write halves of surrogate pairs
        return text
    except UnicodeError as error:
        start = error.start if isinstance(error, UnicodeDecodeError) else 0
        line = content.count(b"\n", 0, start) + 1
        if encoding:
            named = f"that {key or 'encoding'} names, {encoding}"
            raise SteersmanError(f"{file}, line {line}: the file is not in the encoding {named} ({error})") from error
        byte = f"byte {content[start]:#04x} is not UTF-8"
        raise SteersmanError(f"{file}, line {line}: {byte}; {not_utf8(content, key)}") from error


def is_wide(content: bytes) -> bool:
    """Whether bytes are UTF-16 or UTF-32 by their mark, or by zeros that no text in UTF-8 has."""
    head = content[:_TRIED]
    return _marked(content) is not None or 4 * head.count(0) > len(head)


def not_utf8(content: bytes, key: str | None = None) -> str:
    """What to do with a file that is not UTF-8, with its probable encoding and how it begins to read in it.

    `key` is the recipe's key that names an encoding, where there is one.
    """
    name = _marked(content) or _guess(content)
    if name is None:
        return "save the file as UTF-8" + (f", or name its encoding in {key}" if key else "")
    text = content.decode(name, errors="replace").removeprefix("\ufeff")
    odd = next((i for i, c in enumerate(text) if ord(c) > 127), 0)
    shown = text[max(0, odd - 10) : odd + 20]
    also = {"gb18030": " (GBK)", "cp1252": " (Latin-1)"}.get(name, "")
    setting = f"set {key}: {name} if that is right, or " if key else ""
    return f"the file looks like {name}{also}, in which it reads {shown!r}: {setting}save the file as UTF-8"


def check_encoding(name: str) -> str:
    """The name of an encoding of text. Raises ValueError where Python has none of that name."""
    try:
        b"a".decode(name)
    except UnicodeError:
        return name  # one byte is no character of it
    except LookupError as error:
        raise ValueError(
            f"{name!r} is no encoding that is known; common ones are {', '.join(_NAMES.values())}"
        ) from error
    return name


def _marked(content: bytes) -> str | None:
    return next((name for mark, name in _MARKS.items() if content.startswith(mark)), None)


def _guess(content: bytes) -> str | None:
    from charset_normalizer import from_bytes

    head = content[:_TRIED]
    head = head[: head.rfind(b"\n") + 1] or head
    wide = is_wide(content)
    among = [name for name in _NAMES if (name in _WIDE) == wide]
    found = [match.encoding for match in from_bytes(head, cp_isolation=among)]
    return next((_NAMES[name] for name in _readable(content, found, among) if name in _NAMES), None)


def _readable(content: bytes, found: Sequence[str], among: Sequence[str]) -> list[str]:
    """The encodings that read all of it: those that were recognised, then, for a few odd bytes, Latin-1's."""
    out = []
    for name in [*found, *(n for n in among if n in ("cp1252", "utf_16_le"))]:
        try:
            content.decode(name)
        except UnicodeError:
            continue
        out.append(name)
    return out
