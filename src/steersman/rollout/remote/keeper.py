"""Runs a command and ends it with all that it started, when told so or when whoever asked for it is gone.

    python keeper.py LOG [FOLDER ...] -- COMMAND ...

Standard input is the line to the one who asked: when it closes, for whatever reason (SIGKILL too), the command's
whole process group is killed; the FOLDERs are removed unless the last word over the line was KEEP. It needs the
standard library only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading

KEEP = b"keep"


def main(words: list[str]) -> int:
    split = words.index("--")
    log, folders, command = words[0], words[1:split], words[split + 1 :]
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C is the learner's, which ends its step first
    with open(log, "ab") as out:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    print(child.pid, flush=True)

    def watch() -> None:
        told = sys.stdin.buffer.read()
        _kill(child.pid)
        for folder in folders if told != KEEP else ():
            shutil.rmtree(folder, ignore_errors=True)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = child.wait()
    _kill(child.pid)  # what it started may outlive it
    watcher.join()
    return code


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
