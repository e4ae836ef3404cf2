"""Raters, the persons behind them, and their logins."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import delete, exists, func, or_, select
from sqlalchemy.orm import Session

from steersman.people.store.database import Store, found_or_made, now
from steersman.people.store.names import fitting
from steersman.people.store.schema import HERE, Conversation, Forgotten, JudgementRow, Login, Person, Rater
from steersman.types import SteersmanError

ROLES = ("rater", "admin")
LONGEST_NAME = 100
LOGIN_SECONDS = 14 * 24 * 3600
CLOCK_SECONDS = 24 * 3600
"""How far the clock may be set back before the logins from before that have to be made anew."""
NOT_GONE_YET = (
    "somebody reads in this store, so the name is still in the file beside it that ends in -wal; it goes with that "
    "file once every program has closed the store (a restart of `steersman collect` is enough)"
)
"""What is said where `forget` could not take the name off the disk yet."""


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
    name = _checked_name(name)
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


def imported_name(source: str, who: str) -> str:
    """What `who` of another program is called here. Raises SteersmanError for what is no name."""
    return _checked_name(f"{fitting(who, LONGEST_NAME - len(source) - 3)} ({source})")


def imported_rater(session: Session, name: str) -> int:
    """The number of the rater of this `imported_name`: the same one at every import.

    The name stands with the other personal data, and can be forgotten as any; then the rater is known without it.
    """
    forgotten = None if find_person(session, name) else next(_forgotten(session, name), None)
    return known_person(session, name).rater_id if forgotten is None else forgotten.rater_id


def _forgotten(session: Session, name: str) -> Iterator[Forgotten]:
    for salt in session.scalars(select(Forgotten.salt).distinct()).all():
        yield from session.scalars(
            select(Forgotten).where(Forgotten.salt == salt, Forgotten.digest == _slow_digest(name, salt))
        )


def _checked_name(name: str) -> str:
    name = name.strip()
    if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise SteersmanError(f"{name[:120]!r}: a name has 1 to {LONGEST_NAME} printable characters")
    return name


def find_person(session: Session, name: str) -> Person | None:
    return session.scalar(select(Person).where(Person.name == name.strip()))


def people(session: Session) -> int:
    """How many persons have a password, so that someone can log in."""
    return session.scalar(select(func.count()).select_from(Person).where(Person.password.is_not(None))) or 0


def forget(store: Store, name: str) -> tuple[str, bool]:
    """Deletes a person's name, password and logins; the judgements stay under the pseudonym.

    Returns the pseudonym, and whether the name is gone from the disk, too: not before everybody has closed the store
    where somebody reads in it for long (`Store.empty_log`). Raises SteersmanError for a name that nobody has.
    """
    with store.begin() as session:
        person = find_person(session, name)
        if person is None:
            raise SteersmanError(f"{name}: the store knows nobody of this name")
        rater = session.get_one(Rater, person.rater_id)
        if _is_imported(session, rater.id):
            salt = session.scalar(select(Forgotten.salt).limit(1)) or secrets.token_hex(16)
            session.add(Forgotten(rater_id=rater.id, salt=salt, digest=_slow_digest(person.name, salt)))
        session.execute(delete(Login).where(Login.rater_id == rater.id))
        session.delete(person)
    return rater.pseudonym, store.empty_log()


def _is_imported(session: Session, rater_id: int) -> bool:
    """Whether another program's export names this rater, and so may name them again."""
    said = exists().where(JudgementRow.rater_id == rater_id, JudgementRow.source != HERE)
    chatted = exists().where(Conversation.rater_id == rater_id, Conversation.source != HERE)
    return bool(session.scalar(select(or_(said, chatted))))


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


def visitor(session: Session, token: str, *, passwordless: bool = False) -> Visitor | None:
    """Whose login this token is; None where it is nobody's or has run out, and, unless `passwordless`, where its
    person has no password. A login that a clock far ahead of now gave would last as long as the clock was ahead: it
    is none, either."""
    last = now() + LOGIN_SECONDS + CLOCK_SECONDS
    row = session.execute(
        select(Login, Person, Rater)
        .join(Person, Person.rater_id == Login.rater_id)
        .join(Rater, Rater.id == Login.rater_id)
        .where(Login.token == _hash(token), Login.expires > now(), Login.expires < last)
    ).first()
    if row is None:
        return None
    login, person, rater = row
    if person.password is None and not passwordless:
        return None
    return Visitor(rater.id, rater.pseudonym, person.name, person.role, login.csrf)


def _slow_digest(name: str, salt: str) -> str:
    """A digest of a name that takes so long that lists of names are not tried against it in passing."""
    return hashlib.scrypt(name.encode(), salt=salt.encode(), n=1 << 14, r=8, p=1, dklen=32).hex()


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
