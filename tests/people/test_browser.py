"""The pages in a real Chromium: by keyboard, on a phone, without a connection, by two at once, read by axe."""

from __future__ import annotations

import shutil
import socket
import threading
import time

import pytest
from people_kit import pair, queue
from runs_kit import some_runs
from sqlalchemy import delete, select

pytest.importorskip("starlette", reason="needs the extra people")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")

uvicorn = pytest.importorskip("uvicorn", reason="needs the extra people")

from axe_core_python.sync_playwright import Axe

from steersman.people.collect.app import make_app
from steersman.people.collect.visit import Site
from steersman.people.store import open_store
from steersman.people.store.conversations import TurnText
from steersman.people.store.items import NewItem
from steersman.people.store.judgements import live
from steersman.people.store.schema import JudgementRow, Login
from steersman.types import SteersmanError

pytestmark = pytest.mark.slow
HOSTILE = "<script>document.title='owned'</script> [x](javascript:document.title='owned') \u202e" + "long " * 9000


class Echo:
    def answer(self, messages, user):
        return TurnText(f"You said: {messages[-1]['content']}", ("echo", "1"))


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def store(tmp_path):
    made = open_store(tmp_path / "feedback.db")
    yield made
    made.close()


@pytest.fixture
def address(store, tmp_path):
    """The pages on a port of their own, with some runs to look at, and their key."""
    some_runs(tmp_path / "runs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    site = Site(store, answerers=[Echo()], runs=tmp_path / "runs")
    app = make_app(site)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}", site.key
    server.should_exit = True
    thread.join()


@pytest.fixture
def page(chromium, address):
    page = entered(chromium, address)
    page.set_default_timeout(20_000)
    yield page
    page.context.close()


def entered(chromium, address, **look):
    """A page in a browser of its own, in which the printed link was opened."""
    url, key = address
    page = chromium.new_context(base_url=url, **look).new_page()
    page.goto(f"/enter/{key}")
    return page


def settled(page):
    """The page, when a press on it counts: it was on the screen for long enough to be looked at."""
    page.locator("body[data-settled]").wait_for()
    return page


def verdicts(store) -> list[dict]:
    with store.read() as session:
        return list(session.scalars(select(JudgementRow.verdict).where(live()).order_by(JudgementRow.id)))


def wait_for(store, count: int) -> list[dict]:
    until = time.monotonic() + 20
    while len(verdicts(store)) < count and time.monotonic() < until:
        time.sleep(0.05)
    return verdicts(store)


def test_pairs_by_keyboard_with_undo(page, store):
    queue(store, "compare", [pair(i) for i in range(3)])
    page.goto("/")
    settled(page).keyboard.press("j")
    for number in range(3):
        page.get_by_text(f"question {number}").wait_for()
        first_is_good = page.locator(".answer .text").first.inner_text().startswith("good")
        settled(page).keyboard.press("1" if first_is_good else "4")
    page.get_by_text("Nothing left").wait_for()
    assert verdicts(store) == [{"choice": 0}] * 3
    settled(page).keyboard.press("u")
    page.get_by_text("question 2").wait_for()
    page.get_by_text("is taken back").wait_for()
    settled(page).keyboard.press("s")
    page.get_by_text("Nothing left").wait_for()
    assert verdicts(store) == [{"choice": 0}] * 2 + [{"skip": ""}]


def test_a_verdict_that_the_connection_lost_is_saved_once_when_it_is_back(page, store):
    of = queue(store, "compare", [pair(1), pair(2)])
    page.goto(f"/judge/{of}")
    page.context.set_offline(True)
    settled(page).keyboard.press("2")
    page.get_by_text("Not saved yet").wait_for()
    page.keyboard.press("2")  # impatience sends nothing twice
    assert verdicts(store) == []
    page.context.set_offline(False)
    page.get_by_text("question 2").wait_for()
    assert verdicts(store) == [{"choice": "tie"}]


