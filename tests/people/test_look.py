"""What admins look at: conversations, runs, the rows behind a number; and that no name leads out of the folder."""

from __future__ import annotations

import re
from html import unescape
from urllib.parse import urljoin

import pytest
from people_kit import SQLITE, judge, key, queue, rater
from runs_kit import some_runs

pytest.importorskip("starlette", reason="needs the extra people")

from sqlalchemy import select
from starlette.testclient import TestClient

from steersman.people.collect.app import make_app
from steersman.people.collect.runs import Run, find_runs
from steersman.people.collect.verb import CollectRecipe, run
from steersman.people.collect.visit import Site
from steersman.people.store.conversations import TurnText, add_turn, branch, start
from steersman.people.store.items import NewItem
from steersman.people.store.judgements import judge_turn
from steersman.people.store.schema import JudgementRow
from steersman.types import SteersmanError


@pytest.fixture
def client(store, tmp_path):
    some_runs(tmp_path / "runs")
    return entered(Site(store, runs=tmp_path / "runs"))


def entered(site: Site) -> TestClient:
    client = TestClient(make_app(site), "http://127.0.0.1")
    client.get(f"/enter/{site.key}")
    return client


def links(page) -> list[str]:
    return [urljoin(str(page.url), unescape(x)) for x in re.findall(r'href="(/look/[^"]+)"', page.text)]


def behind(page, metric: str) -> list[str]:
    """The addresses that a metric's numbers lead to."""
    row = re.search(rf'<th scope="row">{re.escape(metric)}</th>(.*?)</tr>', page.text, re.S)
    assert row is not None
    return [urljoin(str(page.url), unescape(x)) for x in re.findall(r'href="([^"]+)"', row[1])]


@SQLITE
def test_a_metric_leads_to_the_rows_behind_it(client):
    page = client.get("/look/runs")
    assert {"runs/grpo", "runs/wheel"} <= set(re.findall(r'<a href="/look/run/([^"]+)"', page.text))
    page = client.get("/look/run/runs/grpo")
    found = behind(page, "held_out/reward/total")
    assert len(found) == 3  # one for each step that was sampled
    rows = client.get(found[1]).text
    assert re.findall(r"answer (\d+) to (one|two)", rows) == [("5", "two"), ("5", "one")]  # the lowest reward first
    assert "trained on" in client.get(behind(page, "loss/policy")[0]).text
    wheel = client.get("/look/run/runs/wheel")
    assert "j-1" in client.get(behind(wheel, "human/accuracy")[0]).text
    assert "the candidate" in client.get(behind(wheel, "length")[0]).text
    assert "answers 1" in client.get(behind(wheel, "win_rate")[0]).text


@SQLITE
def test_answers_stand_side_by_side_over_steps(client):
    page = client.get("/look/beside?run=runs/grpo&column=runs/grpo:+0&column=runs/grpo:+10&q=two").text
    shown = re.findall(r"answer (\d+) to (\w+)", page)
    assert shown == [("0", "two"), ("10", "two")]
    assert "<script>document" not in client.get("/look/rows/runs/grpo?table=samples").text


@SQLITE
def test_rows_are_searched_and_turned_over(client, tmp_path):
    more = "".join(f'{{"step": 20, "prompt": "p{i}", "completion": "x"}}\n' for i in range(120))
    with (tmp_path / "runs/grpo/samples.jsonl").open("a") as file:
        file.write("\n" + more)
    page = client.get("/look/rows/runs/grpo?table=samples&step=20").text
    assert page.count("<article") == 50
    after = unescape(re.search(r'href="([^"]*from=50)"', page)[1])
    assert client.get(after).text.count("<article") == 50
    assert client.get("/look/rows/runs/grpo?table=samples&q=p77").text.count("<article") == 1
    assert client.get("/look/rows/runs/grpo?table=samples&q=nowhere").text.count("<article") == 0


