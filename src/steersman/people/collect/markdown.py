"""What models and files say, as HTML that a page may show."""

from __future__ import annotations

import html
import re
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markupsafe import Markup

LONGEST = 20_000
"""Characters of one text that are shown; the rest is counted."""
WIDE = '<div class="wide" tabindex="0"><table>'
"""How a table begins: one that is wider than its column is scrolled, by keyboard too."""
TAGS = {
    "p", "br", "hr", "em", "strong", "code", "pre", "blockquote", "ul", "ol", "li", "a",
    "h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td", "s",
}  # fmt: skip
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_markdown = (
    MarkdownIt("commonmark", {"html": False, "breaks": True}).enable("table").enable("strikethrough").disable("image")
)


def rendered(text: str) -> Markup:
    """Markdown as sanitised HTML: no raw HTML, no image, no script, links only to http(s) and mail.

    A line that ends in the text ends on the page as well, so that a poem or a list without marks is seen as written.
    Marks that turn the direction of writing are written out, so that no text turns round what stands beside it.
    """
    shown = visible(text[:LONGEST])
    clean = nh3.clean(
        _markdown.render(shown), tags=TAGS, attributes={"a": {"href"}, "ol": {"start"}},
        url_schemes={"http", "https", "mailto"}, link_rel="noopener noreferrer nofollow",
    )  # fmt: skip
    scrolled = clean.replace("<table>", WIDE).replace("</table>", "</table></div>")  # as text these are escaped
    return Markup(scrolled) + rest(text)


def plain(text: str) -> Markup:
    """The text as it is, character for character (but for controls), and nothing else, so that a span can be marked
    in it; what is said of the `rest` stands outside.

    A browser would make one line end of a CR and a LF; of a CR that is written as its number it makes a space.
    """
    shown = _CONTROLS.sub(lambda m: m[0] if m[0] == "\r" else "\ufffd", text[:LONGEST])
    return Markup(html.escape(shown).replace("\r", "&#13;"))


def visible(text: str) -> str:
    """The text with control characters and direction marks written out."""
    return _CONTROLS.sub(lambda m: f"[U+{ord(m[0]):04X}]", text.replace("\r\n", "\n"))


def short(value: Any) -> str:
    """A number with four digits; anything else as it is, cut."""
    return f"{value:.4g}" if isinstance(value, float) else visible(str(value)[:40])


def rest(text: str) -> Markup:
    """How many characters of the text are not shown, where there are any."""
    more = len(text) - LONGEST
    return Markup(f'<p class="rest">[+{more:,}]</p>' if more > 0 else "")
