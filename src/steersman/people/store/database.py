"""Opening the store: its engine, its migrations, its transactions."""

from __future__ import annotations

import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from steersman.guards.terminal import say
from steersman.types import SteersmanError

try:
    import alembic.command
    import alembic.config
    import alembic.script
    import sqlalchemy
    from alembic.migration import MigrationContext
    from alembic.util import CommandError
    from sqlalchemy import Connection, Engine, event, make_url
    from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, OperationalError
    from sqlalchemy.exc import TimeoutError as PoolTimeout
    from sqlalchemy.orm import Session
except ImportError as error:
    raise SteersmanError(
        f"the store of judgements needs the extra `people` ({error.name} is missing): pip install 'steersman[people]'"
    ) from error

MIGRATIONS = Path(__file__).parent / "migrations"
DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg"}
BUSY_SECONDS = 30
"""How long a writer waits for another one before it gives up."""
LOG_SECONDS = 3
"""How long the write-ahead log waits for readers until it is emptied."""
MIGRATING, IMPORTING = 7205759403, 7205759404
"""Numbers of the locks that processes take turns by on PostgreSQL."""
PIECE = 500
"""Rows that are stored in one transaction: whoever else writes waits for these, not for a whole file."""
Found = TypeVar("Found")
One = TypeVar("One")


class StoreAwayError(SteersmanError):
    """The database of a store does not answer, or has no time, at the moment."""


class Store:
    """A database of judgements; `begin` and `read` open sessions on it."""

    def __init__(self, engine: Engine, url: str) -> None:
        self.engine, self.url = engine, url
        self._reader = engine.execution_options(steersman_begin="BEGIN")
        self._drawer = engine.execution_options(steersman_flush=False)
        # SQLite lets one write at a time and has the others ask again and again; here they queue up
        self._turn = Lock() if engine.dialect.name == "sqlite" else nullcontext()

    @contextmanager
    def begin(self, *, flushed: bool = True) -> Iterator[Session]:
        """A transaction that writes: on SQLite one at a time. It is on the disk when the block ends.

        Without `flushed` it is there with the next one that is: a killed process loses nothing, a power cut may.
        """
        engine = self.engine if flushed else self._drawer
        with self._turn, Session(engine, expire_on_commit=False) as session, session.begin():
            if not flushed and engine.dialect.name == "postgresql":
                session.execute(sqlalchemy.text("SET LOCAL synchronous_commit = off"))
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that only reads, beside writers."""
        with Session(self._reader, expire_on_commit=False) as session, session.begin():
            yield session

    def empty_log(self) -> bool:
        """Takes what was deleted out of SQLite's write-ahead log, too; False where a reader needs the log for longer
        than a moment. Then it goes with the log itself, once everybody has closed the store."""
        if self.engine.dialect.name != "sqlite":
            return True
        with self._turn, closing(self.engine.raw_connection()) as connection:  # outside of any transaction
            cursor = connection.cursor()
            cursor.execute(f"PRAGMA busy_timeout={LOG_SECONDS * 1000}")
            held_up, *_ = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            cursor.execute(f"PRAGMA busy_timeout={BUSY_SECONDS * 1000}")
            cursor.close()
        return not held_up

    def close(self) -> None:
        self.engine.dispose()


def open_store(place: str | Path, *, create: bool = True) -> Store:
    """The store at a URL (`sqlite:///FILE`, `postgresql://HOST/NAME`) or in an SQLite file, its tables up to date.

    An SQLite store is its owner's alone (mode 600); one that others can read is narrowed, and that is told.
    Whoever opens a store whose tables are up to date waits for no writer. Raises SteersmanError for another kind of
    URL, a password inside it, a file that is no store and, unless `create`, where nothing is there yet;
    StoreAwayError for a server that does not answer.
    """
    url = store_url(place)
    name = url.render_as_string(hide_password=True)
    if url.drivername == "sqlite":
        file = Path(str(url.database))
        if not create and not file.exists():
            raise SteersmanError(f"{name}: there is no such store; `steersman collect --store {file}` makes one")
        if not file.parent.is_dir():
            raise SteersmanError(f"{name}: the folder {file.parent} does not exist")
        with suppress(OSError):  # what can not be made is told by SQLite
            file.touch(mode=0o600, exist_ok=False)
        engine = sqlalchemy.create_engine(
            url, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}, pool_size=16, max_overflow=64
        )
        event.listen(engine, "connect", _sqlite_connect)
        event.listen(engine, "begin", _sqlite_begin)
    else:
        engine = sqlalchemy.create_engine(url, pool_size=16, max_overflow=16, pool_pre_ping=True)
    try:
        _migrate(engine, create)
    except DBAPIError as error:
        engine.dispose()
        raise _failure(error)(f"store {name}: it can not be opened ({reason(error)})") from error
    if url.drivername == "sqlite":
        _make_private(Path(str(url.database)).resolve())
    return Store(engine, name)


def _make_private(file: Path) -> None:
    """Leaves an SQLite store, which holds names, chats and password hashes, to its owner alone.

    SQLite makes the files beside it, -wal and -shm, with the mode of the store; those that are there get it here.
    What is somebody else's, or can not be changed, stays as it is.
    """
    for part in (file, file.with_name(f"{file.name}-wal"), file.with_name(f"{file.name}-shm")):
        with suppress(OSError):
            mode = stat.S_IMODE(part.stat().st_mode)
            if mode & 0o077:
                part.chmod(mode & 0o700)
                say(f"{part}: other users of this machine could read it (mode {mode:o}); now its owner alone can")


@contextmanager
def read_store(place: str | Path) -> Iterator[Session]:
    """A session on one snapshot of the store at an address, which is closed behind it.

    Raises SteersmanError as `open_store`, and StoreAwayError where the connection is lost meanwhile.
    """
    store = open_store(place, create=False)
    try:
        with store.read() as session:
            yield session
    except DBAPIError as error:
        raise _failure(error)(f"store {store.url}: it can not be read ({reason(error)})") from error
    finally:
        store.close()


def is_away(error: DBAPIError | PoolTimeout) -> bool:
    """Whether the database itself is away or has no time, and not what was asked of it wrong."""
    return not isinstance(error, DBAPIError) or isinstance(error, OperationalError) or error.connection_invalidated


def reason(error: DBAPIError | PoolTimeout) -> str:
    """What the database said, on one line."""
    said = str(error.orig if isinstance(error, DBAPIError) else error).strip()
    return said.splitlines()[0] if said else type(error).__name__


def _failure(error: DBAPIError) -> type[SteersmanError]:
    return StoreAwayError if is_away(error) else SteersmanError


def found_or_made(
    session: Session, find: Callable[[], Found | None], make: Callable[[], Found]
) -> tuple[Found, bool]:
    """What `find` finds, or else what `make` makes, and whether it was made.

    Where another process makes the same thing at the same moment, and a unique column lets one of them stand, it is
    what the other one made.
    """
    found = find()
    if found is not None:
        return found, False
    try:
        with session.begin_nested():
            made = make()
            session.flush()
    except IntegrityError:
        found = find()
        if found is None:
            raise
        return found, False
    return made, True


def pieces(things: Iterable[One], size: int = PIECE) -> Iterator[list[One]]:
    """The things in lists of at most so many."""
    rest = iter(things)
    while piece := list(islice(rest, size)):
        yield piece


def take_turns(connection: Connection, number: int) -> None:
    """Waits until no other transaction that asked for the same number is under way; SQLite has one writer anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(sqlalchemy.text(f"SELECT pg_advisory_xact_lock({number})"))


