"""The pages as a browser without scripts gets them: what is stored, what is hidden, what is refused."""

from __future__ import annotations

import html
import re
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from people_kit import SQLITE, judge, pair, queue, rater
from sqlalchemy import event, select

pytest.importorskip("starlette", reason="needs the extra people")

from starlette.testclient import TestClient

from steersman.cli import main
from steersman.people.collect import looking, security
from steersman.people.collect.app import make_app
from steersman.people.collect.looking import agreement
from steersman.people.collect.markdown import plain, rendered
from steersman.people.collect.verb import CollectRecipe, fill
from steersman.people.collect.visit import Site
from steersman.people.store import open_store, opinions
from steersman.people.store.conversations import TurnText, add_turn, start
from steersman.people.store.items import NewItem
from steersman.people.store.judgements import judge_turn, live
from steersman.people.store.opinions import everything
from steersman.people.store.schema import Answer, Assignment, JudgementRow, Person, Turn
from steersman.types import SteersmanError


@dataclass
class Scripted:
    """Says what it is told to, in order."""

    name: str
    lines: list[str] = field(default_factory=list)
    asked: list[list[dict[str, str]]] = field(default_factory=list)

    def answer(self, messages, user):
        self.asked.append(messages)
        if not self.lines:
            raise SteersmanError("the model is away")
        return TurnText(self.lines.pop(0), (self.name, "v1"), {"temperature": 0.5}, "eos", 0.1)


def browser(store, **more) -> TestClient:
    """One in which the printed link was opened, where there is one."""
    host, site = more.pop("host", "127.0.0.1"), Site(store, **more)
    client = TestClient(make_app(site, host=host), "http://127.0.0.1", follow_redirects=True)
    if site.local:
        client.get(f"/enter/{site.key}")
    return client


def send(client: TestClient, page, action: str, **values):
    """Fills the form of a page that posts to an address."""
    token = re.search(r'name="csrf" value="([^"]*)"', page.text)
    assert token is not None
    assert f'action="{action}"' in page.text, f"the page has no form for {action}"
    base = {"csrf": token[1], "key": str(uuid.uuid4()), "seconds": "2.5"}
    return client.post(action, data=base | values)


def item_of(page) -> str:
    return re.findall(r'action="(/item/[^"]+)"', page.text)[0]


def verdicts(store) -> list[dict]:
    with store.read() as session:
        return list(session.scalars(select(JudgementRow.verdict).where(live()).order_by(JudgementRow.id)))


def texts(page) -> list[str]:
    """The answers of an item's page, in the order of the screen."""
    return [
        re.sub("<[^>]+>", "", x).strip() for x in re.findall(r'<div class="text[^>]*>(.*?)</div>', page.text, re.S)
    ]


def test_a_comparison_from_the_screen_to_the_store(store):
    of = queue(store, "compare", [pair(i) for i in range(24)])
    client = browser(store)
    page = client.get(f"/judge/{of}")
    for _ in range(24):  # sides are drawn: all alike once in 8 million times
        shown = texts(page)[-2:]
        side = "A" if shown[0].startswith("good") else "B"
        page = send(client, page, item_of(page), choice=side)
    assert "Nothing left" in page.text
    assert verdicts(store) == [{"choice": 0}] * 24
    with store.read() as session:
        rows = session.scalars(select(JudgementRow)).all()
    assert {row.seconds for row in rows} == {2.5}
    assert len({tuple(row.sides or []) for row in rows}) == 2


@SQLITE
@pytest.mark.parametrize(
    ("task", "settings", "answers", "values", "stored"),
    [
        ("compare", {}, "ab", {"choice": "tie"}, {"choice": "tie"}),
        ("compare", {}, "ab", {"choice": "both_bad"}, {"choice": "both_bad"}),
        ("compare", {}, "ab", {"skip": "1"}, {"skip": ""}),
        ("rank", {}, "a", {}, None),
        ("rate", {"attributes": {"kind": ["no", "yes"]}}, "a", {"score-0": "2"}, {"scores": {"kind": 2}}),
        ("mark", {"labels": ["error"]}, "a", {"spans": '[{"start":0,"end":1,"label":"error"}]'},
         {"spans": [{"start": 0, "end": 1, "label": "error"}]}),
        ("review", {}, "a", {"accept": "0", "correction": "好"}, {"accept": False, "correction": "好"}),
    ],
)  # fmt: skip
def test_each_task(store, task, settings, answers, values, stored):
    if stored is None:
        answers, values = "abc", {}
    of = queue(store, task, [NewItem("q", [TurnText(a) for a in answers])], **settings)
    client = browser(store)
    page = client.get(f"/judge/{of}")
    if stored is None:  # the best text is "a", wherever it stands
        shown = texts(page)[-3:]
        values = {f"rank-{side}": str("abc".index(text)) for side, text in enumerate(shown)}
        stored = {"ranks": [0, 1, 2]}
    send(client, page, item_of(page), **values)
    assert verdicts(store) == [stored]


