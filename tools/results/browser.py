"""Scripted raters in a real Chromium."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from steersman.reward.gold import judge

NOISE = 0.15


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, or the one that CHROMIUM names."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        raise SystemExit("needs Chromium (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def settled(page: Page) -> Page:
    """The page, once it was on the screen for long enough that a press counts."""
    page.locator("body[data-settled]").wait_for()
    return page


class Rater:
    """Someone at a keyboard, who prefers the story that the quickstart's judge prefers and says the opposite in
    15% of choices; with `clicks` one who does not read. All that they know is what the page shows."""

    def __init__(self, browser: Browser, link: str, name: str, *, seed: object = 0, clicks: bool = False) -> None:
        self.name, self.clicks, self.rng = name, clicks, random.Random(f"{seed}/{name}")
        self.context = browser.new_context(base_url=link)
        self.context.set_default_timeout(60_000)
        self.page = self.context.new_page()
        self.page.goto(link)
        self.page.get_by_label("Judging as").fill(name)
        settled(self.page).get_by_role("button", name="Change name").click()
        self.page.get_by_text("To judge").first.wait_for()

    def begin(self, queue: str) -> bool:
        """Opens a queue from the home page; False where it has nothing for them."""
        self.page.goto("/")
        card = self.page.locator(".cards li").filter(has=self.page.get_by_role("heading", name=queue, exact=True))
        button = card.get_by_role("link", name="Judge")
        if not button.count():
            return False
        button.click()
        self.page.locator("form.verdict, h1:text-is('Done')").first.wait_for()
        return self.has_pair()

    def has_pair(self) -> bool:
        return self.page.locator("form.verdict").count() > 0

    def judge(self) -> bool:
        """Reads both answers and presses a key; whether another pair came."""
        answers = self.page.locator(".answer .text").all_inner_texts()
        action = self.page.locator("form.verdict").get_attribute("action")
        settled(self.page).keyboard.press("1" if self.prefers_first(*answers) else "4")
        self.page.wait_for_function(
            "action => { const form = document.querySelector('form.verdict');"
            " return document.readyState !== 'loading' && (form ? form.getAttribute('action') !== action"
            " : document.querySelector('h1') !== null) }",
            arg=action,
        )
        return self.has_pair()

    def prefers_first(self, first: str, second: str) -> bool:
        if self.clicks:
            return self.rng.random() < 0.5
        return (judge(first).gold >= judge(second).gold) != (self.rng.random() < NOISE)

    def leave(self) -> None:
        self.context.close()


def screenshot(page: Page, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=path, full_page=True)