def test_a_double_click_and_a_key_that_is_held_judge_once(page, store):
    of = queue(store, "compare", [pair(i) for i in range(9)])
    page.goto(f"/judge/{of}")
    box = settled(page).locator("[data-key='2']").bounding_box()
    page.mouse.click(box["x"] + 20, box["y"] + 10, click_count=2)
    page.get_by_text("question 1").wait_for()
    page.mouse.click(box["x"] + 20, box["y"] + 10)  # of a slow double click: this item was not looked at yet
    settled(page)
    assert verdicts(store) == [{"choice": "tie"}]
    page.keyboard.down("2")
    page.get_by_text("question 2").wait_for()
    settled(page)
    for _ in range(5):
        page.keyboard.down("2")  # what a keyboard sends while a key is held
    page.keyboard.up("2")
    assert wait_for(store, 2) == [{"choice": "tie"}] * 2
    page.keyboard.down("u")
    page.get_by_text("is taken back").wait_for()
    settled(page)
    for _ in range(5):
        page.keyboard.down("u")
    page.keyboard.up("u")
    page.get_by_text("question 1").wait_for()
    settled(page).keyboard.press("s")
    page.get_by_text("question 2").wait_for()
    assert verdicts(store) == [{"choice": "tie"}, {"skip": ""}]


def test_what_was_typed_stays_where_a_form_is_refused(page, store, address):
    review = queue(store, "review", [NewItem("q", [TurnText("an answer")])])
    page.goto(f"/judge/{review}")
    better = page.get_by_label("A better answer")
    better.fill("a long better answer")
    with store.begin() as session:
        session.execute(delete(Login))
    reject = settled(page).get_by_role("button", name="Reject")
    reject.click()
    page.get_by_text("You are no longer logged in").wait_for()
    assert (better.input_value(), verdicts(store)) == ("a long better answer", [])
    in_another_tab = page.context.new_page()
    in_another_tab.goto(f"/enter/{address[1]}")
    in_another_tab.close()
    better.fill("x" * 50_001)
    reject.click()
    page.get_by_text("50,001 characters; 50,000 are the most").wait_for()
    assert len(better.input_value()) == 50_001
    better.fill("a long better answer")
    reject.click()
    page.get_by_text("Nothing left").wait_for()
    assert verdicts(store) == [{"accept": False, "correction": "a long better answer"}]


def say_hello(page):
    """A new chat, with the keyboard, and the model's answer."""
    page.goto("/chat")
    settled(page).keyboard.press("n")
    page.get_by_label("Your message").fill("hello")
    settled(page).keyboard.press("Control+Enter")
    page.get_by_text("You said: hello").wait_for()


def test_a_message_stays_where_the_model_fails(page, address, store, monkeypatch):
    say_hello(page)

    def fails(self, messages, user):
        raise SteersmanError("the model's address answers with status 500")

    with monkeypatch.context() as patch:
        patch.setattr(Echo, "answer", fails)
        settled(page).get_by_role("button", name="Another answer").click()
        page.get_by_text("answers with status 500").wait_for()
        assert page.get_by_text("You said: hello").is_visible()
        page.locator("#text").fill("a long message")
        page.keyboard.press("Control+Enter")
        page.get_by_text("The model is answering").wait_for(state="detached")
        page.get_by_text("answers with status 500").wait_for()
        assert page.locator("#text").input_value() == "a long message"
    page.keyboard.press("Control+Enter")
    page.get_by_text("You said: a long message").wait_for()
    assert page.locator(".turn.user").count() == 2


def test_the_back_button_does_not_judge_again(page, store):
    of = queue(store, "compare", [pair(1), pair(2)])
    page.goto("/")
    page.goto(f"/judge/{of}")
    settled(page).keyboard.press("2")
    page.get_by_text("question 2").wait_for()
    page.go_back()
    assert page.get_by_role("heading", name="To judge").is_visible()
    assert verdicts(store) == [{"choice": "tie"}]


