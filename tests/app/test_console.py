"""Ctrl-C: a call, a stopped progress, or an exit with one line."""

from __future__ import annotations

import signal
import threading

import pytest

from edgespec.app.console import interruptible, on_ctrl_c, stopped_by_ctrl_c
from edgespec.core import Cancelled


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_calls_as_often_as_it_is_pressed() -> None:
    calls: list[int] = []
    with on_ctrl_c(lambda: calls.append(1)):
        press()
        press()
    assert len(calls) == 2
    with pytest.raises(KeyboardInterrupt):
        press()


def test_with_once_the_second_raises() -> None:
    calls: list[int] = []
    with on_ctrl_c(lambda: calls.append(1), once=True):
        press()
        with pytest.raises(KeyboardInterrupt):
            press()
    assert len(calls) == 1


def test_progress_is_stopped() -> None:
    shown: list[float] = []
    with stopped_by_ctrl_c(lambda _, fraction: not shown.append(fraction)) as progress:
        assert progress("a", 0.1)
        press()
        assert not progress("a", 0.2)
    assert shown == [0.1, 0.2]


def test_a_thread_without_signals_goes_on() -> None:
    done: list[bool] = []

    def work() -> None:
        with on_ctrl_c(lambda: None):
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


@pytest.mark.parametrize("error", [KeyboardInterrupt, Cancelled])
def test_an_interrupted_command_says_so_in_a_line(
    error: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended, interruptible():
            raise error
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "edgespec: stopped; nothing was changed\n"
