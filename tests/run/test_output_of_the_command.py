"""Standard output that ends early, or has another encoding than the text."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from steersman import cli
from steersman.guards.terminal import encodes, write_out_unencodable

RICH = """
import sys
from steersman import cli
from rich.console import Console
def prints(args):
    for i in range(20000):
        Console().print("a line", i) if "rich" in args else print("a line", i)
    return 0
cli._dispatch = prints
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("how", ["rich", "plain"])
def test_a_pipe_that_closes_ends_the_command_quietly(how):
    """As `| head -1`: the reader goes after the first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", RICH, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 141


def test_little_output_that_nobody_reads_ends_quietly_too():
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "steersman", "--version"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60, env=buffered)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_an_exit_that_something_else_asked_for_is_still_told(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_dispatch", lambda args: sys.exit(3))
    assert cli.main([]) == 1
    assert "something called sys.exit(3)" in capsys.readouterr().err


def test_what_the_encoding_lacks_is_written_out(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert encodes("cafe")
    assert not encodes("café")
    write_out_unencodable()
    print("café 🙂")
    Console().print("naïve", markup=False)
    sys.stdout.flush()
    assert raw.getvalue() == b"caf\\xe9 \\U0001f642\nna\\xefve\n"


def test_a_recipe_is_not_printed_otherwise_than_it_reads(tmp_path):
    words = ["sft", "--model.path", "café", "--data.path", "x.jsonl", "--print-config"]
    ended = subprocess.run([sys.executable, "-m", "steersman", *words], timeout=120, capture_output=True,
                           env={**os.environ, "PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert ended.returncode == 2
    assert ended.stdout == b""
    assert b"set PYTHONIOENCODING=utf-8" in ended.stderr
