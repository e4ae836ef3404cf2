"""Schemathesis against `steersman serve` and `steersman collect`: `make scan`.

    python tools/scan.py --examples 50

Both run with the story model on ports of their own; the pages of collect are scanned as an admin, with a login and
its token. Fails where a server answers with an error of its own, with a status that its document does not name, or,
on the pages, without its security headers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "results"))
import httpx2
from pages import collecting, free_port

from steersman.assets import story_model
from steersman.people.collect.openapi import document
from steersman.people.collect.security import HEADERS

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance"


def scan(schema: str, url: str, examples: int, *more: str) -> int:
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", schema, "--url", url, "--checks", CHECKS,
        "--max-examples", str(examples), "--phases", "examples,fuzzing", "--seed", "1",
        "--request-timeout", "60", *more,
    ]  # fmt: skip
    return subprocess.run(command).returncode


def scan_serve(examples: int) -> int:
    port = free_port()
    command = [sys.executable, "-m", "steersman", "serve", str(story_model()), "--serve.port", str(port)]
    server = subprocess.Popen([*command, "--serve.max_new_tokens", "16"], stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait(f"{url}/health", server)
        return scan(f"{url}/openapi.json", url, examples)
    finally:
        server.terminate()
        server.wait(60)


def scan_collect(examples: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        place, runs = Path(folder), Path(folder) / "runs"
        runs.mkdir()
        arguments = ["--store", str(place / "feedback.db"), "--model.path", str(story_model()), "--runs", str(runs)]
        with (
            collecting(*arguments, "--sampling.max_new_tokens", "4") as (link, _),
            httpx2.Client(base_url=(url := link.partition("/enter/")[0]), follow_redirects=True) as http,
        ):
            page = http.get(link)
            missing = [name for name in HEADERS if name.lower() not in page.headers]
            token = re.findall(r'name="csrf" value="([^"]*)"', page.text)[0]
            schema = place / "openapi.json"
            schema.write_text(json.dumps(document(token)))
            cookie = f"Cookie: steersman={http.cookies['steersman']}"
            # forms are limited to two a second, and the scanner asks no faster
            bad = scan(str(schema), url, examples, "-H", cookie, "--rate-limit", "100/m", "--exclude-path", "/logout")
        if missing:
            print(f"the pages lack {', '.join(missing)}")
        return bad or len(missing)


def wait(url: str, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 180
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"the server at {url} did not come up")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=50, help="requests of an address")
    parser.add_argument("--only", choices=["serve", "collect"], help="one of the two")
    args = parser.parse_args()
    found = [
        f(args.examples)
        for name, f in (("serve", scan_serve), ("collect", scan_collect))
        if args.only in (None, name)
    ]
    sys.exit(any(found))


if __name__ == "__main__":
    main()
