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
from rich.table import Table

from steersman import cli
from steersman.guards.terminal import printable
from steersman.run.console import new_console
from steersman.run.files.log import Log
from steersman.run.health.watch import Finding
from steersman.run.preflight import Preflight, Role

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
    console = new_console(file=file, force_terminal=terminal, color_system=None, width=200)
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


LITERAL = r"a:b:c of :key: [red]x[/red] \[bold] [/] :dog:"


def test_a_console_shows_text_as_it_is():
    file = io.StringIO()
    console = new_console(file=file, width=200)
    table = Table(LITERAL, title=LITERAL)
    table.add_row(LITERAL)
    console.print(table)
    console.print(LITERAL, style="bold")
    console.rule(LITERAL)
    assert file.getvalue().count(LITERAL) == 5


def test_log_and_preflight_show_text_as_it_is(tmp_path):
    """Names of users' rewards stand on the progress line, and in the tables before a run."""
    file = io.StringIO()
    console = new_console(file=file, force_terminal=True, color_system=None, width=300)
    with Log(tmp_path, title="x", total=1, headline=[LITERAL], console=console) as log:
        log.step(1, {LITERAL: 1.0})
        log.note(f"{LITERAL} {'word ' * 100}")
    page = Preflight(LITERAL)
    page.role(Role(f"reward {LITERAL}", LITERAL, 1, 0, 1, 0, 0))
    page.show(console)
    said = re.sub(r"\x1b\[[?\d]*[A-Za-z]|\r", "", file.getvalue())
    assert said.count(LITERAL) >= 5
    assert f"{LITERAL} {'word ' * 100}".rstrip() in said


def test_every_console_is_made_in_one_place():
    source = Path(cli.__file__).parent
    made = [
        str(path.relative_to(source))
        for path in source.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func).rsplit(".", 1)[-1] == "Console"
    ]
    assert made == ["run/console.py"]


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