def test_undo_shows_the_item_again_and_the_first_verdict_no_longer_counts(store):
    of = queue(store, "compare", [pair(1)])
    client = browser(store)
    page = client.get(f"/judge/{of}")
    page = send(client, page, "/undo", path=f"/judge/{of}")
    assert "Nothing to take back" in page.text
    assert page.url.path == f"/judge/{of}"
    page = send(client, page, item_of(page), choice="tie")
    page = send(client, page, "/undo", path="//elsewhere.example")
    assert "is taken back" in page.text
    assert "good 1" in page.text
    send(client, page, item_of(page), choice="both_bad")
    assert verdicts(store) == [{"choice": "both_bad"}]


@SQLITE
def test_lines_of_an_answer_stay_lines(store):
    of = queue(store, "compare", [NewItem("one\ntwo", [TurnText("red\nblue"), TurnText("1. a\n2. b")])])
    page = browser(store).get(f"/judge/{of}").text
    assert "one<br" in page
    assert "red<br" in page


@SQLITE
def test_the_back_button_after_a_verdict_leads_on(store):
    of = queue(store, "compare", [pair(1), pair(2)])
    client = browser(store)
    first = client.get(f"/judge/{of}")
    send(client, first, item_of(first), choice="tie")
    assert "question 2" in client.get(item_of(first)).text
    send(client, first, item_of(first), choice="A")  # the old page, sent once more
    assert verdicts(store) == [{"choice": "tie"}]


@SQLITE
def test_nothing_on_the_page_tells_which_model_answered(store):
    answers = [
        TurnText("first", ("secret-base", "concealed-old"), {"temperature": 0.123}),
        TurnText("second", ("secret-tuned", "concealed-new")),
    ]
    of = queue(store, "compare", [NewItem("q", answers)])
    client = browser(store)
    send(client, client.get("/"), "/name", name="Ada")
    page = client.get(f"/judge/{of}")
    seen = page.text + str(page.headers)
    with store.read() as session:
        ids = [a.item_id for a in session.scalars(select(Answer))]
    for told in ("secret", "concealed", "0.123", *ids):
        assert told not in seen
    assert client.get("/look").status_code == 404
    assert client.get("/admin").status_code == 404


def test_chat_thumb_correction_edit_and_another_answer(store):
    model = Scripted("m", ["Hello!", "Hi!", "Good day!"])
    client = browser(store, answerers=[model], system="Be kind.")
    page = send(client, client.get("/chat"), "/chat")
    at = str(page.url.path)
    page = send(client, page, f"{at}/say", text="hello there")
    assert "Hello!" in page.text
    assert model.asked[0] == [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello there"},
    ]  # fmt: skip
    thumb = re.findall(rf'action="({at}/thumb/[^"]+)"', page.text)[0]
    page = send(client, page, thumb, up="0", r_style="1", correction="Hello, friend.")
    assert verdicts(store) == [{"up": False, "reasons": ["r_style"], "correction": "Hello, friend."}]
    assert 'aria-pressed="true"' in page.text
    page = send(client, page, f"{at}/answer")
    assert "Hi!" in page.text
    assert "Hello!" not in page.text
    edit = re.findall(rf'action="({at}/edit/[^"]+)"', page.text)[0]
    page = send(client, page, edit, text="good morning")
    assert model.asked[2][-1] == {"role": "user", "content": "good morning"}
    assert "Good day!" in page.text
    with store.read() as session:
        assert len(session.scalars(select(Turn)).all()) == 6


