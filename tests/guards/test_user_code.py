"""What code of the user's does to the process: exits, hangs, closed streams."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch

from steersman.guards.functions import load_function
from steersman.guards.user_code import leave_now, no_sudden_end, user_code
from steersman.run.stop_request import StopRequest
from steersman.types import SteersmanError

LEAVE = leave_now


def stubborn_exit():
    try:
        os._exit(0)
    except Exception:
        return


def stubborn_hang():
    while True:
        with suppress(Exception):
            time.sleep(1000)


@pytest.fixture(autouse=True)
def no_other_block():
    """A thread that a test of another file has given up may still be in its block."""
    until = time.monotonic() + 30
    while os._exit is not LEAVE and time.monotonic() < until:
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda: sys.exit(0), r"sys\.exit\(0\)"),
        (lambda: sys.exit("bye"), r"sys\.exit\(bye\)"),
        (sys.exit, r"sys\.exit\(\)"),
        (lambda: os._exit(0), r"os\._exit\(0\)"),
        (stubborn_exit, r"os\._exit\(0\)"),
    ],
)
def test_an_exit_is_an_error_with_a_name(act, told):
    with (
        pytest.raises(SteersmanError, match=rf"^the thing: it asked the process to end, by {told}"),
        user_code("the thing"),
    ):
        act()
    assert os._exit is LEAVE


def test_ctrl_c_is_told_from_an_interrupt_that_the_code_raises():
    with StopRequest() as stop:
        with pytest.raises(SteersmanError, match=r"the thing: .* by KeyboardInterrupt"), user_code("the thing"):
            raise KeyboardInterrupt
        assert not stop
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), user_code("the thing"):
            signal.raise_signal(signal.SIGINT)


def test_blocks_in_several_threads_share_the_guard_and_the_last_one_lifts_it():
    """They begin a, b and end a, b: if each put back what it found, b would lose its guard and then leave a's."""
    begun, over, found = threading.Event(), threading.Event(), []

    def second():
        try:
            with no_sudden_end("b"):
                begun.set()
                over.wait(5)
                os._exit(3)
        except SteersmanError as error:
            found.append(str(error))

    thread = threading.Thread(target=second)
    with no_sudden_end("a"):
        thread.start()
        assert begun.wait(5)
    assert os._exit is not LEAVE
    over.set()
    thread.join()
    assert "b: it asked the process to end, by os._exit(3)" in found[0]
    assert os._exit is LEAVE


def test_a_forked_child_leaves_as_ever():
    with user_code("the thing"):
        child = os.fork()
        if child == 0:
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize("hang", [lambda: time.sleep(1000), stubborn_hang])
def test_a_hang_ends_at_the_limit(hang):
    before, start = signal.getsignal(signal.SIGUSR2), time.perf_counter()
    told = pytest.raises(SteersmanError, match=r"the thing: it took longer than its limit of 0\.2 seconds")
    with told, user_code("the thing", 0.2):
        hang()
    assert time.perf_counter() - start < 1.0
    assert signal.getsignal(signal.SIGUSR2) is before


@pytest.mark.usefixtures("ends_soon")
def test_a_search_that_never_ends_is_ended_though_it_keeps_pythons_lock():
    """No other thread of the process runs meanwhile."""
    start = time.perf_counter()
    told = pytest.raises(SteersmanError, match=r"the thing: it took longer than its limit of 0\.2 seconds")
    with told, user_code("the thing", 0.2):
        re.search(r"(\d+\s?)+x", "1" * 60)
    assert time.perf_counter() - start < 10


def test_the_blocks_own_alarm_is_left_to_it():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        with user_code("the thing", 30.0):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            time.sleep(0.5)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert rung == [1]


def test_what_is_done_in_time_and_other_errors_pass():
    with user_code("the thing", 30.0):
        pass
    with pytest.raises(ZeroDivisionError), user_code("the thing", 30.0):
        _ = 1 / 0


def test_closed_streams_are_put_back():
    program = """
import os, sys
from steersman.guards.user_code import user_code
for harm in (lambda: os.close(1), lambda: sys.stdout.close(), lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 1),
             lambda: setattr(sys, "stdout", None), lambda: os.close(2)):
    with user_code("x"):
        harm()
    print("alive", flush=True)
    print("well", file=sys.stderr, flush=True)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["alive"] * 5
    assert found.stderr.split() == ["well"] * 5


def test_a_module_that_exits_while_it_is_imported_is_named(tmp_path):
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(SteersmanError, match=r"importing .*leaves\.py: it asked the process to end, by sys\.exit"):
        load_function(f"{tmp_path / 'leaves.py'}:f")


def test_settings_of_the_process_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    folder, threads = os.getcwd(), torch.get_num_threads()
    with user_code("reward 'r'"):
        os.chdir(tmp_path)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(threads + 1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    assert os.getcwd() == folder
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_num_threads() == threads
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