def store_url(place: str | Path) -> Any:
    """The address as SQLAlchemy's URL, with our driver."""
    text = str(place)
    if "://" not in text:
        return make_url("sqlite://").set(database=text)
    try:
        url = make_url(text)
    except ArgumentError:
        raise SteersmanError(f"store {text.split('@')[-1]!r}: no address of a database") from None
    if url.drivername not in DRIVERS:
        raise SteersmanError(f"store {url.drivername}://...: known are sqlite:///FILE and postgresql://HOST/NAME")
    if url.password is not None or "password" in url.query:
        plain = url.difference_update_query(["password"]).render_as_string(hide_password=True)
        raise SteersmanError(
            f"store {plain}: a password in an address ends up in recipes and "
            "logs; put it into the environment variable PGPASSWORD or the file ~/.pgpass"
        )
    if url.drivername == "sqlite" and url.database in (None, "", ":memory:"):
        raise SteersmanError(f"store {text}: name a file, such as sqlite:///feedback.db")
    return url.set(drivername=DRIVERS[url.drivername])


def now() -> float:
    """Seconds since 1970, UTC."""
    return time.time()


def new_id() -> str:
    """A random UUID."""
    return str(uuid.uuid4())


def _migrate(engine: Engine, create: bool) -> None:
    """Makes the tables, or brings them up to date; where they are, it only looks."""
    config = alembic.config.Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    head = alembic.script.ScriptDirectory.from_config(config).get_current_head()
    with engine.execution_options(steersman_begin="BEGIN").begin() as connection:
        tables = set(sqlalchemy.inspect(connection).get_table_names())
        if not create and "judgement" not in tables:
            raise SteersmanError(
                f"store {engine.url.render_as_string()}: it holds no judgements; is it the right one?"
            )
        if tables and "alembic_version" not in tables:
            raise SteersmanError(
                f"store {engine.url.render_as_string()}: it holds the tables of something else "
                f"({', '.join(sorted(tables)[:5])}); name another place"
            )
        if MigrationContext.configure(connection).get_current_revision() == head:
            return
    with engine.begin() as connection:
        take_turns(connection, MIGRATING)  # two that open it at once
        config.attributes["connection"] = connection
        try:
            alembic.command.upgrade(config, "head")
        except CommandError as error:
            raise SteersmanError(
                f"store {engine.url.render_as_string()}: it was written by a newer steersman ({error}); upgrade"
            ) from error


def _sqlite_connect(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where `_sqlite_begin` says, not where the driver guesses
    cursor = connection.cursor()
    # secure_delete: what is deleted is overwritten, so that a forgotten name is gone
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _sqlite_begin(connection: Any) -> None:
    options = connection.get_execution_options()
    # FULL: what was acknowledged outlives a power cut, too
    flush = "FULL" if options.get("steersman_flush", True) else "NORMAL"
    connection.exec_driver_sql(f"PRAGMA synchronous={flush}")
    connection.exec_driver_sql(options.get("steersman_begin", "BEGIN IMMEDIATE"))
