"""The server is killed while raters judge: what it acknowledged is there, once. One that is asked to end leaves the
whole store in its file."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import sqlite3
import threading
import time
import uuid
from contextlib import closing
from pathlib import Path

import pytest
from forked import Python, steersman
from people_kit import pair, queue
from sqlalchemy import select

httpx2 = pytest.importorskip("httpx2")
pytest.importorskip("starlette", reason="needs the extra people")

from steersman.people.store import open_store
from steersman.people.store.schema import JudgementRow

SERVER = """
import sys, uvicorn
from steersman.people.collect.app import make_app
from steersman.people.collect.visit import Site
from steersman.people.store import open_store
uvicorn.run(make_app(Site(open_store(sys.argv[1]), key=sys.argv[3])), port=int(sys.argv[2]), log_config=None)
"""
KEY = "a-key"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def judge_until(stop: threading.Event, base: str, name: str, told: dict[str, int]) -> None:
    """A rater who judges as fast as the server answers, and notes every key that it acknowledged."""
    while not stop.is_set():
        try:
            with httpx2.Client(base_url=base, follow_redirects=True, timeout=10) as client:
                page = client.get(f"/enter/{KEY}")
                token = re.findall(r'name="csrf" value="([^"]*)"', page.text)[0]
                client.post("/name", data={"csrf": token, "name": name})
                page = client.get("/judge/1")
                while not stop.is_set():
                    token = re.findall(r'name="csrf" value="([^"]*)"', page.text)[0]
                    action, key = re.findall(r'action="(/item/[^"]+)"', page.text)[0], str(uuid.uuid4())
                    data = {"csrf": token, "key": key, "choice": "tie"}
                    saved = client.post(action, data=data, follow_redirects=False)
                    if saved.status_code == 303:
                        told[key] = told.get(key, 0) + 1
                    page = client.get("/judge/1")
        except (httpx2.HTTPError, IndexError):
            time.sleep(0.05)


def link_of(server: Python, out: Path, port: int) -> str:
    """The link that is printed, once the pages are there."""
    until = time.monotonic() + 180
    while time.monotonic() < until:
        try:
            httpx2.get(f"http://127.0.0.1:{port}/login", timeout=10)
            break
        except httpx2.HTTPError:
            assert server.poll() is None
            time.sleep(0.1)
    return re.search(rf"http://127\.0\.0\.1:{port}/enter/\S+", out.read_text())[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whoever_ends_it_finds_the_whole_store_in_one_file(tmp_path, number):
    """Copied alone, as by a backup after the stop."""
    rows = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r"} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    queues = {"week": {"task": "compare", "file": str(tmp_path / "pairs.jsonl")}}
    place, port = tmp_path / "f.db", free_port()
    recipe = tmp_path / "collect.yaml"
    recipe.write_text(json.dumps({"store": str(place), "port": port, "queues": queues}))
    server = steersman("collect", str(recipe), out=tmp_path / "out.txt")
    page = httpx2.get(link_of(server, tmp_path / "out.txt", port), timeout=10, follow_redirects=True)
    assert "week" in page.text
    server.send_signal(number)
    assert server.wait(60) == 0
    assert sorted(p.name for p in tmp_path.glob("f.db*")) == ["f.db"]
    with closing(sqlite3.connect(shutil.copy(place, tmp_path / "copy.db"))) as copy:
        assert copy.execute("SELECT count(*) FROM item").fetchone() == (3,)
        assert copy.execute("SELECT count(*) FROM login").fetchone() == (1,)


@pytest.mark.slow
def test_every_acknowledged_judgement_outlives_a_kill(tmp_path):
    place = str(tmp_path / "f.db")
    store = open_store(place)
    queue(store, "compare", [pair(i) for i in range(2000)], overlap=9)
    port = free_port()
    stop, told = threading.Event(), {}
    raters = [
        threading.Thread(target=judge_until, args=(stop, f"http://127.0.0.1:{port}", f"rater {i}", told))
        for i in range(4)
    ]
    for rater in raters:
        rater.start()
    try:
        for kill in range(3):
            server = Python("-c", SERVER, place, str(port), KEY)
            before, until = len(told), time.monotonic() + 180
            while len(told) < before + 20 + 3 * kill and time.monotonic() < until:
                time.sleep(0.01)
            server.send_signal(signal.SIGKILL)
            server.wait()
            assert len(told) > before, "the server came up and took judgements"
    finally:
        stop.set()
        for rater in raters:
            rater.join()
    with store.read() as session:
        stored = set(session.scalars(select(JudgementRow.key)))
        subjects = session.execute(select(JudgementRow.item_id, JudgementRow.rater_id)).all()
    store.close()
    assert set(told) <= stored
    assert len(set(subjects)) == len(subjects)