@SQLITE
def test_what_is_shown_stays_until_another_answer_is_there(store):
    model = Scripted("m", ["Hello!"])
    client = browser(store, answerers=[model])
    page = send(client, client.get("/chat"), "/chat")
    at = str(page.url.path)
    page = send(client, page, f"{at}/say", text="hello there")
    edit = re.findall(rf'action="({at}/edit/[^"]+)"', page.text)[0]
    for action, values in ((f"{at}/answer", {}), (edit, {"text": "good day"}), (edit, {"text": "good day"})):
        assert "the model is away" in send(client, client.get(at), action, **values).text
        assert texts(client.get(at)) == ["hello there", "Hello!"]
    model.lines += ["Good day!", "Hi!"]
    assert texts(send(client, client.get(at), edit, text="good day")) == ["good day", "Good day!"]
    assert texts(send(client, client.get(at), f"{at}/answer")) == ["good day", "Hi!"]
    assert turns_of(store) == ["hello there", "Hello!", "good day", "Good day!", "Hi!"]


@SQLITE
def test_another_answer_of_two_models_is_compared_in_the_place_of_the_last(store):
    one, two = Scripted("m1"), Scripted("m2")
    client = browser(store, answerers=[one, two])
    page, at = compared(client, one, two, ("red", "blue"), ("red 2", "blue 2"), ("red 3", "blue 3"))
    page = preferred(client, page, "red")
    page = preferred(client, send(client, page, f"{at}/answer"), "blue 2")
    assert texts(page) == ["Q1", "blue 2"]
    edit = re.findall(rf'action="({at}/edit/[^"]+)"', page.text)[0]
    page = preferred(client, send(client, page, edit, text="Q2"), "red 3")
    assert texts(page) == ["Q2", "red 3"]


@SQLITE
def test_a_form_without_a_login_is_refused_and_leads_nowhere(store):
    of = queue(store, "review", [NewItem("q", [TurnText("a")])])
    client = browser(store)
    page = client.get(f"/judge/{of}")
    client.cookies.clear()
    refused = send(client, page, item_of(page), accept="1", correction="better")
    assert (refused.status_code, verdicts(store)) == (401, [])
    assert "You are no longer logged in" in refused.text


def test_chat_with_two_models_is_a_blind_comparison_and_goes_on_with_the_better(store):
    one, two = Scripted("m1", ["red", "r2"]), Scripted("m2", ["blue", "b2"])
    client = browser(store, answerers=[one, two])
    page = send(client, client.get("/chat"), "/chat")
    at = str(page.url.path)
    page = send(client, page, f"{at}/say", text="a colour?")
    side = "AB"[texts(page)[-2:].index("blue")]
    page = send(client, page, item_of(page), choice=side)
    assert page.url.path == at
    assert verdicts(store) == [{"choice": 1}]
    page = send(client, page, f"{at}/say", text="another?")
    assert [m["content"] for m in one.asked[1]] == ["a colour?", "blue", "another?"]
    page = send(client, page, item_of(page), skip="1")
    page = send(client, page, "/undo")
    side = "AB"[texts(page)[-2:].index("r2")]
    page = send(client, page, item_of(page), choice=side)
    shown = texts(page)
    assert shown[-1] == "r2"
    assert len(shown) == 4


def compared(client, one, two, *lines: tuple[str, str]):
    """The page of a chat's first message, which two models answered, and what they say then; its address."""
    one.lines += [first for first, _ in lines]
    two.lines += [second for _, second in lines]
    page = send(client, client.get("/chat"), "/chat")
    return send(client, page, f"{page.url.path}/say", text="Q1"), str(page.url.path)


def preferred(client, page, answer: str):
    """The page behind a comparison in which an answer was better."""
    return send(client, page, item_of(page), choice="AB"[texts(page)[-2:].index(answer)])


@pytest.mark.parametrize("later", ["answered", "open"])
def test_a_verdict_that_is_given_anew_leaves_a_chat_that_went_on_as_it_is(store, later):
    one, two = Scripted("m1"), Scripted("m2")
    client = browser(store, answerers=[one, two])
    second = ("same", "same") if later == "answered" else ("red 2", "blue 2")
    page, at = compared(client, one, two, ("red", "blue"), second)
    page = preferred(client, page, "red")
    page = send(client, page, f"{at}/say", text="Q2")
    page = preferred(client, send(client, page, "/undo"), "blue")
    if later == "open":  # the comparison of Q2, which still waits
        assert set(texts(page)[-2:]) == {"red 2", "blue 2"}
        page = preferred(client, page, "blue 2")
    assert texts(page) == turns_of(store) == ["Q1", "red", "Q2", "same" if later == "answered" else "blue 2"]
    assert verdicts(store)[0] == {"choice": 1}