def test_rank_rate_mark_and_review_by_keyboard(page, store):
    rank = queue(store, "rank", [NewItem("q", [TurnText("a"), TurnText("b")])])
    rate = queue(
        store, "rate", [NewItem("q", [TurnText("a")])], attributes={"kind": ["not at all", "somewhat", "very"]}
    )
    mark = queue(store, "mark", [NewItem("q", [TurnText("😀 all wrong")])], labels=["error"])
    review = queue(store, "review", [NewItem("q", [TurnText("a")])])
    page.goto(f"/judge/{rank}")
    for text in page.locator(".answer .text").all_inner_texts():
        settled(page).keyboard.press("1" if text.strip() == "a" else "2")
    settled(page).keyboard.press("Control+Enter")
    page.get_by_text("Nothing left").wait_for()
    page.goto(f"/judge/{rate}")
    settled(page).keyboard.press("9")  # there is no such step
    settled(page).keyboard.press("3")
    settled(page).keyboard.press("Control+Enter")
    page.get_by_text("Nothing left").wait_for()
    page.goto(f"/judge/{mark}")
    settled(page).keyboard.press("1")
    page.get_by_text("Select some text first").wait_for()
    page.evaluate(
        "() => { const n = document.querySelector('.markable').firstChild; const r = document.createRange();"
        "r.setStart(n, 7); r.setEnd(n, 12); getSelection().removeAllRanges(); getSelection().addRange(r); }"
    )
    settled(page).keyboard.press("1")
    assert "wrong" in page.locator("#marks").inner_text()
    settled(page).keyboard.press("Control+Enter")
    page.get_by_text("Nothing left").wait_for()
    page.goto(f"/judge/{review}")
    page.get_by_label("A better answer").fill("更好")
    settled(page).keyboard.press("Control+Enter")  # says nothing of whether the answer is good
    settled(page).keyboard.press("Tab")
    settled(page).keyboard.press("Enter")
    assert wait_for(store, 4) == [
        {"ranks": [0, 1]}, {"scores": {"kind": 3}}, {"spans": [{"start": 6, "end": 11, "label": "error"}]},
        {"accept": True, "correction": "更好"},
    ]  # fmt: skip


def test_a_chat_and_a_thumb_by_keyboard(page, store):
    say_hello(page)
    settled(page).keyboard.press("1")
    page.locator('button[aria-pressed="true"]').wait_for()
    assert verdicts(store) == [{"up": True}]


def test_enter_on_a_reason_says_nothing_of_the_answer(page, store):
    say_hello(page)
    settled(page).locator("form.thumb summary").click()
    page.get_by_label("not correct").focus()
    page.keyboard.press("Space")
    page.keyboard.press("Enter")
    page.keyboard.press("Control+Enter")
    page.get_by_role("button", name="Bad answer").press("Enter")
    assert wait_for(store, 1) == [{"up": False, "reasons": ["r_wrong"]}]


def test_marks_are_made_by_keyboard(page, store):
    of = queue(store, "mark", [NewItem("q", [TurnText("one 😀\r\ntwo three\r\nfour")])], labels=["error", "tone"])
    page.goto(f"/judge/{of}")
    assert "\ufffd" not in settled(page).locator(".markable").inner_text()
    marks = page.locator("#marks")
    page.locator(".markable").focus()
    for keys, label, span in (
        (["Shift+End"], "1", (0, 5)),
        (["ArrowDown", "Home", *["ArrowRight"] * 4, *["Shift+ArrowRight"] * 4], "2", (11, 16)),
        (["Control+a"], "1", (0, 22)),
    ):
        for key in keys:
            page.keyboard.press(key)
        page.keyboard.press(label)
        assert f'"start":{span[0]},"end":{span[1]}' in page.locator("input[name=spans]").input_value()
    assert marks.inner_text().startswith("error: “one 😀”; tone: “three”; error:")
    page.get_by_role("button", name="Save").press("Enter")
    (verdict,) = wait_for(store, 1)
    assert {(s["start"], s["end"]) for s in verdict["spans"]} == {(0, 5), (11, 16), (0, 22)}


def test_tables_and_long_names_fit_a_phone(chromium, address, store):
    cells = " | ".join(["a rather long cell of a table"] * 8)
    table = f"| {' | '.join('abcdefgh')} |\n|{'---|' * 8}\n| {cells} |\n"
    of = queue(store, "compare", [NewItem("q", [TurnText(table), TurnText("b")])], name="a_name_without_spaces" * 4)
    page = entered(chromium, address, viewport={"width": 375, "height": 740}, is_mobile=True)
    for path in ("/", f"/judge/{of}"):
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, path
    width = page.evaluate("document.querySelector('.text td').getBoundingClientRect().width")
    assert width > 60  # words and not letters
    assert not Axe().run(page)["violations"]
    page.context.close()


def test_two_raters_at_once_share_a_queue(chromium, address, store):
    of = queue(store, "compare", [pair(i) for i in range(6)])
    pages = [entered(chromium, address) for _ in range(2)]
    for name, page in zip(("Ada", "Bob"), pages, strict=True):
        page.goto("/")
        page.get_by_label("Judging as").fill(name)
        settled(page).get_by_role("button", name="Change name").click()
        page.goto(f"/judge/{of}")
    for count in range(1, 5):  # then each has one item open, of which the other sees nothing
        page = pages[count % 2]
        asked = page.locator(".asked").inner_text()
        settled(page).keyboard.press("2")
        page.wait_for_function("asked => document.querySelector('.asked')?.innerText !== asked", arg=asked)
    for page in pages:
        settled(page).keyboard.press("2")
        page.get_by_text("Nothing left").wait_for()
    with store.read() as session:
        rows = session.execute(select(JudgementRow.item_id, JudgementRow.rater_id)).all()
    assert len({item for item, _ in rows}) == 6
    assert len({rater for _, rater in rows}) == 2
    for page in pages:
        page.context.close()


