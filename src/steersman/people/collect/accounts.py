"""Accounts, as admins edit them: added, given another password, closed, forgotten."""

from __future__ import annotations

from starlette.responses import Response

from steersman.people.collect.security import checked_password, hashed
from steersman.people.collect.visit import Visit, go
from steersman.people.store.raters import NOT_GONE_YET, add_person, forget, set_password
from steersman.types import SteersmanError

FIRST = (
    "once there is an account everybody has to log in, so the first one is an admin's; add an account with the role "
    "admin, log in with it, and add the others then"
)


def add(visit: Visit) -> Response:
    password, role = hashed(checked_password(visit.field("password"))), visit.field("role")
    if visit.open and role != "admin":
        raise SteersmanError(FIRST)
    with visit.store.begin() as session:
        add_person(session, visit.field("name"), role=role, password=password)
    return go("/admin")


def new_password(visit: Visit) -> Response:
    """Of another person, who has to log in again with it."""
    if visit.open:
        raise SteersmanError(FIRST)
    name, password = _other(visit), hashed(checked_password(visit.field("password")))
    with visit.store.begin() as session:
        set_password(session, name, password)
    return go("/admin")


def disable(visit: Visit) -> Response:
    """Nobody can log in under this name until it gets a new password; its judgements stay."""
    name = _other(visit)
    with visit.store.begin() as session:
        set_password(session, name, None)
    return go("/admin")


def forget_person(visit: Visit) -> Response:
    _, gone = forget(visit.store, _other(visit))
    return go("/admin") if gone else visit.error_page(NOT_GONE_YET)


def _other(visit: Visit) -> str:
    """The name of the form. Raises SteersmanError where it is the admin's own, who would lock everybody out."""
    name = visit.field("name").strip()
    if name == visit.rater.name:
        raise SteersmanError("this is your own account; another admin can change it, or `steersman collect --forget`")
    return name
