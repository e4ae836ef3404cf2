"""The sandbox: programs run, and what they try in order to get out or to take much fails."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import replace

import pytest

from steersman.environments import sandbox
from steersman.environments.jails import JAILS, Limits
from steersman.environments.sandbox import program_of, run_code, run_python, unit_tests
from steersman.types import SteersmanError

needs = pytest.mark.skipif(sandbox.why_not() is not None, reason=f"no sandbox here: {sandbox.why_not()}")


@pytest.fixture(params=JAILS, ids=lambda jail: jail.name)
def jail(request, monkeypatch):
    """Each jail in turn, where it works."""
    if (why := sandbox.broken(request.param)) is not None:
        pytest.skip(f"{request.param.name} {why}")
    monkeypatch.setattr(sandbox, "_jail", lambda: (request.param, None))


@needs
def test_a_program_runs_and_is_told_how_it_ended(jail):
    assert run_code("import math\nprint(math.comb(10, 3))") == "120"
    assert "ZeroDivisionError" in run_code("1 / 0")
    assert "exit code 3" in run_code("raise SystemExit(3)")
    assert run_python("import sys\nprint(sys.stdin.read())", given="é").output == "é\n"


@needs
@pytest.mark.parametrize(
    "attempt",
    [
        "open('/etc/passwd').read()",
        "open(FILE).read()",
        "import os\nassert os.listdir('/home') and os.listdir('/old')",
        "open('/usr/mine', 'w')",
        "open('/mine', 'w')",
        "open('/dev/mine', 'w')",
        "open('/dev/shm/mine', 'w').write('a' * 2 ** 25)",
        "import socket\nsocket.create_connection(('1.1.1.1', 53), 1)",
        "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)",
        "import os, signal\nos.kill(PID, signal.SIGTERM)",
        "import os\nopen(f'/proc/{PID}/environ').read()",
        "import os\nos.setuid(0); os.chroot('/proc/1/root'); open('/etc/passwd').read()",
        "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, b'') == 0",
        "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
        "import ctypes, os\nassert ctypes.CDLL(None).syscall(CLONE, 0x10000000 | 17, 0, 0, 0, 0) >= 0",
        "import ctypes, struct\narguments = struct.pack('=11Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0)\n"
        "assert ctypes.CDLL(None).syscall(435, arguments, 88) >= 0",
        "import ctypes, os\nctypes.CDLL(None).setns(os.open('/proc/self/ns/user', 0), 0) == 0 or 1 / 0",
        "import os\nos.memfd_create('more')",
        "import ctypes\nassert ctypes.CDLL(None).shmget(0, 2 ** 20, 0o1600) >= 0",
        "import os\nos.mknod('/tmp/disk', 0o60600, os.makedev(8, 0)); open('/tmp/disk')",
        "x = bytearray(2 ** 31)",
        "open('/tmp/big', 'wb').write(bytes(2 ** 25))",
        "import os\n[os.fork() or __import__('time').sleep(1) for _ in range(64)]",
        "files = [open('/tmp/f') for _ in [open('/tmp/f', 'w')] * 200]",
    ],
)
def test_an_escape_fails(attempt, jail):
    import socket

    clone = {"x86_64": 56, "aarch64": 220}[platform.machine()]
    attempt = attempt.replace("FILE", repr(__file__)).replace("CLONE", str(clone))
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = run_python(attempt.replace("PORT", str(server.getsockname()[1])).replace("PID", str(os.getpid())))
    assert found.code != 0
    assert not found.late or "fork" in attempt
    assert "root:" not in found.output


@needs
def test_a_program_has_threads_and_starts_others(jail):
    """The filter of system calls leaves them."""
    program = (
        "import subprocess, threading\nt = threading.Thread(target=print, args=('a',))\nt.start()\nt.join()\n"
        "print(subprocess.run(['/bin/sh', '-c', 'exit 3']).returncode)"
    )
    assert run_python(program).output == "a\n3\n"


@needs
@pytest.mark.parametrize("quiet", ["", "os.close(1)\nos.close(2)\n"])
def test_the_limit_on_memory_is_one_of_all_processes_together(jail, quiet):
    """Each holds less than may be mapped by one; what several share counts once."""
    apart = "import os, time\n" + quiet + "[os.fork() for _ in range(2)]\nheld = b'a' * (90 << 20)\ntime.sleep(20)"
    found = run_python(apart, Limits(seconds=20, memory=256))
    assert found.too_large
    assert not found.late
    assert not found.good
    shared = "import os, time\nheld = b'a' * (90 << 20)\n" + quiet + "[os.fork() for _ in range(2)]\ntime.sleep(0.2)"
    assert run_python(shared, Limits(seconds=20, memory=256)).good


@needs
def test_a_tool_says_that_its_program_held_too_much(jail):
    forks = "import os, time\nfor _ in range(8):\n    os.fork() or (b'a' * (300 << 20), time.sleep(9))\ntime.sleep(9)"
    assert run_code(forks).endswith("(stopped: it holds too much memory)")


@needs
def test_environment_variables_are_not_seen(monkeypatch, jail):
    monkeypatch.setenv("MY_TOKEN", "secret-word")
    assert "secret-word" not in run_python("import os\nprint(dict(os.environ))").output


@needs
def test_time_and_output_are_limited(jail):
    start = time.monotonic()
    assert run_python("while True: pass", Limits(seconds=0.5)).late
    assert run_python("import time, os\nos.fork()\ntime.sleep(60)", Limits(seconds=0.5)).late
    assert time.monotonic() - start < 5
    flood = run_python("while True: print('a' * 1000)", Limits(seconds=5, output=100))
    assert flood.code == -9
    assert len(flood.output) < 200
    assert "\x1b" not in run_python(r"print('\x1b[31m')").output


GOOD = "Here:\n```python\ndef f(x):\n    return x + 1\n```\nDone."


@needs
def test_unit_tests_are_the_reward():
    tests = ["assert f(1) == 2\nassert f(-1) == 0"] * 6
    replies = [
        GOOD,
        "def f(x): return 2",
        "def f(x",
        "def f(x):\n    return x + 1\nraise SystemExit(0)",
        "import os\nos._exit(0)",
        "print('passed')\nimport sys\nprint(sys.stdin.read())\nraise SystemExit(0)",
    ]
    assert unit_tests([""] * 6, replies, tests=tests) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


RIGHT = "def f(x):\n    return x + 1\n"
TALKS = {
    "prints much": "def f(x):\n    print('step', x, '.' * 90)\n    return x + 1\n",
    "prints more than a sandbox takes": "def f(x):\n    print('.' * 1000)\n    return x + 1\n",
    "says goodbye": RIGHT + "import atexit\natexit.register(lambda: print('bye'))\n",
    "warns as it ends": RIGHT + "import atexit, sys\natexit.register(lambda: print('bye', file=sys.stderr))\n",
    "has closed its output": RIGHT + "import os, sys\nsys.stdout.close()\nos.close(1)\n",
}


@needs
@pytest.mark.parametrize("program", TALKS.values(), ids=TALKS)
def test_what_a_right_program_prints_costs_it_nothing(program, jail):
    tests = "\n".join(f"assert f({i}) == {i + 1}" for i in range(110))
    wrong = program.replace("x + 1", "x + 2")
    assert unit_tests(["", ""], [program, wrong], tests=[tests, tests]) == [1.0, 0.0]


@needs
@pytest.mark.parametrize(
    "attempt",
    [
        "import sys\nword = sys.stdin.read()\nprint()\nprint(word[::-1], end='')\nraise SystemExit(0)",
        "import os, sys\nprint(sys.stdin.read()[::-1], flush=True)\nos._exit(0)",
        "import sys\nprint(sys.stdin.read()[::-1], file=sys.stderr)\nraise SystemExit(0)",
        "import atexit\natexit.register(lambda: print('a' * 32))\nassert False",
    ],
)
def test_printing_proves_nothing(attempt, jail):
    assert unit_tests([""], [attempt], tests=["assert False"]) == [0.0]


@needs
def test_tests_may_be_a_list_of_texts():
    """As MBPP has them."""
    listed = [["assert f(1) == 2", "assert f(2) == 3"], ["assert f(1) == 2", "assert f(2) == 4"], []]
    assert unit_tests([""] * 3, [RIGHT] * 3, tests=listed) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("given", [5, None, {"a": "b"}, ["assert f(1) == 2", 7]])
def test_tests_of_another_type_are_refused_by_the_name_of_their_column(given):
    with pytest.raises(SteersmanError, match=r"column `tests` holds .*; give a text or a list of texts"):
        unit_tests(["", ""], [RIGHT, RIGHT], tests=["assert True", given])


def test_the_last_fence_is_the_program():
    assert program_of(GOOD) == "def f(x):\n    return x + 1\n"
    assert program_of("x = 1") == "x = 1"
    assert program_of("```\na\n``` or ```py\nb\n```") == "b\n"


def test_a_machine_that_can_do_neither_refuses(monkeypatch):
    """No jail's tools are there; and then, none of them works."""
    monkeypatch.setattr(sandbox, "_jail", sandbox._jail.__wrapped__)
    monkeypatch.setattr(sandbox, "broken", sandbox.broken.__wrapped__)
    for broken in (
        {"needs": ("no-such-tool",)},
        {"command": lambda *_: ["sh", "-c", "echo no namespaces; exit 1"]},
    ):
        monkeypatch.setattr(sandbox, "JAILS", [replace(jail, **broken) for jail in JAILS])
        with pytest.raises(SteersmanError, match=r"(?s)bubblewrap .*; namespaces .* not run without one"):
            run_python("print(1)")
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "s390x")
        with pytest.raises(SteersmanError, match="no filter of system calls is known for s390x"):
            run_python("print(1)")
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(SteersmanError, match="darwin"):
        run_python("print(1)")