def test_from_a_number_to_its_rows_and_side_by_side(page):
    page.goto("/look")
    page.get_by_role("link", name="Runs").click()
    page.get_by_role("link", name="runs/grpo", exact=True).click()
    page.get_by_role("row", name="held_out/reward/total").get_by_role("link", name="0.6").click()
    assert page.locator("article").count() == 2
    assert "answer 10 to two" in page.locator("article").first.inner_text()  # the lowest reward stands first
    page.get_by_label("Search").fill("one")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('article').length === 1")
    page.goto("/look/runs")
    page.get_by_label("runs/grpo").check()
    page.get_by_role("button", name="Side by side").click()
    page.get_by_label("runs/grpo: 5").check()
    page.get_by_role("button", name="Search").click()
    page.get_by_role("heading", name="runs/grpo: 5").first.wait_for()
    texts = page.locator("article").first.locator(".answer .text").all_inner_texts()
    assert [text.split()[1] for text in texts] == ["0", "5", "10"]
    assert page.title() == "Judge answers"


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_accessible_and_fits_a_phone(chromium, address, store, width, scheme):
    answers = [TurnText(HOSTILE), TurnText("`code` and a verylongword" + "x" * 300)]
    ids = [
        queue(store, "compare", [NewItem("q", answers)]),
        queue(store, "rank", [NewItem("q", [TurnText(a) for a in "abc"])]),
        queue(store, "rate", [NewItem("q", [TurnText("a")])], attributes={"kind": ["no", "so", "yes"]}),
        queue(store, "mark", [NewItem("q", [TurnText("a")])], labels=["error"]),
        queue(store, "review", [NewItem("q", [TurnText("a")])]),
    ]
    look = {"viewport": {"width": width, "height": 740}, "color_scheme": scheme, "has_touch": width < 500}
    page = entered(chromium, address, **look)
    seen = ("/look", "/look/conversations", "/look/runs", "/look/run/runs/grpo", "/look/rows/runs/grpo")
    beside = "/look/beside?run=runs/grpo"
    for path in ("/", "/chat", "/admin", *seen, beside, *(f"/judge/{i}" for i in ids)):
        page.goto(path)
        found = Axe().run(page)["violations"]
        assert not found, (path, [(v["id"], [n["html"] for n in v["nodes"]]) for v in found])
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        assert page.title() == "Judge answers"
    page.context.close()


def test_a_message_whose_answer_was_lost_is_said_once(page, store):
    """Its request is stored, and the connection goes before the page is told."""
    say_hello(page)
    page.route("**/say", lambda route: (route.fetch(max_redirects=0), route.abort()))
    page.locator("#text").fill("tell me more")
    settled(page).keyboard.press("Control+Enter")
    page.get_by_text("send it again").wait_for()
    page.unroute("**/say")
    page.keyboard.press("Control+Enter")
    page.get_by_text("You said: tell me more").wait_for()
    said = [text.strip() for text in page.locator(".turn .text").all_inner_texts()]
    assert said == ["hello", "You said: hello", "tell me more", "You said: tell me more"]
    assert settled(page).locator("#text").input_value() == ""


def test_what_is_typed_outlives_a_thumb_and_undo_but_not_its_own_form(page, store, address):
    say_hello(page)
    message, better = page.locator("#text"), page.locator("form.thumb textarea")
    message.fill("a long message")
    page.locator("form.thumb summary").click()
    better.fill("a better one")
    settled(page).get_by_role("button", name="Good answer").click()
    page.locator('button[aria-pressed="true"]').wait_for()
    assert (message.input_value(), better.input_value()) == ("a long message", "a better one")
    message.fill("a longer message")
    settled(page).get_by_role("button", name="Undo last").click()
    page.get_by_text("is taken back").wait_for()
    assert message.input_value() == "a longer message"
    assert better.input_value() == ""  # the store has taken it back with its thumb
    settled(page)
    message.press("Control+Enter")
    page.get_by_text("You said: a longer message").wait_for()
    page.goto("/")
    page.go_back()
    assert settled(page).locator("#text").input_value() == ""
