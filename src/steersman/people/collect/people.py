"""Logging in and out, the link of this machine, the name, the language."""

from __future__ import annotations

from starlette.responses import Response

from steersman.people.collect import security
from steersman.people.collect.texts import LANGUAGES
from steersman.people.collect.visit import Visit, go, own_path
from steersman.people.store.raters import LONGEST_NAME, find_person, known_person, log_in, log_out
from steersman.types import SteersmanError

LOCAL_NAME = "local"
"""Who judges on this machine before another name is chosen."""


def enter_here(visit: Visit) -> Response:
    """Lets in whoever has the link that `steersman collect` prints, while nobody has a password."""
    if not visit.open or not security.same_secret(visit.arg("key"), visit.site.key):
        return visit.error_page("404", 404)
    return _entered(visit, LOCAL_NAME)


def _entered(visit: Visit, name: str) -> Response:
    """A login without a password. Raises SteersmanError for an account that has one."""
    with visit.store.begin() as session:
        person = known_person(session, name, role="admin" if name == LOCAL_NAME else "rater")
        if person.password is not None:
            raise SteersmanError(f"{name}: this account has a password; choose another name")
        token = log_in(session, person.rater_id)
    response = go("/")
    security.set_login(response, visit.request, token)
    return response


def login(visit: Visit) -> Response:
    if visit.request.method == "GET":
        return visit.page("login.html", wrong=False)
    name = visit.field("name").strip()[:LONGEST_NAME]
    if not visit.site.rates.allows("login-name", name):
        return visit.error_page(LANGUAGES[visit.lang]["busy"], 429)
    with visit.store.read() as session:
        person = find_person(session, name)
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
    """Judges under another name, while nobody has a password."""
    return _entered(visit, visit.field("name")) if visit.open else visit.error_page("404", 404)


def language(visit: Visit) -> Response:
    others = [one for one in LANGUAGES if one != visit.lang]
    response = go(own_path(visit.field("path")))
    response.set_cookie("lang", others[0], max_age=365 * 24 * 3600, samesite="strict")
    return response
