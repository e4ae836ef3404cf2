"""Building the compiled loops, and keeping the result where nobody else can put anything.

What is loaded runs with all rights of the user. So it is kept only in a folder that the user owns and nobody else
may write to, all folders above it included; its content is checked by SHA-256 before it is loaded; and it is written
whole or not at all. Where there is no such folder, each process builds its own in a fresh private one.
"""

from __future__ import annotations

import atexit
import grp
import hashlib
import os
import platform
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from steersman.atomic import flush_to_disk

FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
)
SANITIZED = (
    *FLAGS,
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)
"""With them a read or write outside what was allocated, and undefined behaviour, end the process and say where.
The process must have been started with the sanitizer's library preloaded, as `make sanitize` does."""
LIMIT = 300.0
"""Seconds that the compiler may take for all files."""
_BUILDING = ".build-"


def compiler() -> str | None:
    """The first of $CXX, c++, g++ and clang++ that is there."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def built(command: str, sources: dict[str, bytes], flags: Sequence[str] = FLAGS) -> Path:
    """The shared library of these files for this compiler and processor: kept from before where it is whole.

    Raises OSError where nothing can be written, and subprocess.SubprocessError where the compiler fails or takes
    longer than `LIMIT`.
    """
    version = subprocess.run([command, "--version"], capture_output=True, check=True, timeout=60).stdout
    parts = [part for name, code in sources.items() for part in (name.encode(), code)]
    known = hashlib.sha256(b"\0".join([*parts, version, " ".join(flags).encode(), _processor()])).hexdigest()
    name = f"native-{known[:16]}.so"
    folder = _folder()
    target = folder / name
    if not _whole(target):
        _say("compiling the inner loops for this processor, once (about 10 seconds)")
        _build(command, flags, sources, target)
    return target


def untrusted(folder: Path) -> str | None:
    """Why others could put something into this folder, None where they can't.

    The folder must be the user's own, and neither it nor any folder above it (links followed) may be written to by
    others; where a folder above has the sticky bit, as /tmp has, others can't replace what the user owns in it.
    """
    real = Path(os.path.realpath(folder))
    for place in (real, *real.parents):
        seen = os.stat(place)
        if place == real and seen.st_uid != os.getuid():
            return f"{place} belongs to another user"
        if seen.st_uid not in (0, os.getuid()):
            return f"{place} belongs to another user"
        shared = seen.st_mode & (stat.S_IWOTH if _own_group(seen.st_gid) else stat.S_IWGRP | stat.S_IWOTH)
        if shared and not (place != real and seen.st_mode & stat.S_ISVTX):
            return f"others may write to {place}"
    return None


def _own_group(gid: int) -> bool:
    """Whether the group is the user's private one, as many systems give each user: nobody else is in it."""
    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return user.pw_gid == gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _folder() -> Path:
    """The user's cache folder, or where it can't be used a private one of this process."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home, "steersman")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        why = untrusted(folder)
        if why is None:
            with tempfile.TemporaryFile(dir=folder):
                pass
            _clear(folder)
            return folder
    except OSError as error:
        why = f"{folder} can not be written to ({error.strerror})"
    private = Path(tempfile.mkdtemp(prefix="steersman-"))
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    _say(f"{why}, so what is compiled is not kept; set XDG_CACHE_HOME to a folder of your own")
    return private


def _clear(folder: Path) -> None:
    """Removes builds that a killed process left more than an hour ago."""
    for left in folder.glob(f"{_BUILDING}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left, ignore_errors=True)


def _whole(target: Path) -> bool:
    """Whether the library is there with the content that was written down beside it."""
    try:
        told = _digest_file(target).read_text(encoding="ascii", errors="replace").strip()
        return target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == told
    except OSError:
        return False


def _digest_file(target: Path) -> Path:
    return target.with_suffix(".sha256")


def _build(command: str, flags: Sequence[str], sources: dict[str, bytes], target: Path) -> None:
    """Compiles in a folder beside the target, then renames the library and its digest into their places."""
    with tempfile.TemporaryDirectory(prefix=_BUILDING, dir=target.parent) as work:
        folder = Path(work)
        for name, code in sources.items():
            (folder / name).write_bytes(code)
        units = sorted(folder.glob("*.cpp"))
        objects = [unit.with_suffix(".o") for unit in units]
        end = time.monotonic() + LIMIT
        _run([[command, *flags, "-c", str(u), "-o", str(o)] for u, o in zip(units, objects, strict=True)], end)
        library, digest = folder / "native.so", folder / "native.sha256"
        _run([[command, *flags, "-shared", *map(str, objects), "-o", str(library)]], end)
        digest.write_text(hashlib.sha256(library.read_bytes()).hexdigest())
        for file in (library, digest):
            flush_to_disk(file)
        library.replace(target)
        digest.replace(_digest_file(target))
        flush_to_disk(target.parent)


def _run(commands: Sequence[Sequence[str]], end: float) -> None:
    """Runs the commands side by side; whatever ends this early ends them too, with all that they started.

    What they print goes into files, so that none waits for a reader.
    """
    running: list[tuple[subprocess.Popen[bytes], Path]] = []
    try:
        for command in commands:
            said = Path(command[-1]).with_suffix(".txt")
            with said.open("wb") as out:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
                )
            running.append((process, said))
        for process, said in running:
            code = process.wait(max(end - time.monotonic(), 0.01))
            if code:
                raise subprocess.CalledProcessError(code, process.args, stderr=said.read_bytes())
    finally:
        for process, _ in running:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _processor() -> bytes:
    """What tells processors apart that share a home folder: code for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features"))).encode()
    except (OSError, StopIteration):
        return platform.processor().encode()


def _say(text: str) -> None:
    print(f"steersman: {text}", file=sys.stderr, flush=True)