def test_a_verdict_after_another_tab_went_on_answers_no_later_question(store):
    one, two = Scripted("m1"), Scripted("m2")
    client = browser(store, answerers=[one, two])
    page, at = compared(client, one, two, ("red", "blue"), ("red 2", "blue 2"))
    other = client.post(f"{at}/say", data={**form_of(page), "text": "Q2"})
    assert set(texts(other)[-2:]) == {"red 2", "blue 2"}
    page = preferred(client, page, "red")  # of Q1: Q2 stays the last turn, and its comparison comes next
    page = preferred(client, page, "blue 2")
    assert texts(page) == turns_of(store) == ["Q1", "Q2", "blue 2"]


def turns_of(store) -> list[str]:
    """All turns of all chats, those of other branches too, the oldest first."""
    with store.read() as session:
        return list(session.scalars(select(Turn.content).order_by(Turn.created)))


def form_of(page) -> dict[str, str]:
    """The hidden fields of a form of a page."""
    token = re.search(r'name="csrf" value="([^"]*)"', page.text)
    assert token is not None
    return {"csrf": token[1], "key": str(uuid.uuid4())}


@dataclass
class Together(Scripted):
    """Answers when two requests have asked."""

    both: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))

    def answer(self, messages, user):
        said = super().answer(messages, user)
        self.both.wait(30)
        return said


def test_a_message_that_is_sent_twice_at_once_is_compared_once(store):
    one, two = Together("m1", ["red", "red 2"]), Together("m2", ["blue", "blue 2"])
    client = browser(store, answerers=[one, two])
    page = send(client, client.get("/chat"), "/chat")
    form, at = {**form_of(page), "text": "Q1"}, str(page.url.path)
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda _: client.post(f"{at}/say", data=form), range(2)))
    assert item_of(got[0]) == item_of(got[1])
    page = send(client, got[0], item_of(got[0]), choice="tie")
    assert page.url.path == at
    assert len(texts(page)) == 2


def test_a_form_that_is_sent_again_says_its_message_once(store):
    """As where its answer was lost on the way: it has the same key. Another text under it is another message."""
    model = Scripted("m", ["one", "two", "three"])
    client = browser(store, answerers=[model])
    page = send(client, client.get("/chat"), "/chat")
    at = str(page.url.path)
    said = {**form_of(page), "text": "Q1"}
    for _ in range(2):
        assert texts(client.post(f"{at}/say", data=said)) == ["Q1", "one"]
    page = client.post(f"{at}/say", data={**said, "text": "Q2"})
    assert texts(page) == ["Q1", "one", "Q2", "two"]
    edit = re.findall(rf'action="({at}/edit/[^"]+)"', page.text)[1]
    said = {**form_of(page), "text": "Q3"}
    for _ in range(2):
        assert texts(client.post(edit, data=said)) == ["Q1", "one", "Q3", "three"]
    assert turns_of(store) == ["Q1", "one", "Q2", "two", "Q3", "three"]


def test_lines_of_a_correction_end_as_in_every_other_text(store):
    of = queue(store, "review", [NewItem("q", [TurnText("bad")])])
    client = browser(store, answerers=[Scripted("m", ["hm"])])
    page = client.get(f"/judge/{of}")
    send(client, page, item_of(page), accept="0", correction="one\r\ntwo")
    page = send(client, client.get("/chat"), "/chat")
    page = send(client, page, f"{page.url.path}/say", text="hello")
    thumb = re.findall(r'action="(/chat/[^"]+/thumb/[^"]+)"', page.text)[0]
    send(client, page, thumb, up="0", correction="three\r\nfour")
    assert [said["correction"] for said in verdicts(store)] == ["one\ntwo", "three\nfour"]


@SQLITE
@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "[::1]"])
def test_the_pages_answer_at_the_address_that_they_listen_on(store, host):
    app = make_app(Site(store), host=host.strip("[]"))
    assert TestClient(app, f"http://{host}:8080").get("/").status_code == 200
    assert TestClient(app, "http://evil.example").get("/").status_code == 400


