"""Raters, the persons behind them, and their logins."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from steersman.people.store.database import found_or_made, now
from steersman.people.store.schema import Login, Person, Rater
from steersman.types import SteersmanError

ROLES = ("rater", "admin")
LOGIN_SECONDS = 14 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who a request comes from, as their login says."""

    rater_id: int
    pseudonym: str
    name: str
    role: str
    csrf: str


def add_person(session: Session, name: str, *, role: str = "rater", password: str | None = None) -> Rater:
    """A new rater with a name; `password` is a hash already. Raises SteersmanError for a name that is taken."""
    person, new = _person(session, name, role, password)
    if not new:
        raise SteersmanError(f"{person.name}: there is such an account already")
    return session.get_one(Rater, person.rater_id)


def known_person(session: Session, name: str, *, role: str = "rater") -> Person:
    """The person of this name, who is made, without a password, where there is none."""
    return _person(session, name, role, None)[0]


def _person(session: Session, name: str, role: str, password: str | None) -> tuple[Person, bool]:
    name = name.strip()
    if not name or len(name) > 100 or not name.isprintable():
        raise SteersmanError("a name has 1 to 100 printable characters")
    if role not in ROLES:
        raise SteersmanError(f"role {role!r}: known are {', '.join(ROLES)}")

    def make() -> Person:
        rater = new_rater(session)
        made = Person(rater_id=rater.id, name=name, password=password, role=role, created=now())
        session.add(made)
        return made

    return found_or_made(session, lambda: find_person(session, name), make)


def new_rater(session: Session) -> Rater:
    """A rater without a person yet."""
    rater = Rater(pseudonym=f"r-{secrets.token_hex(5)}", created=now())
    session.add(rater)
    session.flush()
    return rater


def imported_rater(session: Session, source: str, who: str) -> int:
    """The number of the rater that `who` of another program's export becomes: the same one at every import.

    The name stands with the other personal data, and can be forgotten as any.
    """
    return known_person(session, f"{who[:60]} ({source})").rater_id


def find_person(session: Session, name: str) -> Person | None:
    return session.scalar(select(Person).where(Person.name == name.strip()))


def people(session: Session) -> int:
    """How many persons have a password, so that someone can log in."""
    return session.scalar(select(func.count()).select_from(Person).where(Person.password.is_not(None))) or 0


def forget(session: Session, name: str) -> str:
    """Deletes a person's name, password and logins; the judgements stay under the pseudonym, which is returned."""
    person = find_person(session, name)
    if person is None:
        raise SteersmanError(f"{name}: the store knows nobody of this name")
    rater = session.get_one(Rater, person.rater_id)
    session.execute(delete(Login).where(Login.rater_id == rater.id))
    session.delete(person)
    return rater.pseudonym


def set_password(session: Session, name: str, password: str | None) -> None:
    """Gives a person another password (a hash), or none, so that nobody can log in; whoever is logged in is out."""
    person = find_person(session, name)
    if person is None:
        raise SteersmanError(f"{name}: the store knows nobody of this name")
    person.password = password
    session.execute(delete(Login).where(Login.rater_id == person.rater_id))


def log_in(session: Session, rater_id: int) -> str:
    """A new login's token, which only the browser keeps; the store has its hash."""
    token = secrets.token_urlsafe(32)
    session.execute(delete(Login).where(Login.expires < now()))
    session.add(
        Login(
            token=_hash(token), rater_id=rater_id, csrf=secrets.token_urlsafe(24),
            created=now(), expires=now() + LOGIN_SECONDS,
        )
    )  # fmt: skip
    return token


def log_out(session: Session, token: str) -> None:
    session.execute(delete(Login).where(Login.token == _hash(token)))


def visitor(session: Session, token: str) -> Visitor | None:
    """Whose login this token is; None where it is nobody's or has run out."""
    row = session.execute(
        select(Login, Person, Rater)
        .join(Person, Person.rater_id == Login.rater_id)
        .join(Rater, Rater.id == Login.rater_id)
        .where(Login.token == _hash(token), Login.expires > now())
    ).first()
    if row is None:
        return None
    login, person, rater = row
    return Visitor(rater.id, rater.pseudonym, person.name, person.role, login.csrf)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
