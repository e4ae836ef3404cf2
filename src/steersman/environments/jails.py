"""How a program is shut in: a command that runs it with a root of its own, no network and no other process in sight.

| jail | what it needs |
| --- | --- |
| `bubblewrap` | bwrap (package bubblewrap), setpriv and prlimit (util-linux) |
| `namespaces` | unshare, setpriv, prlimit, mount, pivot_root (util-linux) |

Both use the kernel's namespaces, both under the same limits on memory, processes, files and time. Inside, a filter of
system calls (`filters.py`) is set up before the program begins.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_COUNT = itertools.count()
_SCRIPT = r"""
set -e
root=$1; shift
mount --make-rprivate /
mount -t tmpfs -o size=1m,mode=755,nosuid,nodev none "$root"
cd "$root"
umask 022
mkdir -p proc tmp dev old
mount -t tmpfs -o size=$1,mode=1777,nosuid,nodev none tmp; shift
while [ "$1" != -- ]; do
  if [ -d "$1" ]; then mkdir -p ".$1"; mount --rbind "$1" ".$1"; mount -o remount,bind,ro,nosuid ".$1"; fi
  shift
done
shift
for name in null zero urandom; do : > dev/$name; mount --bind /dev/$name dev/$name; done
mount -t proc -o nosuid,nodev,noexec none proc
pivot_root . old
umount -l /old
mount -o remount,bind,ro,nosuid,nodev /
cd /tmp
exec setpriv "$@"
"""
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may take: seconds of the clock, MiB of memory (all its processes together) and of files,
    processes, characters of output."""

    seconds: float = 5.0
    memory: int = 512
    files: int = 16
    processes: int = 16
    output: int = 10_000


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Jail:
    """`command(root, limits, program)` runs `program`; `root` is an empty folder that it may use."""

    name: str
    command: Callable[[str, Limits, list[str]], list[str]]
    needs: tuple[str, ...]

    def missing(self) -> list[str]:
        """The tools that are not installed."""
        return [tool for tool in self.needs if shutil.which(tool) is None]


def _bubblewrap(root: str, limits: Limits, program: list[str]) -> list[str]:
    above = dict.fromkeys(str(up) for folder in _folders() for up in reversed(Path(folder).parents[:-1]))
    folders = [word for up in above for word in ("--perms", "0755", "--dir", up)]
    folders += [word for folder in _folders() for word in ("--ro-bind-try", folder, folder)]
    quiet = ["--die-with-parent", "--new-session", "--clearenv", "--setenv", "LANG", "C.UTF-8"]
    own = ["--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    user = ["--unshare-user"]
    if os.geteuid() == 0:
        user = [word for cap in ("SETUID", "SETGID", "SETPCAP") for word in ("--cap-add", f"CAP_{cap}")]
    # what bwrap makes is in memory too, so it is closed to writing but for the one folder of limited size
    places = ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    size = str(limits.files * _MIB)
    room = ["--perms", "1777", "--size", size, "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    shut_in = ["bwrap", *quiet, *own, "--cap-drop", "ALL", *user, *folders, *places, *room, "--"]
    return [*shut_in, "setpriv", *_powerless(), *_limited(limits), *program]


def _namespaces(root: str, limits: Limits, program: list[str]) -> list[str]:
    as_user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    own = ["--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
    script = ["sh", "-c", _SCRIPT, "sandbox", root, f"{limits.files}m", *_folders(), "--"]
    return ["unshare", *as_user, *own, *script, *_powerless(), *_limited(limits), *program]


def _powerless() -> list[str]:
    """What setpriv takes away. Root becomes another user: limits on processes do not bind root, and one user's
    processes are counted together."""
    as_other: list[str] = []
    if os.geteuid() == 0:
        other = str(60_000 + (os.getpid() * 64 + next(_COUNT)) % 5_000)
        as_other = [f"--reuid={other}", f"--regid={other}", "--clear-groups"]
    return [*as_other, "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]


def _folders() -> list[str]:
    """What is shown of the machine, to read alone: the system's programs and this Python."""
    shown = ["/usr", "/lib", "/lib64", "/bin", str(Path(sys.base_prefix).resolve())]
    return list(dict.fromkeys(f for f in shown if not (f != "/usr" and f.startswith("/usr/"))))


def _limited(limits: Limits) -> list[str]:
    return [
        "prlimit", f"--as={limits.memory * _MIB}", f"--nproc={limits.processes}", f"--fsize={limits.files * _MIB}",
        f"--cpu={int(limits.seconds) + 1}", "--nofile=64", "--core=0",
    ]  # fmt: skip


JAILS = (
    Jail("bubblewrap", _bubblewrap, ("bwrap", "setpriv", "prlimit")),
    Jail(
        "namespaces",
        _namespaces,
        ("unshare", "setpriv", "prlimit", "mount", "umount", "pivot_root", "sh"),
    ),
)
"""In the order in which they are tried."""
