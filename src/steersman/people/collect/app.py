"""The application: what every request passes through, and which address leads to which page."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from jinja2 import Environment, PackageLoader, select_autoescape
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from steersman.people.collect import security
from steersman.people.collect.answering import Answerer
from steersman.people.collect.markdown import plain, rendered, short, visible
from steersman.people.collect.texts import LANGUAGES, language
from steersman.people.rates import Rates
from steersman.people.store import Store
from steersman.people.store.raters import Visitor, add_person, find_person, log_in, visitor
from steersman.types import SteersmanError

FOREIGN_FORM = "the form is not from this page; go back, load the page again and send it again"
LOCAL_NAME = "local"
"""Who judges on this machine before another name is chosen."""
NOTES = ("undone", "thumb_undone", "undo_nothing")
PAGES_AT_ONCE, ANSWERS_AT_ONCE = 8, 512
"""Pages that are made at the same time, and requests that may wait for a model meanwhile without holding up pages."""
Handler = Callable[["Visit"], Response]


@dataclass(slots=True)
class Site:
    """What all requests share. With `open` there are no passwords: only this machine reaches the pages. `runs` is the
    folder of runs that admins look at."""

    store: Store
    answerers: list[Answerer] = field(default_factory=list)
    system: str = ""
    open: bool = True
    runs: Path | None = None
    rates: Rates = field(default_factory=lambda: Rates(security.LIMITS))


@dataclass(slots=True)
class Visit:
    """One request: who, in which language, with which form."""

    site: Site
    request: Request
    who: Visitor | None
    lang: str
    form: Any = None

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
            t=words, lang="zh-Hans" if self.lang == "zh" else "en", who=self.who, open=self.site.open,
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
_templates.filters |= {"md": rendered, "plain": plain, "visible": visible, "short": short}


def make_app(site: Site, *, host: str = "127.0.0.1") -> Starlette:
    """The application for an address; on a loopback address no other name of a host is answered, so that no page of
    another site can reach it by a name of its own."""
    from steersman.people.collect import accounts, chat, judging, looking, people, run_pages

    pages, waiting = CapacityLimiter(PAGES_AT_ONCE), CapacityLimiter(ANSWERS_AT_ONCE)

    def route(
        path: str, handler: Handler, *methods: str, public: bool = False, admin: bool = False, asks: bool = False
    ) -> Route:
        limiter = waiting if asks else pages
        return Route(path, _endpoint(site, handler, public, admin, limiter), methods=list(methods) or ["GET"])

    hosts = ["127.0.0.1", "localhost", "[::1]"] if security.is_loopback(host) else ["*"]
    return Starlette(
        routes=[
            route("/", judging.home),
            route("/login", people.login, "GET", "POST", public=True),
            route("/logout", people.logout, "POST"),
            route("/name", people.name, "POST"),
            route("/language", people.language, "POST"),
            route("/judge/{queue:int}", judging.next_page),
            route("/item/{assignment}", judging.item_page),
            route("/item/{assignment}", judging.judge, "POST"),
            route("/undo", judging.take_back, "POST"),
            route("/chat", chat.chats, "GET", "POST"),
            route("/chat/{chat}", chat.show),
            route("/chat/{chat}/say", chat.say, "POST", asks=True),
            route("/chat/{chat}/answer", chat.answer, "POST", asks=True),
            route("/chat/{chat}/edit/{turn}", chat.edit, "POST", asks=True),
            route("/chat/{chat}/thumb/{turn}", chat.thumb, "POST"),
            route("/look", looking.judgements, admin=True),
            route("/look/conversations", looking.conversations, admin=True),
            route("/look/conversation/{chat}", looking.conversation, admin=True),
            route("/look/runs", run_pages.runs, admin=True),
            route("/look/run/{run:path}", run_pages.run, admin=True),
            route("/look/rows/{run:path}", run_pages.rows, admin=True),
            route("/look/beside", run_pages.side_by_side, admin=True),
            route("/admin", looking.overview, admin=True),
            route("/admin/forget", accounts.forget_person, "POST", admin=True),
            route("/admin/add", accounts.add, "POST", admin=True),
            route("/admin/password", accounts.new_password, "POST", admin=True),
            route("/admin/disable", accounts.disable, "POST", admin=True),
            Mount("/static", StaticFiles(directory=Path(__file__).parent / "static")),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(_Headers)],
    )


def _endpoint(
    site: Site, handler: Handler, public: bool, admin: bool, limiter: CapacityLimiter
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        form, lang = None, language(request.cookies.get("lang"), request.headers.get("accept-language", ""))
        if request.method == "POST":
            stranger = Visit(site, request, None, lang)
            if not security.fits(request):
                return stranger.error_page("the form is too large", 413)
            if not security.is_same_site(request):
                return stranger.error_page(FOREIGN_FORM, 403)
            client = request.client.host if request.client else ""
            if request.url.path == "/login" and not site.rates.allows("login", client):
                return stranger.error_page(LANGUAGES[lang]["busy"], 429)
            form = await request.form(max_files=0, max_fields=200)
        visit = Visit(site, request, None, lang, form)
        return await run_sync(_answer, visit, handler, public, admin, limiter=limiter)

    return endpoint


def _answer(visit: Visit, handler: Handler, public: bool, admin: bool) -> Response:
    token, fresh = visit.request.cookies.get(security.COOKIE, ""), None
    with visit.store.read() as session:
        visit.who = visitor(session, token) if token else None
    if visit.who is None and visit.site.open and visit.request.method == "GET":
        visit.who, fresh = enter(visit.store, LOCAL_NAME)
    if visit.who is None and not public:
        return go("/" if visit.site.open else "/login")
    if admin and visit.rater.role != "admin":
        return visit.error_page("404", 404)
    if visit.form is not None and visit.who is not None:
        if not security.has_token(visit.form, visit.who.csrf):
            return visit.error_page(FOREIGN_FORM, 403)
        if not visit.site.rates.allows("post", visit.who.csrf):
            return visit.error_page(LANGUAGES[visit.lang]["busy"], 429)
    try:
        response = handler(visit)
    except SteersmanError as error:
        response = visit.error_page(str(error))
    if fresh is not None:
        security.set_login(response, visit.request, fresh)
    return response


def enter(store: Store, name: str) -> tuple[Visitor | None, str]:
    """A login without a password, on this machine only. Raises SteersmanError for an account that has one."""
    with store.begin() as session:
        person = find_person(session, name)
        if person is not None and person.password is not None:
            raise SteersmanError(f"{name}: this account has a password; choose another name")
        role = "admin" if name == LOCAL_NAME else "rater"
        rater_id = add_person(session, name, role=role).id if person is None else person.rater_id
        token = log_in(session, rater_id)
        session.flush()
        return visitor(session, token), token


class _Headers:
    """Puts the security headers on every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                more = [(k.lower().encode(), v.encode()) for k, v in security.HEADERS.items()]
                message["headers"] = [*message["headers"], *(h for h in more if h[0] not in names)]
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)
