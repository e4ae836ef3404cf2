"""What is compiled is kept where only the user can write, is whole when it is loaded, and ends with its maker."""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from steersman import native
from steersman.native import build

COMPILER = build.compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is here")
ONE = {"a.cpp": b'extern "C" int one() { return 1; }'}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    home = tmp_path / "cache"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "steersman"


def made(capfd, sources=ONE) -> tuple[Path, bool]:
    """The library, and whether it was compiled now."""
    capfd.readouterr()
    path = build.built(str(COMPILER), sources)
    return path, "compiling the inner loops" in capfd.readouterr().err


def test_it_is_compiled_once_and_says_so(cache, capfd):
    path, compiled = made(capfd)
    assert compiled
    assert path.parent == cache
    assert ctypes.CDLL(str(path)).one() == 1
    assert made(capfd) == (path, False)
    assert sorted(p.suffix for p in cache.iterdir()) == [".sha256", ".so"]


@pytest.mark.parametrize("damage", ["half", "empty", "another", "no digest", "digest cut"])
def test_what_is_damaged_or_was_put_there_is_built_again_not_loaded(damage, cache, capfd):
    path, _ = made(capfd)
    good = path.read_bytes()
    if damage == "half":
        path.write_bytes(good[: len(good) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "another":
        path.write_bytes(good.replace(b"one", b"two"))
    elif damage == "no digest":
        path.with_suffix(".sha256").unlink()
    else:
        path.with_suffix(".sha256").write_text("abc")
    assert made(capfd) == (path, True)
    assert ctypes.CDLL(str(path)).one() == 1


def test_a_folder_that_others_may_write_to_is_refused_by_name(cache, capfd):
    cache.mkdir(mode=0o700)
    cache.chmod(0o777)
    path = build.built(str(COMPILER), ONE)
    said = capfd.readouterr().err
    assert f"others may write to {cache}" in said
    assert "XDG_CACHE_HOME" in said
    assert cache not in path.parents
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(cache.iterdir()) == []


def test_so_is_one_under_a_folder_that_others_may_write_to_and_one_of_another_user(cache, tmp_path):
    cache.mkdir(mode=0o700)
    assert build.untrusted(cache) is None
    tmp_path.chmod(0o777)
    assert build.untrusted(cache) == f"others may write to {tmp_path}"
    tmp_path.chmod(0o1777)  # sticky: others can add, and can not replace what is the user's
    assert build.untrusted(cache) is None
    assert build.untrusted(tmp_path) == f"others may write to {tmp_path}"
    tmp_path.chmod(0o700)
    if os.getuid() == 0:
        os.chown(cache, 12345, 12345)
        assert build.untrusted(cache) == f"{cache} belongs to another user"


def test_a_link_is_judged_by_where_it_leads(cache, tmp_path):
    open_place = tmp_path / "open"
    open_place.mkdir()
    open_place.chmod(0o777)
    cache.symlink_to(open_place)
    assert build.untrusted(cache) == f"others may write to {open_place}"


def test_a_home_that_can_not_be_written_falls_through(tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = build.built(str(COMPILER), ONE)
    assert "can not be written to" in capfd.readouterr().err
    assert ctypes.CDLL(str(path)).one() == 1


def test_a_build_that_fails_says_why_and_leaves_nothing(cache):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        build.built(str(COMPILER), {"a.cpp": b"this is not C++;"})
    assert "error" in native._first_line(caught.value)
    assert list(cache.iterdir()) == []


def test_what_a_killed_build_left_is_cleared_when_it_is_old(cache, capfd):
    for name, age in (("old", 7200), ("new", 60)):
        left = cache / f".build-{name}"
        left.mkdir(parents=True)
        os.utime(left, (time.time() - age,) * 2)
    made(capfd)
    assert [p.name for p in cache.glob(".build-*")] == [".build-new"]


SLOW = """
    import signal
    import sys
    from pathlib import Path
    from steersman.native import build
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins by ignoring it
    build.LIMIT = float(sys.argv[2])
    build.built(sys.argv[1], {"a.cpp": b""})
"""


@pytest.mark.parametrize("how", ["interrupt", "limit"])
def test_the_compilers_own_children_end_with_it(how, cache, tmp_path):
    """A compiler that starts a child and waits for it, as c++ does with cc1plus."""
    slow = tmp_path / "slow-c++"
    slow.write_text(
        f"#!/bin/sh\nif [ $1 = --version ]; then exit; fi\nsleep 300 & echo $! > {tmp_path}/child; wait\n"
    )
    slow.chmod(0o755)
    limit = "1" if how == "limit" else "300"
    ran = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SLOW), str(slow), limit], stderr=subprocess.PIPE)
    pid, end = tmp_path / "child", time.monotonic() + 60
    while not (pid.exists() and pid.read_text().strip()):
        assert time.monotonic() < end
        time.sleep(0.02)
    child = int(pid.read_text())
    if how == "interrupt":
        ran.send_signal(signal.SIGINT)
    said, end = ran.communicate(timeout=60)[1].decode(), time.monotonic() + 60
    assert ("KeyboardInterrupt" if how == "interrupt" else "TimeoutExpired") in said
    while Path(f"/proc/{child}").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < end, "the compiler's child lives on"
        time.sleep(0.02)
    assert not list(cache.glob("*"))
