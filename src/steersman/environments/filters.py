"""System calls that a program in the sandbox may not make: the kernel's filter (seccomp), made here, set up inside.

| refused | why |
| --- | --- |
| `unshare`, `setns`, `clone` with a namespace, `clone3` | a user namespace of its own would give it capabilities |
| `mount` and its kin | files of no limited size |
| `memfd_create`, `memfd_secret`, `shmget`, `msgget`, `semget`, `vmsplice` | memory that no process is seen to hold |
| `io_uring_setup` | would make calls that the filter does not see |
| `bpf`, `perf_event_open`, `userfaultfd`, keys | parts of the kernel that no such program needs |

Source: seccomp(2) and linux/filter.h of Linux.
"""

from __future__ import annotations

import platform
import struct
from dataclasses import dataclass

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _MACHINE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_EPERM, _ENOSYS = 1, 38
_NAMESPACES = 0x7E020000
"""The flags CLONE_NEW* of mounts, control groups, host names, IPC, users, processes and the network."""
_X32 = 0x40000000
_CLONE3 = 435
_SAME_EVERYWHERE = (
    425,  # io_uring_setup
    428, 429, 430, 431, 432, 433, 442, 467,  # open_tree, move_mount, fsopen to fspick, mount_setattr, open_tree_attr
    447,  # memfd_secret
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Machine:
    """`audit` is the kernel's AUDIT_ARCH; `refused` are unshare, setns, mount, umount2, pivot_root, memfd_create,
    shmget, msgget, semget, vmsplice, bpf, perf_event_open, userfaultfd, add_key, request_key and keyctl."""

    audit: int
    clone: int
    refused: tuple[int, ...]


_MACHINES = {
    "x86_64": _Machine(0xC000003E, 56, (272, 308, 165, 166, 155, 319, 29, 68, 64, 278, 321, 298, 323, 248, 249, 250)),
    "aarch64": _Machine(0xC00000B7, 220, (97, 268, 40, 39, 41, 279, 194, 186, 190, 75, 280, 241, 282, 217, 218, 219)),
}


def why_no_filter() -> str | None:
    """Why no filter can be made for this machine; None where one can."""
    if platform.machine() in _MACHINES:
        return None
    return f"no filter of system calls is known for {platform.machine()}; there is one for {', '.join(_MACHINES)}"


def seccomp_filter() -> bytes:
    """The filter as an array of `struct sock_filter`, 8 bytes each. `why_no_filter` says where there is none."""
    machine = _MACHINES[platform.machine()]
    # another machine's calls have other numbers
    out = [_step(_LOAD, _MACHINE_AT), _step(_EQUAL, machine.audit, yes=1), _step(_RETURN, _KILL)]
    out += [_step(_LOAD, _NUMBER_AT), *_refused_where(_AT_LEAST, _X32, _EPERM)]
    for number in (*machine.refused, *_SAME_EVERYWHERE):
        out += _refused_where(_EQUAL, number, _EPERM)
    # the flags of clone3 lie in memory, where a filter can not read; without it the C library calls clone
    out += _refused_where(_EQUAL, _CLONE3, _ENOSYS)
    flags = [_step(_LOAD, _FIRST_ARGUMENT_AT), *_refused_where(_ANY_BIT, _NAMESPACES, _EPERM)]
    out += [_step(_EQUAL, machine.clone, no=len(flags)), *flags, _step(_RETURN, _ALLOW)]
    return b"".join(out)


def _refused_where(test: int, value: int, error: int) -> list[bytes]:
    return [_step(test, value, no=1), _step(_RETURN, _ERROR | error)]


def _step(code: int, value: int, *, yes: int = 0, no: int = 0) -> bytes:
    """One instruction; `yes` and `no` are how many are passed over behind a test."""
    return struct.pack("=HBBI", code, yes, no, value)


SET_UP = """
import ctypes
class F(ctypes.Structure): _fields_ = [("n", ctypes.c_ushort), ("steps", ctypes.c_char_p)]
f = bytes.fromhex(sys.argv[1])
c = ctypes.CDLL(None, use_errno=True)
if c.prctl(38, 1, 0, 0, 0) or c.prctl(22, 2, ctypes.byref(F(len(f) // 8, f)), 0, 0):
    sys.exit(f"the filter of system calls can not be set up: errno {ctypes.get_errno()}")
del sys.argv[1:]
"""
"""Python that puts itself, for good, under the filter that its first argument holds in hexadecimal digits."""
