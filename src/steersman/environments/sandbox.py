"""Python programs of others, run in a process of their own that can reach nothing and take little.

Namespaces of the kernel's own (`unshare`, as any user) give the program a root of its own, in which only the Python
that runs it stands, read-only, beside an empty working folder in memory; no network; no process but its own; no
capability. Limits hold its time, memory, processes, files and output. Where the machine gives no such namespaces,
nothing is run: the sandbox refuses by name, before training.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steersman.environments.text import shown
from steersman.types import SteersmanError

_COUNT = itertools.count()
_NEEDED = ("unshare", "setpriv", "prlimit", "mount", "umount", "pivot_root", "sh")
_SCRIPT = r"""
set -e
root=$1; shift
mount --make-rprivate /
mount -t tmpfs -o size=$1,nosuid,nodev none "$root"; shift
cd "$root"
umask 022
mkdir -p proc tmp dev old
chmod 1777 tmp
while [ "$1" != -- ]; do
  if [ -d "$1" ]; then mkdir -p ".$1"; mount --rbind "$1" ".$1"; mount -o remount,bind,ro,nosuid ".$1"; fi
  shift
done
shift
for name in null zero urandom; do : > dev/$name; mount --bind /dev/$name dev/$name; done
mount -t proc -o nosuid,nodev,noexec none proc
pivot_root . old
umount -l /old
cd /tmp
exec setpriv "$@"
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may take: seconds of the clock, MiB of memory and of files, processes, characters of output."""

    seconds: float = 5.0
    memory: int = 512
    files: int = 16
    processes: int = 16
    output: int = 10_000


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended: `code` as a shell has it, `late` where time was over, `output` of both streams, cut."""

    code: int
    output: str
    late: bool

    @property
    def good(self) -> bool:
        return self.code == 0 and not self.late


def run_python(program: str, limits: Limits = Limits(), *, given: str = "") -> Outcome:
    """Runs a program with the standard library alone; `given` is its standard input.

    Raises SteersmanError where this machine has no sandbox.
    """
    problem = why_not()
    if problem is not None:
        raise SteersmanError(f"sandbox: {problem}; programs of others are not run without one")
    return _run(program, limits, given)


@functools.cache
def why_not() -> str | None:
    """Why nothing can be sandboxed here; None where it can. A program is run in one to find out."""
    if sys.platform != "linux":
        return f"needs Linux's namespaces, which {sys.platform} has not"
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)} (package util-linux), which are not installed"
    found = _run("print(6 * 7)", Limits(), "")
    return None if found.good and found.output == "42\n" else f"namespaces do not work here: {found.output[-300:]}"


def run_code(code: str) -> str:
    """Runs a Python program and gives what it prints.

    Args:
        code: the whole program; only the standard library can be imported
    """
    found = run_python(code)
    end = "\n(stopped: out of time)" if found.late else "" if found.code == 0 else f"\n(exit code {found.code})"
    return (found.output + end).strip() or "(no output)"


def unit_tests(
    prompts: Sequence[str], completions: Sequence[str], *, tests: Sequence[str], seconds: float = 5.0
) -> list[float]:
    """1 where the completion's program, followed by the row's `tests` (such as asserts), runs to its end, else 0.

    Of a completion with fenced code the last fence counts. Leaving early or printing claims nothing: behind the tests
    a word must be printed that stands in neither. Program and tests share a process, so one that is written to forge
    that word can; what it can't do is leave the sandbox.
    """
    return [float(_passes(program_of(c), t, seconds)) for c, t in zip(completions, tests, strict=True)]


def program_of(completion: str) -> str:
    """The last fenced block of a text, or all of it where there is none."""
    parts = completion.split("```")
    if len(parts) < 3:
        return completion
    block = parts[-2] if len(parts) % 2 else parts[-1]
    first, newline, rest = block.partition("\n")
    return rest if newline and first.strip() in ("", "python", "py", "python3") else block


def _passes(program: str, tests: str, seconds: float) -> bool:
    word = os.urandom(16).hex()
    runner = (
        "import sys\n"
        f"program, tests = {program!r}, {tests!r}\n"
        "space = {'__name__': 'solution'}\n"
        "read = sys.stdin.read\nwrite = sys.__stdout__.write\n"
        "exec(compile(program, 'solution', 'exec'), space)\n"
        "exec(compile(tests, 'tests', 'exec'), space)\n"
        "write('\\n' + read()[::-1])\n"
    )
    found = run_python(runner, Limits(seconds=seconds), given=word)
    return found.good and found.output.endswith("\n" + word[::-1])


def _run(program: str, limits: Limits, given: str) -> Outcome:
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        command = _command(root, limits)
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LANG": "C.UTF-8"},
        )  # fmt: skip
        try:
            return _watched(process, program, limits, given)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()


def _command(root: str, limits: Limits) -> list[str]:
    python = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    shown_folders = ["/usr", "/lib", "/lib64", "/bin", str(Path(sys.base_prefix).resolve())]
    folders = list(dict.fromkeys(f for f in shown_folders if not (f != "/usr" and f.startswith("/usr/"))))
    mib = 2**20
    as_user, as_other = ["--user", "--map-root-user"], []
    if os.geteuid() == 0:  # limits on processes do not bind root, and one user's processes are counted together
        other = str(60_000 + (os.getpid() * 64 + next(_COUNT)) % 5_000)
        as_user, as_other = [], [f"--reuid={other}", f"--regid={other}", "--clear-groups"]
    own = ["--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
    script = ["sh", "-c", _SCRIPT, "sandbox", root, f"{limits.files}m", *folders, "--"]
    powerless = [*as_other, "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
    within = [
        "prlimit", f"--as={limits.memory * mib}", f"--nproc={limits.processes}", f"--fsize={limits.files * mib}",
        f"--cpu={int(limits.seconds) + 1}", "--nofile=64", "--core=0",
    ]  # fmt: skip
    return ["unshare", *as_user, *own, *script, *powerless, *within, str(python), "-I", "-S", "-B", "-c", _BOOT]


_BOOT = (
    "import sys\nsize = int(sys.stdin.buffer.readline())\ntext = sys.stdin.buffer.read(size).decode()\n"
    "exec(compile(text, 'program', 'exec'), {'__name__': '__main__'})"
)


def _watched(process: subprocess.Popen[bytes], program: str, limits: Limits, given: str) -> Outcome:
    """Feeds the program, reads what it says up to the limit, and ends it when its time is over."""
    assert process.stdin is not None
    assert process.stdout is not None
    text = program.encode("utf-8", "replace")
    to_write = memoryview(str(len(text)).encode() + b"\n" + text + given.encode("utf-8", "replace"))
    os.set_blocking(process.stdin.fileno(), False)
    deadline, said, late = time.monotonic() + limits.seconds, bytearray(), False
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        reading = True
        while reading:
            left = deadline - time.monotonic()
            if left <= 0 or len(said) > 4 * limits.output:
                late = left <= 0
                break
            for key, _ in selector.select(left):
                if key.fileobj is process.stdout:
                    piece = os.read(process.stdout.fileno(), 65_536)
                    said += piece
                    reading = bool(piece)
                    continue
                try:
                    to_write = to_write[os.write(process.stdin.fileno(), to_write) :]
                except BrokenPipeError:
                    to_write = to_write[:0]
                if not to_write:
                    selector.unregister(process.stdin)
                    process.stdin.close()
    flooded = len(said) > 4 * limits.output
    code = -9
    if not late and not flooded:
        try:
            code = process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            late = True
    return Outcome(code, shown(said.decode("utf-8", "replace"), limits.output), late)
