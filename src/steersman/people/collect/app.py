"""The application: what every request passes through, and which address leads to which page."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from steersman.guards.terminal import printable
from steersman.people.addresses import host_names
from steersman.people.collect import accounts, chat, judging, looking, people, run_pages, security
from steersman.people.collect.texts import LANGUAGES, language
from steersman.people.collect.visit import Site, Visit, go
from steersman.people.store.database import is_away, reason
from steersman.people.store.raters import people as accounts_of
from steersman.people.store.raters import visitor
from steersman.types import SteersmanError

FOREIGN_FORM = (
    "this form is of another page or another login; send it again, and if that does not help, copy what you wrote "
    "and load the page anew"
)
FORWARDED_OPEN = (
    "this request came through a proxy, and while the store has no account these pages are for this machine alone; "
    "make one first: steersman collect --store STORE --add_account NAME --role admin"
)
PAGES_AT_ONCE, ANSWERS_AT_ONCE = 8, 512
"""Pages that are made at the same time, and requests that may wait for a model meanwhile without holding up pages."""
Handler = Callable[[Visit], Response]
logger = logging.getLogger(__name__)


def make_app(site: Site, *, host: str = "127.0.0.1") -> Starlette:
    """The application for an address, which answers to the names of `addresses.host_names` only."""
    pages, waiting = CapacityLimiter(PAGES_AT_ONCE), CapacityLimiter(ANSWERS_AT_ONCE)

    def route(
        path: str, handler: Handler, *methods: str, public: bool = False, admin: bool = False, asks: bool = False
    ) -> Route:
        limiter = waiting if asks else pages
        return Route(path, _endpoint(site, handler, public, admin, limiter), methods=list(methods) or ["GET"])

    return Starlette(
        routes=[
            route("/", judging.home),
            route("/enter/{key}", people.enter_here, public=True),
            route("/login", people.login, "GET", "POST", public=True),
            route("/logout", people.logout, "POST"),
            route("/name", people.name, "POST"),
            route("/language", people.language, "POST"),
            route("/judge/{queue}", judging.next_page),
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
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=host_names(host)), Middleware(_Headers)],
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
        return await run_sync(_served, visit, handler, public, admin, limiter=limiter)

    return endpoint


def _served(visit: Visit, handler: Handler, public: bool, admin: bool) -> Response:
    """What is answered; where the database is away, a page that says so, and a line in the log."""
    try:
        return _answer(visit, handler, public, admin)
    except (DBAPIError, PoolTimeout) as error:
        if not is_away(error):
            raise
        asked = f"{visit.request.method} {visit.request.url.path}"
        logger.warning("%s: 503, the store %s does not answer (%s)", printable(asked), visit.store.url, reason(error))
        visit.who = None  # the page would offer what can not be had now
        return visit.error_page(LANGUAGES[visit.lang]["away"], 503)


def _answer(visit: Visit, handler: Handler, public: bool, admin: bool) -> Response:
    token = visit.request.cookies.get(security.COOKIE, "")
    with visit.store.read() as session:
        visit.open = visit.site.local and not accounts_of(session)
        if visit.open and security.is_forwarded(visit.request):
            return visit.error_page(FORWARDED_OPEN, 403)
        visit.who = visitor(session, token, passwordless=visit.open) if token else None
    if visit.who is None and not public:
        if visit.form is not None:  # what was written stays on the page that sends it
            return visit.error_page(LANGUAGES[visit.lang]["logged_out"], 401)
        return go("/login")
    if admin and visit.rater.role != "admin":
        return visit.error_page("404", 404)
    if visit.form is not None and visit.who is not None:
        if not security.has_token(visit.form, visit.who.csrf):
            return visit.error_page(FOREIGN_FORM, 403)
        if not visit.site.rates.allows("post", visit.who.csrf):
            return visit.error_page(LANGUAGES[visit.lang]["busy"], 429)
    try:
        return handler(visit)
    except SteersmanError as error:
        return visit.error_page(str(error))


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