def test_what_belongs_to_others_is_not_there(store):
    of = queue(store, "compare", [pair(1)])
    ada, bob = browser(store, answerers=[Scripted("m", ["x"])]), browser(store, answerers=[Scripted("m", ["x"])])
    send(ada, ada.get("/"), "/name", name="Ada")
    send(bob, bob.get("/"), "/name", name="Bob")
    item = item_of(ada.get(f"/judge/{of}"))
    chat = str(send(ada, ada.get("/chat"), "/chat").url.path)
    assert bob.get(item).status_code == bob.get(chat).status_code == 404
    token = re.search(r'name="csrf" value="([^"]*)"', bob.get("/").text)
    assert token is not None
    base = {"csrf": token[1], "key": str(uuid.uuid4())}
    assert bob.post(item, data=base | {"choice": "A"}).status_code == 404
    assert bob.post(f"{chat}/say", data=base | {"text": "x"}).status_code == 404
    assert bob.get("/item/../../etc/passwd").status_code in (400, 404)
    assert verdicts(store) == []


@SQLITE
def test_a_form_from_elsewhere_is_refused(store):
    of = queue(store, "compare", [pair(1)])
    client = browser(store)
    page = client.get(f"/judge/{of}")
    assert client.post(item_of(page), data={"choice": "A", "key": str(uuid.uuid4())}).status_code == 403
    token = re.search(r'name="csrf" value="([^"]*)"', page.text)
    assert token is not None
    data = {"csrf": token[1], "choice": "A", "key": str(uuid.uuid4())}
    assert client.post(item_of(page), data=data, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.post(item_of(page), data=data | {"choice": "x" * 2_000_000}).status_code == 413
    assert verdicts(store) == []


@SQLITE
def test_headers_allow_no_script_but_ours(store):
    site = Site(store)
    page = TestClient(make_app(site), "http://127.0.0.1").get(f"/enter/{site.key}")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script(?! src=)|\son\w+=|style=", page.text)
    assert "HttpOnly" in page.history[0].headers["set-cookie"]
    assert "SameSite=strict" in page.history[0].headers["set-cookie"]


@pytest.mark.parametrize(
    ("text", "must", "must_not"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;", "<script"),
        ("[x](javascript:alert(1))", "x", 'href="javascript'),
        ("![x](http://evil/x.png)", "", "<img"),
        ("<img src=x onerror=alert(1)>", "&lt;img", "<img"),
        ("[ok](https://example.org)", 'rel="noopener noreferrer nofollow"', "<script"),
        ("a\u202eb\x1b[31m", "[U+202E]b[U+001B]", "\u202e"),
        ("**bold**\n\n- one", "<strong>bold</strong>", "<script"),
        ("x" * 1_000_000, "[+980,000]", "x" * 20_001),
        ("[" * 19_000, "[", "<script"),
    ],
)
def test_hostile_text_is_shown_and_does_nothing(text, must, must_not):
    shown = str(rendered(text))
    assert must in shown
    assert must_not not in shown


def test_text_to_be_marked_keeps_its_length():
    text = "a<b>\r\n\u202e好&x"
    assert len(html.unescape(str(plain(text)))) == len(text)
    assert (
        html.unescape(str(plain("one\r\ntwo\rthree"))) == "one\r\ntwo\rthree"
    )  # as numbers, which no parser takes away
    assert "\r" not in str(plain("one\r\ntwo"))


def test_a_wide_table_is_scrolled_and_a_tag_in_a_text_is_text():
    page = str(rendered("| a | b |\n|---|---|\n| `<table>` | d |"))
    assert page.count('<div class="wide" tabindex="0"><table>') == page.count("</table></div>") == 1
    assert "&lt;table&gt;" in page


def test_an_account_of_the_name_local_is_logged_into_and_locks_nobody_out(store):
    rater(store, "local", password=security.hashed("correct horse battery"), role="admin")
    client = browser(store)
    page = client.get("/")
    assert (page.url.path, page.status_code) == ("/login", 200)
    page = send(client, page, "/login", name="local", password="correct horse battery")
    assert page.url.path == "/"
    assert client.get("/admin").status_code == 200


def test_while_the_database_is_away_a_page_says_so_and_the_log_has_one_line(tmp_path, caplog):
    (tmp_path / "here").mkdir()
    store = open_store(tmp_path / "here/f.db")
    of = queue(store, "compare", [pair(1)])
    client = browser(store)
    page = client.get(f"/judge/{of}")
    store.close()
    (tmp_path / "here").rename(tmp_path / "away")
    for answer in (client.get("/"), send(client, page, item_of(page), choice="tie")):
        assert answer.status_code == 503
        assert "The database does not answer at the moment, so nothing was saved." in answer.text
    said = [record.getMessage() for record in caplog.records if record.name == "steersman.people.collect.app"]
    assert [line.partition(",")[0] for line in said] == ["GET /: 503", f"POST {item_of(page)}: 503"]
    assert not any("\n" in line or "Traceback" in line for line in said)
    (tmp_path / "away").rename(tmp_path / "here")
    assert send(client, page, item_of(page), choice="tie").status_code == 200
    assert verdicts(store) == [{"choice": "tie"}]
    store.close()


def test_look_and_admin_read_no_more_than_they_show(store, monkeypatch):
    monkeypatch.setattr(looking, "SHOWN", 4)
    monkeypatch.setattr(opinions, "AT_ONCE", 4)
    of = queue(store, "compare", [pair(i) for i in range(30)])
    who = rater(store, "Ada")
    for _ in range(30):
        judge(store, of, who, {"choice": "tie"})
    client, read = browser(store), list[str]()
    client.get("/")
    note = lambda answer, _: read.append(answer.content)  # noqa: E731
    event.listen(Answer, "load", note)
    try:
        page = client.get("/look")
        assert "Judgements: 30" in page.text
        assert page.text.count("<article") == 4
        assert len(read) <= 2 * 8
        read.clear()
        page = client.get("/look?q=question")
        assert "Judgements: 4+" in page.text
        assert len(read) <= 2 * 8
        assert "Judgements: 1<" in client.get("/look?q=question+29").text
        assert "Judgements: 0<" in client.get("/look?task=rank").text
        read.clear()
        assert "<td>30</td>" in client.get("/admin").text
        assert read == []
    finally:
        event.remove(Answer, "load", note)


def test_chinese_and_a_search_with_filters(store):
    of = queue(store, "compare", [pair(1)])
    client = browser(store)
    page = client.get(f"/judge/{of}", headers={"accept-language": "zh-CN,zh;q=0.9"})
    assert "哪个回答更好" in page.text
    assert 'lang="zh-Hans"' in page.text
    page = send(client, page, item_of(page), choice="tie")
    page = send(client, page, "/language", path="/look")
    assert "good 1" in client.get("/look?q=question+1").text
    assert "good 1" not in client.get("/look?q=question+2").text
    assert "good 1" not in client.get("/look?task=rank").text
    assert "local" in client.get("/admin").text


@SQLITE
def test_accounts_where_others_can_reach_the_pages(store, monkeypatch):
    rater(store, "Ada", password=security.hashed("correct horse battery"), role="rater")
    client = browser(store, local=False, host="0.0.0.0")
    page = client.get("/")
    assert page.url.path == "/login"
    wrong = send(client, page, "/login", name="Ada", password="wrong")
    assert wrong.status_code == 401
    assert send(client, page, "/login", name="Nobody", password="correct horse battery").status_code == 401
    page = send(client, page, "/login", name="Ada", password="correct horse battery")
    assert page.url.path == "/"
    assert client.get("/admin").status_code == 404
    assert client.post("/name", data={"name": "Eve"}).status_code == 403
    page = send(client, page, "/logout")
    assert client.get("/chat").url.path == "/login"
    for _ in range(12):
        last = client.post("/login", data={"name": "Ada", "password": "x"})
    assert last.status_code == 429


def test_the_verb_refuses_an_open_door_and_makes_and_forgets_accounts(tmp_path, monkeypatch, capsys):
    at = ["--store", str(tmp_path / "f.db")]
    assert main(["collect", *at, "--host", "0.0.0.0"]) == 2
    assert "wants accounts" in capsys.readouterr().err
    monkeypatch.setenv("STEERSMAN_PASSWORD", "short")
    assert main(["collect", *at, "--add_account", "Ada", "--role", "admin"]) == 2
    monkeypatch.setenv("STEERSMAN_PASSWORD", "correct horse battery")
    assert main(["collect", *at, "--add_account", "Ada", "--role", "admin"]) == 0
    made = open_store(tmp_path / "f.db")
    with made.read() as session:
        stored = session.scalars(select(Person.password)).one()
    made.close()
    assert str(stored).startswith("$argon2id$")
    assert main(["collect", *at, "--forget", "Ada"]) == 0
    assert "stay under r-" in capsys.readouterr().out


@SQLITE
def test_the_pages_do_not_tell_a_gold_item_from_others(store):
    """What is shown to a rater moves by one with each verdict, on whatever it is."""
    items = [pair(i) for i in range(12)] + [pair(100 + i, gold={"choice": 0}) for i in range(4)]
    of, client = queue(store, "compare", items, gold_every=4), browser(store)
    gold = 0
    for given in range(1, 13):
        page = client.get(f"/judge/{of}")
        assert f"<small>{given} of at most 16</small>" in page.text
        gold += "question 10" in page.text and "question 10<" not in page.text
        send(client, page, item_of(page), choice="tie")
        home = client.get("/").text
        assert f'<progress max="16" value="{given}"' in home
        assert f"<p>{given} of at most 16 by you</p>" in home
    assert gold == 3
    assert "compare: 9 of 12" in client.get("/admin").text


@SQLITE
def test_an_address_with_a_number_that_no_database_has_is_no_page(store):
    queue(store, "compare", [pair(1)])
    client = browser(store)
    for number in ("0", "2147483648", "9223372036854775808", "9" * 5000, "-1", "1.5", "\u0661", "one"):
        page = client.get(f"/judge/{number}")
        assert (page.status_code, "There is no such page" in page.text) == (404, True), number


@SQLITE
def test_a_second_verdict_on_an_item_is_said_to_count_for_nothing(store):
    of, client, other = queue(store, "compare", [pair(1), pair(2)]), browser(store), browser(store)
    pages = [c.get(f"/judge/{of}") for c in (client, other)]
    assert item_of(pages[0]) == item_of(pages[1])
    following = send(client, pages[0], item_of(pages[0]), choice="tie")
    assert "was judged under your name already" not in following.text
    following = send(other, pages[1], item_of(pages[1]), choice="both_bad")
    assert "was judged under your name already" in following.text
    assert "question 2" in following.text
    assert verdicts(store) == [{"choice": "tie"}]
    action, key = item_of(following), str(uuid.uuid4())
    for _ in range(2):  # sent again, since the connection was lost
        again = send(client, following, action, choice="tie", key=key)
        assert "was judged under your name already" not in again.text


@SQLITE
@pytest.mark.parametrize("length", [10, 1000, 1001, 60_000])
def test_whoever_has_an_account_can_log_in(store, length):
    password = "x" * length
    rater(store, "ada", password=security.hashed(password))
    client = browser(store, local=False)
    page = client.get("/login")
    assert send(client, page, "/login", name="ada", password=password[:-1]).status_code == 401
    assert send(client, page, "/login", name="ada", password=password).url.path == "/"


@SQLITE
def test_what_can_be_marked_is_text_of_the_answer_alone(store):
    answer = "0123456789" * 2500
    of = queue(store, "mark", [NewItem("q", [TurnText(answer)])], labels=["error"])
    page = browser(store).get(f"/judge/{of}").text
    shown = re.findall(r'<div class="text markable"[^>]*>(.*?)</div>', page, re.DOTALL)
    assert shown == [answer[:20_000]]
    assert page.count("[+5,000]") == 1


def test_queues_are_filled_from_files_once(store, tmp_path):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text('{"prompt": "p", "chosen": "c", "rejected": "r", "gold": {"choice": 0}, "models": ["x", "y"]}\n')
    recipe = CollectRecipe.model_validate({"queues": {"week": {"task": "compare", "file": str(rows)}}})
    fill(store, recipe)
    fill(store, recipe)
    with store.read() as session:
        assert [a.content for a in session.scalars(select(Answer))] == ["c", "r"]
        assert not session.scalars(select(Assignment)).all()
    rows.write_text('{"prompt": "p"}\n')
    with pytest.raises(SteersmanError, match="takes 2 answers, not 0"):
        fill(store, recipe)


def test_the_admin_page_tells_how_far_raters_agree(store):
    of = queue(store, "compare", [pair(i) for i in range(4)], overlap=2)
    for name, choices in (("Ada", [0, 1, 0, 1]), ("Bob", [0, 1, 0, 0])):
        who = rater(store, name)
        for choice in choices:
            judge(store, of, who, {"choice": choice})
    # n = 8 values, n_0 = 5, n_1 = 3, one unit at odds, so o_01 = 1: alpha = 1 - 7 * 1 / (5 * 3)
    assert "compare (compare): 0.533" in browser(store).get("/admin").text


@SQLITE
def test_ratings_agree_by_their_order_whatever_the_name_of_what_is_rated(store):
    names = ["helpful", "helpful (1-5)"]
    items = [NewItem(f"q{i}", [TurnText("a")]) for i in range(20)]
    of = queue(store, "rate", items, overlap=2, attributes={name: list("12345") for name in names})
    for name, more in (("Ada", 0), ("Bob", 1)):
        who = rater(store, name)
        for i in range(20):
            judge(store, of, who, {"scores": dict.fromkeys(names, min(5, 1 + i % 5 + more))})
    with store.read() as session:
        plain, bracketed = (found for _, found in agreement(list(everything(session))))
    assert bracketed == plain
    assert plain.value > 0.7


@SQLITE
def test_a_thumb_that_its_rater_replaced_disagrees_with_nobody(store):
    raters = [rater(store, name) for name in ("Ada", "Bob")]
    with store.begin() as session:
        chat = start(session, raters[0])
        add_turn(session, chat, "user", TurnText("hi"))
        for up in (True, False):
            turn = add_turn(session, chat, "assistant", TurnText("Hello"))
            for who in raters:
                judge_turn(session, turn, who, {"up": not up}, key=str(uuid.uuid4()))
                judge_turn(session, turn, who, {"up": up}, key=str(uuid.uuid4()))
    with store.read() as session:
        ((_, found),) = agreement(list(everything(session)))
    assert found.n == 2
    assert found.value == 1.0


@SQLITE
def test_admins_add_reset_and_close_accounts(store):
    rater(store, "ada", role="admin", password=security.hashed("correct horse battery"))

    def log_in(name, password):
        client = browser(store, local=False)
        return client, send(client, client.get("/login"), "/login", name=name, password=password)

    ada, page = log_in("ada", "correct horse battery")
    page = send(ada, ada.get("/admin"), "/admin/add", name="bob", password="first password", role="rater")
    bob, home = log_in("bob", "first password")
    assert home.status_code == 200
    assert bob.get("/admin").status_code == 404
    token = re.findall(r'name="csrf" value="([^"]*)"', bob.get("/").text)[0]
    for path in ("add", "password", "disable", "forget"):  # a rater changes no account
        form = {"csrf": token, "name": "ada", "password": "taken over!", "role": "admin"}
        assert bob.post(f"/admin/{path}", data=form).status_code == 404
    assert "at least 10" in send(ada, page, "/admin/password", name="bob", password="short").text
    send(ada, page, "/admin/password", name="bob", password="second password")
    assert "Log in" in bob.get("/").text  # whoever is logged in is out
    assert log_in("bob", "first password")[1].status_code == 401
    assert log_in("bob", "second password")[1].status_code == 200
    send(ada, page, "/admin/disable", name="bob")
    assert log_in("bob", "second password")[1].status_code == 401
    assert "your own account" in ada.post("/admin/disable", data={"csrf": re.findall(
        r'name="csrf" value="([^"]*)"', page.text)[0], "name": "ada"}).text  # fmt: skip
    assert ada.get("/admin").status_code == 200


@SQLITE
def test_no_word_of_the_pages_is_a_method_of_python(store):
    ids = [
        queue(store, "mark", [NewItem("q", [TurnText("a")])], labels=["error"]),
        queue(store, "compare", [pair(1), pair(2)], overlap=2),
    ]
    for name in ("ada", "bob"):
        judge(store, ids[1], rater(store, name), {"choice": 0})
        judge(store, ids[1], rater(store, f"{name} 2"), {"choice": 0})
    client = browser(store)
    for path in (f"/judge/{ids[0]}", f"/judge/{ids[1]}", "/admin", "/look"):
        assert "built-in method" not in client.get(path).text, path
