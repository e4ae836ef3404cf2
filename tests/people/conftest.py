"""Stores of both kinds: SQLite in a file, and a private PostgreSQL cluster in a temporary folder."""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy", reason="needs the extra people")

from steersman.people.store import Store, open_store


def _postgres_bin() -> Path | None:
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return versions[-1].parent if versions else None


def _user() -> str | None:
    """PostgreSQL refuses to run as root: who else there is."""
    if os.geteuid() != 0:
        return getpass.getuser()
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of a server that only this session knows; it skips where PostgreSQL is not installed."""
    programs, user = _postgres_bin(), _user()
    if programs is None or user is None:
        pytest.skip("needs PostgreSQL (Debian: apt-get install postgresql)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="steersman-pg-"))
    shutil.chown(folder, user)

    def as_user(*command: str) -> None:
        switch = ["setpriv", f"--reuid={user}", f"--regid={pwd.getpwnam(user).pw_gid}", "--clear-groups"]
        whole = [*(switch if os.geteuid() == 0 else []), *command]
        done = subprocess.run(whole, cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    data = str(folder / "data")
    as_user(str(programs / "initdb"), "-D", data, "-A", "trust", "-U", "tester", "--no-sync")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    as_user(str(programs / "pg_ctl"), "-D", data, "-w", "-o", options, "-l", str(folder / "log"), "start")
    try:
        yield f"postgresql://tester@127.0.0.1:{port}"
    finally:
        as_user(str(programs / "pg_ctl"), "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request, tmp_path) -> str:
    """The address of an empty store: of either kind, unless a test names one (`indirect`)."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'feedback.db'}"
    import psycopg

    server = request.getfixturevalue("cluster")
    name = f"t{uuid.uuid4().hex[:12]}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{server}/{name}"


@pytest.fixture
def store(address) -> Iterator[Store]:
    made = open_store(address)
    yield made
    made.close()
