"""Who may enter the pages: `steersman collect` in a process of its own, asked over HTTP as others would ask it."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import time
from contextlib import closing

import pytest
from forked import Python, steersman

pytest.importorskip("httpx2")
pytest.importorskip("starlette", reason="needs the extra people")

import httpx2

from steersman.people.collect import security
from steersman.people.store import open_store
from steersman.people.store.raters import add_person
from steersman.types import SteersmanError

FORWARDED = {"x-forwarded-for": "203.0.113.5"}
PASSWORD = "correct horse battery"


class Pages:
    """A server on this machine, and what it printed."""

    def __init__(self, tmp_path, env=None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.out = f"http://127.0.0.1:{port}", tmp_path / "out.txt"
        words = ("collect", "--store", str(tmp_path / "f.db"), "--host", "127.0.0.1", "--port", str(port))
        self.process: Python = steersman(*words, env=env, out=self.out)
        until = time.monotonic() + 180
        while time.monotonic() < until:
            try:
                httpx2.get(f"{self.url}/login", timeout=10)
                break
            except httpx2.HTTPError:
                assert self.process.poll() is None, self.out.read_text()
                time.sleep(0.1)

    def browser(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=30, follow_redirects=True)

    def link(self) -> str:
        return re.search(rf"{self.url}/enter/\S+", self.out.read_text())[0]

    def __enter__(self) -> Pages:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def form(page, **values: str) -> dict[str, str]:
    return {"csrf": re.search(r'name="csrf" value="([^"]*)"', page.text)[1], **values}


def test_a_store_with_accounts_lets_nobody_in_without_a_password(tmp_path):
    with closing(open_store(tmp_path / "f.db")) as store, store.begin() as session:
        add_person(session, "ada", role="admin", password=security.hashed(PASSWORD))
        add_person(session, "local", role="admin")  # of a time before the accounts
    with Pages(tmp_path) as pages, pages.browser() as client:
        assert "/enter/" not in pages.out.read_text()
        for headers in ({}, FORWARDED):
            for path in ("/", "/admin", "/look", "/chat"):
                page = client.get(path, headers=headers)
                assert (page.url.path, page.status_code) == ("/login", 200), (path, headers)
                assert "ada" not in page.text
        assert not client.cookies
        assert client.post("/name", data=form(page, name="local")).status_code == 401
        page = client.post("/login", data=form(page, name="ada", password=PASSWORD))
        assert client.get("/admin").status_code == 200


def test_without_accounts_the_printed_link_alone_lets_in(tmp_path):
    with Pages(tmp_path) as pages, pages.browser() as client, pages.browser() as stranger:
        assert "no passwords: whoever has this link is an admin" in " ".join(pages.out.read_text().split())
        for path in ("/", "/admin", "/look"):
            assert stranger.get(path).url.path == "/login"
        assert "open the link that steersman collect printed" in " ".join(stranger.get("/").text.split())
        assert stranger.get("/enter/guessed").status_code == 404
        assert client.get(pages.link()).url.path == "/"
        page = client.get("/admin")
        assert page.status_code == 200
        for name in ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip"):  # even with the login
            refused = client.get("/admin", headers={name: "203.0.113.5"})
            assert refused.status_code == 403
            assert "--add_account" in refused.text
        assert stranger.get(pages.link(), headers=FORWARDED).status_code == 403
        # once there is an account the login and the link are worth nothing any more
        first = client.post("/admin/add", data=form(page, name="bob", password=PASSWORD, role="rater"))
        assert (first.status_code, "the first one is an admin" in first.text) == (400, True)
        added = client.post("/admin/add", data=form(page, name="ada", password=PASSWORD, role="admin"))
        assert added.url.path == client.get("/admin").url.path == "/login"
        assert client.get(pages.link()).status_code == 404
        page = client.post("/login", data=form(added, name="ada", password=PASSWORD))
        assert client.get("/admin", headers=FORWARDED).status_code == 200  # a proxy in front is for accounts


@pytest.mark.parametrize("trusted", [None, "127.0.0.1"])
def test_guessing_is_limited_whatever_address_a_client_says_it_has(tmp_path, monkeypatch, trusted):
    """By address where no proxy is trusted, and by name where one is."""
    with closing(open_store(tmp_path / "f.db")) as store, store.begin() as session:
        add_person(session, "bob", password=security.hashed(PASSWORD))
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    if trusted is not None:
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", trusted)
    with Pages(tmp_path) as pages, pages.browser() as client:

        def guess(number: int, name: str) -> int:
            headers = {"x-forwarded-for": f"10.0.{number}.1"}
            return client.post("/login", data={"name": name, "password": "wrong"}, headers=headers).status_code

        assert [guess(i, "bob") for i in range(14)] == [401] * 10 + [429] * 4
        # without a trusted proxy these are all of one address
        assert guess(99, "ada") == (401 if trusted else 429)


def test_a_store_is_its_owners_alone(tmp_path, capsys):
    """Names, chats and password hashes are in it, and in the files that SQLite keeps beside it."""

    def modes() -> dict[str, int]:
        return {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}

    before = os.umask(0o022)
    try:
        with closing(open_store(tmp_path / "f.db")) as store, store.begin() as session:
            add_person(session, "ada", password="a hash")
            assert modes() == dict.fromkeys(("f.db", "f.db-wal", "f.db-shm"), 0o600)
        assert capsys.readouterr().err == ""
        held = open_store(tmp_path / "f.db")  # by a steersman of before
        with held.begin() as session:
            add_person(session, "bob", password="a hash")
        for part in tmp_path.iterdir():
            part.chmod(0o644)
        with closing(open_store(tmp_path / "f.db")):
            assert modes() == dict.fromkeys(("f.db", "f.db-wal", "f.db-shm"), 0o600)
        assert capsys.readouterr().err.count("other users of this machine could read it (mode 644)") == 3
        held.close()
        (tmp_path / "notes.txt").write_text("no store")
        with pytest.raises(SteersmanError):
            open_store(tmp_path / "notes.txt")
        assert modes()["notes.txt"] == 0o644
    finally:
        os.umask(before)
