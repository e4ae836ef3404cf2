"""Pictures of every view of `steersman collect`: on a desktop, on a phone, and some in Chinese and dark.

    python tools/results/screenshots.py --out docs/images/collect

The story model answers in the chats; the pairs are its stories; a short run of GRPO is made to be looked at. The
Chinese pages want a font with Chinese characters (Debian: fonts-wqy-zenhei).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from browser import chromium, settled
from pages import collecting
from playwright.sync_api import Browser

from steersman.assets import openings, story_model
from steersman.jsonl import jsonl_text

DEVICES: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 800}},
    "phone": {"viewport": {"width": 390, "height": 800}, "is_mobile": True, "has_touch": True},
}
CHINESE = {"locale": "zh-CN", "color_scheme": "dark"}
LONGEST_PAGE, PAIRS = 2500, 20
RUN = {
    "iterations": 4, "rollout.prompts": 8, "rollout.samples": 4, "rollout.max_new_tokens": 32, "rollout.held_out": 8,
    "run.eval_every": 2, "run.save_every": 4,
}  # fmt: skip


def queues(folder: Path) -> Path:
    """A recipe with a queue of each task."""
    stories = [
        " was very happy. She wanted to play with her friend in the park.\nThey had a lot of fun.",
        " was sad. He did not want to share his toy with the dog.",
        " went home to mom. **Mom** gave him a hug, and:\n\n1. milk\n2. a cookie",
    ]
    pairs = [
        {"prompt": opening, "responses": [f"{stories[i % 3]} ({i})", stories[(i + 1) % 3]]}
        for i, opening in enumerate(openings()[:PAIRS])
    ]
    ranked = [{"prompt": openings()[0], "responses": stories}]
    single = [{"prompt": openings()[1], "completion": stories[0]}]
    asked = {
        "compare": (pairs, {"instructions": "Which story do you like better?"}),
        "rank": (ranked, {}),
        "rate": (single, {"attributes": {"happy": ["sad", "neither", "happy"], "clear": ["no", "partly", "yes"]}}),
        "mark": (single, {"labels": ["grammar", "makes no sense"]}),
        "review": (single, {}),
    }  # fmt: skip
    made: dict[str, Any] = {"store": str(folder / "feedback.db"), "queues": {}}
    for task, (rows, settings) in asked.items():
        file = folder / f"{task}.jsonl"
        file.write_text(jsonl_text(rows))
        made["queues"][f"{task} stories"] = {"task": task, "file": str(file), **settings}
    recipe = folder / "collect.yaml"
    recipe.write_text(json.dumps(made))
    return recipe


class Camera:
    """One rater with a desktop and a phone: `page` is the desktop's, which they work on."""

    def __init__(self, browser: Browser, link: str, out: Path, **look: Any) -> None:
        self.out, options = out, {"base_url": link, "locale": "en", **look}
        first = browser.new_context(**options, **DEVICES["desktop"])
        first.set_default_timeout(60_000)
        self.page = first.new_page()
        self.page.goto(link)
        second = browser.new_context(**options, **DEVICES["phone"], storage_state=first.storage_state())
        second.set_default_timeout(60_000)
        self.phone = second.new_page()

    def take(self, name: str, *, whole: bool = True) -> None:
        """The desktop's page on both devices; `whole` is as long as it is, otherwise what one screen shows."""
        self.phone.goto(self.page.url)
        for device, page in (("desktop", self.page), ("phone", self.phone)):
            size = DEVICES[device]["viewport"]
            high = page.evaluate("document.documentElement.scrollHeight") if whole else 0
            page.set_viewport_size(size | {"height": max(size["height"], min(high, LONGEST_PAGE))})
            page.screenshot(path=self.out / f"{name}-{device}.png")
            page.set_viewport_size(size)


def judge_twenty(camera: Camera) -> None:
    """A new rater from the first page on: the first, second and last pair, undo, and the end."""
    page = camera.page
    page.goto("/")
    camera.take("home")
    settled(page).keyboard.press("j")
    for number in range(PAIRS):
        page.locator(f"text={openings()[number]}").first.wait_for()
        if number == 0:
            camera.take("compare")
        settled(page).keyboard.press("1" if number % 3 else "4")
    page.locator("h1:text-is('Done')").wait_for()
    camera.take("nothing-left")
    settled(page).keyboard.press("u")
    page.locator("#status:not(:empty)").wait_for()
    camera.take("undone")
    settled(page).keyboard.press("1")
    page.locator("h1:text-is('Done')").wait_for()


def others(camera: Camera, run: str) -> None:
    page = camera.page
    for number, task in enumerate(("rank", "rate", "mark", "review"), 2):
        page.goto(f"/judge/{number}")
        camera.take(task)
    page.goto("/chat")
    settled(page).keyboard.press("n")
    page.get_by_label("Your message").fill("Once upon a time, there was a little cat")
    settled(page).keyboard.press("Control+Enter")
    page.locator(".turn.assistant").wait_for(timeout=180_000)
    settled(page).keyboard.press("1")
    page.locator('button[aria-pressed="true"]').wait_for()
    camera.take("chat")
    for name, path in {
        "chats": "/chat", "look": "/look", "look-conversations": "/look/conversations", "look-runs": "/look/runs",
        "look-run": f"/look/run/{run}", "look-rows": f"/look/rows/{run}", "look-beside": f"/look/beside?run={run}",
        "admin": "/admin", "error": "/item/none",
    }.items():  # fmt: skip
        page.goto(path)
        camera.take(name, whole=False)


def in_chinese(camera: Camera) -> None:
    """Of the same rater's pages, those that every rater sees first."""
    for name, path in {"home": "/", "rate": "/judge/3", "chats": "/chat"}.items():
        camera.page.goto(path)
        camera.take(f"{name}-zh-dark")


def short_run(folder: Path) -> None:
    """Four iterations of GRPO with the shipped recipe, in `folder`."""
    keys = [text for key, value in RUN.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "steersman", "grpo", "recipes/grpo.yaml", *keys, "--run.dir", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images/collect"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        short_run(folder / "runs" / "grpo")
        arguments = [str(queues(folder)), "--model.path", str(story_model()), "--runs", str(folder / "runs")]
        with (
            collecting(*arguments, "--sampling.max_new_tokens", "48") as (link, _),
            chromium() as browser,
        ):
            camera = Camera(browser, link, args.out)
            judge_twenty(camera)
            others(camera, "runs/grpo")
            in_chinese(Camera(browser, link, args.out, **CHINESE))


if __name__ == "__main__":
    main()
