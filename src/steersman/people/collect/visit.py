"""One request: who asks, in which language, with which form, and how its page is made."""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from steersman.people.collect import security
from steersman.people.collect.answering import Answerer
from steersman.people.collect.markdown import plain, rendered, rest, short, visible
from steersman.people.collect.texts import LANGUAGES
from steersman.people.rates import Rates
from steersman.people.store import Store
from steersman.people.store.raters import Visitor

NOTES = ("undone", "thumb_undone", "undo_nothing", "stands")


@dataclass(slots=True)
class Site:
    """What all requests share. On a `local` site, which only this machine reaches, there are no passwords until the
    store has an account: `/enter/KEY` lets in whoever was told the `key`. `runs` is the folder of runs that admins
    look at."""

    store: Store
    answerers: list[Answerer] = field(default_factory=list)
    system: str = ""
    local: bool = True
    runs: Path | None = None
    key: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    rates: Rates = field(default_factory=lambda: Rates(security.LIMITS))


@dataclass(slots=True)
class Visit:
    """One request: who, in which language, with which form. It is `open` where nobody has a password yet."""

    site: Site
    request: Request
    who: Visitor | None
    lang: str
    form: Any = None
    open: bool = False

    @property
    def store(self) -> Store:
        return self.site.store

    @property
    def rater(self) -> Visitor:
        assert self.who is not None  # pages that ask for it are behind the login
        return self.who

    def arg(self, name: str) -> str:
        return str(self.request.path_params[name])

    def field(self, name: str) -> str:
        """What the form says under a name; empty where it says nothing."""
        return str(self.form.get(name, ""))

    def page(self, template: str, status: int = 200, **values: Any) -> Response:
        words = LANGUAGES[self.lang]
        text = _templates.get_template(template).render(
            t=words, lang="zh-Hans" if self.lang == "zh" else "en", who=self.who, open=self.open,
            key=str(uuid.uuid4()), path=self._path(), note=self._note(), **values,
        )  # fmt: skip
        return HTMLResponse(text, status)

    def _path(self) -> str:
        """Where a form that leaves the page as it is leads back to."""
        return self.request.url.path if self.request.method == "GET" else "/"

    def _note(self) -> str:
        """What became of the request before this one, where the address says one of the things that it may."""
        note = self.request.query_params.get("note", "")
        return note if note in NOTES else ""

    def error_page(self, message: str, status: int = 400) -> Response:
        return self.page("error.html", status, message=visible(message))


def go(path: str) -> Response:
    """On to another page, which is then fetched by GET."""
    return RedirectResponse(path, 303)


def own_path(path: str) -> str:
    """The path that a form names, where it is one of this site; the first page otherwise."""
    return path if path.startswith("/") and not path.startswith(("//", "/\\")) else "/"


_templates = Environment(loader=PackageLoader("steersman.people.collect"), autoescape=select_autoescape())
_templates.filters |= {"md": rendered, "plain": plain, "rest": rest, "visible": visible, "short": short}