@SQLITE
@pytest.mark.parametrize(
    "path",
    ["/look/rows/../../etc?table=passwd", "/look/rows/runs/grpo?table=../../train", "/look/run/%2e%2e/x",
     "/look/rows/runs/grpo?table=round-01/../samples", "/look/run//etc"],
)  # fmt: skip
def test_no_name_leads_out_of_the_folder(client, path):
    assert client.get(path).status_code == 404


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    some_runs(tmp_path / "runs")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/metrics.jsonl").write_text("{}\n")
    (tmp_path / "runs/away").symlink_to(tmp_path / "secret")
    (tmp_path / "runs/wheel/samples.jsonl").symlink_to(tmp_path / "train.jsonl")
    found = find_runs(tmp_path / "runs")
    assert set(found) == {"runs/grpo", "runs/wheel"}
    assert "samples" not in found["runs/wheel"].tables


def test_conversations_are_searched_with_their_branches_and_thumbs(client, store):
    who = rater(store, "ada")
    with store.begin() as session:
        chat = start(session, who)
        asked = add_turn(session, chat, "user", TurnText("where is 100% of the gold?"))
        first = add_turn(session, chat, "assistant", TurnText("under the oak", ("base", "1")))
        judge_turn(session, first, who, {"up": False}, key=key())
        branch(session, chat, first, "assistant", TurnText("nowhere", ("tuned", "2")))
        other = start(session, who)
        add_turn(session, other, "user", TurnText("good morning"))
        assert asked.parent_id is None
    page = client.get("/look/conversations?q=100%25+oak")
    found = [x for x in links(page) if "/conversation/" in x]
    assert found == [f"http://127.0.0.1/look/conversation/{chat.id}"]
    shown = client.get(found[0]).text
    assert "base@1" in shown
    assert "tuned@2" in shown
    assert "another branch" in shown
    assert "&#39;up&#39;: False" in shown


@SQLITE
def test_a_time_that_no_calendar_has_is_shown_as_a_number(client, store):
    """As an import of milliseconds left it there, which can not be taken out."""
    judge(store, queue(store, "review", [NewItem("q", [TurnText("a")])]), rater(store, "ada"), {"accept": True})
    with store.begin() as session:
        row = session.scalars(select(JudgementRow)).one()
        session.add(
            JudgementRow(
                key=key(), rater_id=row.rater_id, task="review", item_id=row.item_id, verdict={"accept": False},
                created=1.7e12, source="open-webui",
            )
        )  # fmt: skip
    page = client.get("/look")
    assert page.status_code == 200
    assert "1.7e+12" in page.text


def test_the_list_of_runs_reads_the_end_of_their_numbers_alone(client, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "metrics", lambda run: pytest.fail("read whole"))
    long = tmp_path / "runs/long"
    long.mkdir()
    rows = "".join(f'{{"step": {step}, "loss": {"1" * 90}}}\n' for step in range(2000))
    (long / "metrics.jsonl").write_text(rows + '{"step": 2000, "lo')  # as a kill leaves it
    empty = tmp_path / "runs/empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    page = client.get("/look/runs").text
    assert "<td>1999</td>" in page
    assert "runs/empty" in page


def test_raters_see_none_of_it(store, tmp_path):
    some_runs(tmp_path / "runs")
    client = entered(Site(store, runs=tmp_path / "runs"))
    csrf = re.search(r'name="csrf" value="([^"]*)"', client.get("/").text)[1]
    client.post("/name", data={"csrf": csrf, "name": "bob"})
    for path in ("conversations", "conversation/x", "runs", "run/runs/grpo", "rows/runs/grpo", "beside"):
        assert client.get(f"/look/{path}").status_code == 404, path


def test_a_folder_of_runs_that_is_none_is_refused(tmp_path):
    with pytest.raises(SteersmanError, match="no such folder"):
        run(CollectRecipe(store=str(tmp_path / "f.db"), runs=str(tmp_path / "nowhere")))
