"""Logging in and out, the name on this machine, the language."""

from __future__ import annotations

from starlette.responses import Response

from steersman.people.collect import security
from steersman.people.collect.texts import LANGUAGES
from steersman.people.collect.visit import Visit, go, own_path
from steersman.people.store import Store
from steersman.people.store.raters import Visitor, find_person, known_person, log_in, log_out, visitor
from steersman.types import SteersmanError

LOCAL_NAME = "local"
"""Who judges on this machine before another name is chosen."""


def enter(store: Store, name: str) -> tuple[Visitor | None, str]:
    """A login without a password, on this machine only. Raises SteersmanError for an account that has one."""
    with store.begin() as session:
        person = known_person(session, name, role="admin" if name == LOCAL_NAME else "rater")
        if person.password is not None:
            raise SteersmanError(f"{name}: this account has a password; choose another name")
        token = log_in(session, person.rater_id)
        session.flush()
        return visitor(session, token), token


def enter_here(store: Store) -> tuple[Visitor | None, str | None]:
    """The login of whoever opens the pages on this machine; none where the account has a password to log in with."""
    try:
        return enter(store, LOCAL_NAME)
    except SteersmanError:
        return None, None


def login(visit: Visit) -> Response:
    if visit.request.method == "GET":
        return visit.page("login.html", wrong=False)
    with visit.store.read() as session:
        person = find_person(session, str(visit.form.get("name", ""))[:100])
    stored = person.password if person is not None else None
    if not security.right_password(stored, str(visit.form.get("password", ""))) or person is None:
        return visit.page("login.html", 401, wrong=True)
    with visit.store.begin() as session:
        token = log_in(session, person.rater_id)
    response = go("/")
    security.set_login(response, visit.request, token)
    return response


def logout(visit: Visit) -> Response:
    with visit.store.begin() as session:
        log_out(session, visit.request.cookies[security.COOKIE])
    response = go("/login")
    response.delete_cookie(security.COOKIE)
    return response


def name(visit: Visit) -> Response:
    """Judges under another name: where only this machine reaches the pages."""
    if not visit.site.open:
        return visit.error_page("404", 404)
    _, token = enter(visit.store, str(visit.form.get("name", "")))
    response = go("/")
    security.set_login(response, visit.request, token)
    return response


def language(visit: Visit) -> Response:
    others = [one for one in LANGUAGES if one != visit.lang]
    response = go(own_path(visit.field("path")))
    response.set_cookie("lang", others[0], max_age=365 * 24 * 3600, samesite="strict")
    return response
