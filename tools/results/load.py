"""Many people at once on the pages of `steersman collect`, and a server that is killed under them.

    python tools/results/load.py --clients 200 --seconds 120 --kills 50 --docs docs/results

Load: every client waits a random time (10 seconds on average) between two actions; of ten actions eight judge a pair,
one says something in a chat with the story model, and one gives a thumb. Times are of whole requests as the client
sees them, those that wait for an answer of the model apart. Clients and server share the machine.
Kills: 40 clients judge without a pause; the server gets SIGKILL at random moments and is started again.
After each, the store is compared with what clients were told: every judgement that was acknowledged (by its key) is
there, and none is there twice.
`--out` keeps both: kills that were made are counted, not made again, and `--minutes` ends a call between two of them.
`--clients 0` takes the load as it was measured before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import time
import uuid
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from load_page import SHOWN, page
from pages import collecting, free_port, started
from sqlalchemy import select

from steersman.assets import openings, story_model
from steersman.people.store import open_store
from steersman.people.store.conversations import TurnText
from steersman.people.store.items import NewItem, add_item, make_queue
from steersman.people.store.judgements import live
from steersman.people.store.schema import JudgementRow

PAUSE = 10.0
"""Seconds between two actions of a client, on average."""
ITEMS, KILLED_CLIENTS = 400, 40
TLS = False
"""No address here is https, and to read the certificates for each client would take the server's processor time."""


class Client:
    """One person, who comes by the `link` as it is then: what they are told is noted in `acknowledged`, how long it
    took in `seconds`."""

    def __init__(self, link: str, number: int, pause: float, chats: bool) -> None:
        self.link, self.name, self.rng = link, f"person {number}", random.Random(number)
        self.pause, self.chats = pause, chats
        self.acknowledged: list[str] = []
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.refused: Counter[str] = Counter()
        self.csrf = self.form = ""
        self.answered: list[str] = []

    async def live(self, until: float) -> None:
        """Comes within the first pause, and acts until a moment; whatever breaks, they load the page again."""
        await asyncio.sleep(self.rng.uniform(0, self.pause))
        while time.monotonic() < until:
            try:
                async with httpx2.AsyncClient(
                    base_url=self.link.partition("/enter/")[0], timeout=60, verify=TLS
                ) as self.http:
                    await self.enter()
                    while time.monotonic() < until:
                        await asyncio.sleep(self.rng.expovariate(1 / self.pause) if self.pause else 0)
                        await self.act()
            except (httpx2.HTTPError, IndexError, KeyError):
                self.refused["the connection broke"] += 1
                await asyncio.sleep(0.2)

    async def enter(self) -> None:
        await self.request("link", "GET", self.link)
        self.read(await self.request("page", "GET", "/"))
        await self.request("name", "POST", "/name", {"name": self.name})
        self.read(await self.request("page", "GET", "/judge/1"))

    async def act(self) -> None:
        drawn = self.rng.random()
        if not self.chats or drawn < 0.8:
            await self.judge()
        elif drawn < 0.9 or not self.answered:
            await self.say()
        else:
            await self.judged(self.rng.choice(self.answered), {"up": "1"}, "thumb")

    async def judge(self) -> None:
        choice = self.rng.choice(["A", "B", "tie", "both_bad"])
        await self.judged(self.form, {"choice": choice}, "judgement")
        self.read(await self.request("page", "GET", "/judge/1"))

    async def judged(self, action: str, values: dict[str, str], kind: str) -> None:
        key = str(uuid.uuid4())
        reply = await self.request(kind, "POST", action, values | {"key": key})
        if reply.status_code == 303:
            self.acknowledged.append(key)
        else:
            self.refused[f"{kind}: {reply.status_code}"] += 1

    async def say(self) -> None:
        made = await self.request("chat", "POST", "/chat")
        chat = made.headers["location"]
        await self.request("answer of the model", "POST", f"{chat}/say", {"text": self.rng.choice(openings())})
        page = await self.request("page", "GET", chat)
        self.answered += re.findall(r'action="(/chat/[^"]+/thumb/[^"]+)"', page.text)

    def read(self, page: httpx2.Response) -> None:
        self.csrf = re.findall(r'name="csrf" value="([^"]*)"', page.text)[0]
        self.form = next(iter(re.findall(r'action="(/item/[^"]+)"', page.text)), "")

    async def request(
        self, kind: str, method: str, path: str, values: dict[str, str] | None = None
    ) -> httpx2.Response:
        data = None if method == "GET" else {"csrf": self.csrf, **(values or {})}
        begun = time.monotonic()
        reply = await self.http.request(method, path, data=data)
        self.seconds[kind].append(time.monotonic() - begun)
        if reply.status_code >= 400:
            self.refused[f"{kind}: {reply.status_code}"] += 1
        return reply


def fill(place: str) -> None:
    store = open_store(place)
    with store.begin() as session:
        queue = make_queue(session, "pairs", "compare", overlap=10**6)
        for i in range(ITEMS):
            text = [
                TurnText(f"{word} story {i}. " + "Once upon a time there was a cat. " * 8)
                for word in ("One", "Other")
            ]
            add_item(session, queue, NewItem(f"Tell story {i}.", text))
    store.close()


