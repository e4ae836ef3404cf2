"""What others wrote does not command the terminal."""

import ast
import io
import re
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from steersman import cli
from steersman.guards.terminal import printable
from steersman.run.files.log import Log
from steersman.run.health.watch import Finding
from steersman.run.preflight import Preflight

ATTACK = "a\x1b[2Jb\x1b]0;title\x07c\x9b31md\u202ee\u2066f\rg\x00h[red]i[/red]\ud800"


def obeyed(text):
    """Characters that a terminal would act on."""
    turns = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return [c for c in text if (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t")
            or unicodedata.bidirectional(c) in turns]  # fmt: skip


@given(st.text(st.characters(), max_size=50))
def test_nothing_that_is_obeyed_is_left_and_the_rest_stays(text):
    shown = printable(text)
    assert not obeyed(shown)
    if not obeyed(text) and not re.search("[\u061c\u200e\u200f\ufeff]", text):
        assert shown == text


def test_line_ends_stay_and_what_is_obeyed_is_written_out():
    assert printable("a\r\nb\tc\n") == "a\nb\tc\n"
    assert printable("x\x1b[31m\r\x9b\u202e\ud800") == r"x\x1b[31m\r\x9b\u202e\ud800"
    assert printable("naïve 日本語 🙂 👩‍💻 ä") == "naïve 日本語 🙂 👩‍💻 ä"


@pytest.mark.parametrize("terminal", [True, False])
def test_log_and_preflight_show_it_written_out(tmp_path, terminal):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, color_system=None, width=200)
    with Log(tmp_path, title="x", total=1, console=console) as log:
        log.note(ATTACK)
        log.finding(Finding(1, "code", "warning", ATTACK))
    page = Preflight(ATTACK)
    page.fact("data", ATTACK)
    page.sample([(ATTACK, True), (ATTACK, False)])
    page.show(console)
    said = file.getvalue()
    if terminal:  # the progress line's own commands
        said = re.sub(r"\x1b\[[?\d]*[A-Za-z]|\r", "", said)
    assert not obeyed(said)
    assert said.count(r"\x1b[2J") == 6
    assert said.count("[red]i[/red]") == 6


def test_an_error_shows_it_written_out(capsys):
    assert cli.main([ATTACK]) == 2
    told = capsys.readouterr().err
    assert not obeyed(told)
    assert r"\x1b[2J" in told


def test_a_crash_and_a_line_on_standard_error_show_it_written_out(capsys, monkeypatch):
    """What Python's own traceback printer would let through; `sys.excepthook` is set where the run has crashed."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(cli, "_dispatch", crash)
    with pytest.raises(RuntimeError) as crashed:
        cli.main([])
    sys.excepthook(crashed.type, crashed.value, crashed.tb)
    told = capsys.readouterr().err
    assert "in crash\n" in told
    assert r"RuntimeError: a\x1b[2Jb" in told
    assert not obeyed(told)


def crash(args):
    raise RuntimeError(ATTACK)


def test_nothing_is_printed_past_it():
    """Every line on standard error goes through `say`."""
    source, own = Path(cli.__file__).parent, {"cli.py", "guards/terminal.py", "native/build.py"}
    past = [
        f"{path.relative_to(source)}:{call.lineno}"
        for path in source.rglob("*.py")
        if str(path.relative_to(source)) not in own
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) == "print"
        and any(keyword.arg == "file" and ast.unparse(keyword.value) == "sys.stderr" for keyword in call.keywords)
    ]
    assert past == []
