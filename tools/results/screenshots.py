"""Pictures of every view of `steersman collect`, at a desktop's and a phone's width.

    python tools/results/screenshots.py --runs runs --out docs/images/collect

`--runs` is a folder with finished runs. The story model answers in the chats; the pairs are its stories.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from browser import chromium
from pages import collecting
from playwright.sync_api import Page

from steersman.assets import openings, story_model

WIDTHS = {"desktop": (1280, 800), "phone": (390, 800)}
PAIRS = 20


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
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made["queues"][f"{task} stories"] = {"task": task, "file": str(file), **settings}
    recipe = folder / "collect.yaml"
    recipe.write_text(json.dumps(made))
    return recipe


def take(page: Page, out: Path, name: str, *, whole: bool = True) -> None:
    for width, (x, y) in WIDTHS.items():
        page.set_viewport_size({"width": x, "height": y})
        page.screenshot(path=out / f"{name}-{width}.png", full_page=whole)


def judge_twenty(page: Page, out: Path) -> None:
    """A new rater from the first page on: the first, second and last pair, undo, and the end."""
    page.goto("/")
    take(page, out, "home")
    page.keyboard.press("j")
    for number in range(PAIRS):
        page.locator(f"text={openings()[number]}").first.wait_for()
        if number == 0:
            take(page, out, "compare")
        page.keyboard.press("1" if number % 3 else "4")
    page.locator("h1:text-is('Done')").wait_for()
    take(page, out, "nothing-left")


def others(page: Page, out: Path, run: str) -> None:
    for number, task in enumerate(("rank", "rate", "mark", "review"), 2):
        page.goto(f"/judge/{number}")
        take(page, out, task)
    page.goto("/chat")
    page.keyboard.press("n")
    page.get_by_label("Your message").fill("Once upon a time, there was a little cat")
    page.keyboard.press("Control+Enter")
    page.locator(".turn.assistant").wait_for(timeout=180_000)
    take(page, out, "chat")
    page.keyboard.press("1")
    page.locator('button[aria-pressed="true"]').wait_for()
    for name, path in {
        "chats": "/chat", "look": "/look", "look-conversations": "/look/conversations", "look-runs": "/look/runs",
        "look-run": f"/look/run/{run}", "look-rows": f"/look/rows/{run}", "look-beside": f"/look/beside?run={run}",
        "admin": "/admin", "error": "/item/none",
    }.items():  # fmt: skip
        page.goto(path)
        take(page, out, name, whole=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images/collect"))
    parser.add_argument("--runs", type=Path, required=True, help="folder with runs")
    parser.add_argument("--run", required=True, help="a run in it, as the pages name it")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(queues(Path(folder))), "--model.path", str(story_model()), "--runs", str(args.runs)]
        arguments += ["--sampling.max_new_tokens", "48"]
        with collecting(*arguments) as (address, _), chromium() as browser:
            context = browser.new_context(base_url=address, locale="en")
            context.set_default_timeout(60_000)
            page = context.new_page()
            judge_twenty(page, args.out)
            others(page, args.out, args.run)


if __name__ == "__main__":
    main()
