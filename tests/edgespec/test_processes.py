"""Child processes: none outlives the block that started it."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from edgespec import processes
from edgespec.core import Cancelled

ENDLESS = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def started(monkeypatch):
    """The processes started meanwhile."""
    found = []
    popen = subprocess.Popen

    def start(*arguments, **options):
        found.append(popen(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    return found


def test_ctrl_c_while_a_process_is_being_started(started, monkeypatch):
    start = subprocess.Popen

    def interrupted(*arguments, **options):
        process = start(*arguments, **options)
        signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt), processes.child(ENDLESS):
        time.sleep(10)
    assert len(started) == 1
    assert started[0].returncode is not None


def test_ctrl_c_while_the_thread_is_being_started(started, monkeypatch):
    start, threads = threading.Thread.start, []

    def interrupted(thread):
        threads.append(thread)
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), processes.child(ENDLESS):
        pass
    threads[0].join()
    assert all(process.returncode is not None for process in started)


def test_an_error_in_the_block_ends_the_process(started):
    with pytest.raises(ZeroDivisionError), processes.child(ENDLESS):
        _ = 1 / 0
    assert started[0].returncode is not None


@pytest.mark.skipif(sys.platform == "win32", reason="there is no other way to end it")
def test_a_patient_block_lets_the_process_end_by_itself():
    program = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print(flush=True)\n"
    program += "while True: signal.pause()"
    with processes.child([sys.executable, "-c", program], 30, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
    assert process.returncode == 7
    with processes.child([*ENDLESS[:2], "import signal; " + program.replace("sys.exit(7)", "None")], 0.1,
                         stdout=subprocess.PIPE) as process:  # fmt: skip
        process.stdout.readline()
    assert process.returncode == -signal.SIGKILL


def test_a_command_that_cannot_start():
    with pytest.raises(FileNotFoundError), processes.child(["/missing/program"]):
        pass


def test_run_returns_the_exit_code_and_the_errors():
    program = "import sys; print('wrong', file=sys.stderr); sys.exit(3)"
    assert processes.run([sys.executable, "-c", program], lambda: True) == (3, "wrong\n")


def test_run_ends_the_process_when_tick_returns_false(started):
    with pytest.raises(Cancelled):
        processes.run(ENDLESS, lambda: False)
    assert started[0].returncode is not None