def compared(place: str, told: list[str]) -> dict[str, int]:
    """The keys that were acknowledged beside what the store holds."""
    store = open_store(place)
    with store.read() as session:
        keys = set(session.scalars(select(JudgementRow.key)))
        pairs = session.execute(
            select(JudgementRow.item_id, JudgementRow.rater_id).where(live(), JudgementRow.item_id.is_not(None))
        ).all()
    store.close()
    return {
        "acknowledged": len(told), "stored": len(keys), "lost": len(set(told) - keys),
        "double": len(pairs) - len(set(pairs)),
    }  # fmt: skip


async def everybody(clients: list[Client], until: float) -> None:
    await asyncio.gather(*(client.live(until) for client in clients))


def load(out: Path, count: int, seconds: float) -> dict[str, Any]:
    """Many clients with pauses."""
    place, busy = str(out / "load.db"), os.getloadavg()[0]
    for old in out.glob("load.db*"):
        old.unlink()
    fill(place)
    arguments = ["--store", place, "--model.path", str(story_model()), "--sampling.max_new_tokens", "48"]
    with collecting(*arguments) as (link, server):
        clients, begun = [Client(link, i, PAUSE, chats=True) for i in range(count)], cpu_seconds(server.pid)
        asyncio.run(everybody(clients, time.monotonic() + seconds))
        cpu = cpu_seconds(server.pid) - begun
    times: dict[str, list[float]] = defaultdict(list)
    for client in clients:
        for kind, some in client.seconds.items():
            times[kind] += some
            if kind != "answer of the model":
                times["everything but answers"] += some
    shown = {
        kind: {"requests": len(some), **{f"p{q}": round(1000 * np.percentile(some, q)) for q in SHOWN}}
        for kind, some in times.items()
    }
    refused = sum((client.refused for client in clients), Counter())
    found = {"clients": count, "seconds": seconds, "milliseconds": shown, "refused": dict(refused)}
    found |= {"server_cpu_seconds": round(cpu, 1), "cores": os.cpu_count(), "load_average_before": busy}
    return found | compared(place, [key for client in clients for key in client.acknowledged])


def cpu_seconds(pid: int) -> float:
    """Of a process so far, its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def kills(out: Path, wanted: int, seed: int, minutes: float) -> dict[str, Any]:
    """A server that is killed under load, again and again: `wanted` times, those of earlier calls among them."""
    place, port, record, kept = str(out / "kills.db"), free_port(), out / "kills.jsonl", out / "acknowledged.txt"
    if not record.exists():
        fill(place)
        record.touch()
        kept.touch()
    at: list[int] = [json.loads(line)["acknowledged"] for line in record.read_text().splitlines()]
    first, until = len(at), time.monotonic() + 60 * minutes
    names = range(first * KILLED_CLIENTS, (first + 1) * KILLED_CLIENTS)  # new people, who have judged nothing yet
    clients = [Client(f"http://127.0.0.1:{port}/enter/none", i, 0.0, chats=False) for i in names]

    def told() -> int:
        return sum(len(client.acknowledged) for client in clients)

    async def kill(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        link, server = await asyncio.to_thread(started, port, "--store", place)
        for client in clients:
            client.link = link
        before = told()
        while told() == before:
            await asyncio.sleep(0.01)
        await asyncio.sleep(rng.uniform(0, 2))
        server.send_signal(signal.SIGKILL)
        await asyncio.to_thread(server.wait)
        at.append(told() - before)
        kept.write_text(earlier + "".join(f"{key}\n" for client in clients for key in client.acknowledged))
        with record.open("a") as file:
            file.write(json.dumps({"kill": number + 1, "acknowledged": at[-1]}) + "\n")
        print(f"kill {number + 1}: {at[-1]} judgements were acknowledged since the start", flush=True)

    async def killing() -> None:
        tasks = [asyncio.create_task(client.live(float("inf"))) for client in clients]
        while len(at) < wanted and time.monotonic() < until:
            await kill(len(at))
        for task in tasks:
            task.cancel()

    earlier = kept.read_text()
    asyncio.run(killing())
    found = compared(place, kept.read_text().split())
    return {"kills": len(at), "clients": KILLED_CLIENTS, "acknowledged_before_each": at} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/load"))
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no kill is begun later")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--docs", type=Path, help="where load.md and load.json go; without it nothing is written there"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    measured = args.out / "load.json"
    if args.clients:
        got = load(args.out, args.clients, args.seconds)
        measured.write_text(json.dumps(got))
        print(json.dumps(got, indent=1), flush=True)
    found: dict[str, Any] = {"load": json.loads(measured.read_text())} if measured.exists() else {}
    if args.kills:
        found["kills"] = kills(args.out, args.kills, args.seed, args.minutes)
        print(json.dumps(found["kills"]), flush=True)
    if args.docs:
        command = "python tools/results/load.py --clients 200 --seconds 120 --kills 50 --docs docs/results"
        (args.docs / "load.json").write_text(json.dumps(found, indent=1) + "\n")
        (args.docs / "load.md").write_text(page(found, command))


if __name__ == "__main__":
    main()
