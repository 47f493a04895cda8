"""Run a slow command and show its progress on one line: progress.py TITLE LOG COMMAND...

The command's output goes to LOG. Progress is parsed from it: the steps that ninja or make count, and the
packages that pip downloads. Uses the standard library only, because it runs before any package is installed.

Its exit status is the command's, or 128 plus the number of a signal. Ctrl-C and SIGTERM end all processes
that the command started.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import BinaryIO

_NINJA = re.compile(r"^\s*\[(\d+)/(\d+)\] ")
_MAKE = re.compile(r"^\s*\[ *(\d+)%\] ")
_COLLECTING = re.compile(r"^\s*Collecting ([A-Za-z0-9_.-]+)")
_DOWNLOADING = re.compile(r"^\s*Downloading .*?([^/\s]+\.(?:whl|tar\.gz)\S*) \(([\d.]+ [kMG]?B)\)")
_BYTES = re.compile(r"^Progress (\d+) of (\d+)$")
_BUILDING = re.compile(r"^\s*Building wheel for ([A-Za-z0-9_.-]+)")
_PREPARING = re.compile(r"^\s*(Installing build dependencies|Getting requirements|Preparing metadata)\b")
_CONFIGURING = re.compile(r"^\s*\*\*\* Configuring CMake")
_INSTALLING = re.compile(r"^\s*Installing collected packages: (.*)")
_QUIET = 15.0  # seconds between two lines without a terminal
_TERMINAL = 0.1  # seconds between two updates on a terminal
_TAIL = 12  # lines of the log to show after a failure
_PATIENCE = 5.0  # seconds for a command to clean up after itself


class Status:
    """The current step of the command, parsed from its output."""

    def __init__(self) -> None:
        self.text = "starting"
        self._packages = 0
        self._file = ""

    def read(self, line: str) -> None:
        if found := _NINJA.match(line):
            done, steps = int(found[1]), int(found[2])
            self.text = f"step {done} of {steps} ({100 * done // max(1, steps)}%)"
        elif found := _MAKE.match(line):
            self.text = f"{found[1]}%"
        elif found := _COLLECTING.match(line):
            self._packages += 1
            self.text = f"package {self._packages}: {found[1]}"
        elif found := _DOWNLOADING.match(line):
            self._file = f"downloading {found[1].split('-')[0]} ({found[2]})"
            self.text = self._file
        elif found := _BYTES.match(line):
            self.text = f"{self._file}: {100 * int(found[1]) // max(1, int(found[2]))}%"
        elif found := _BUILDING.match(line):
            self.text = f"building {found[1]}"
        elif found := _PREPARING.match(line):
            self.text = found[1].lower()
        elif _CONFIGURING.match(line):
            self.text = "configuring"
        elif found := _INSTALLING.match(line):
            self.text = f"installing {len(found[1].split(','))} packages"


class Line:
    """One line on standard error: overwritten on a terminal, repeated from time to time elsewhere."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._start = self._last = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._shown = False

    def show(self, text: str) -> None:
        now = time.monotonic()
        if self._shown and now - self._last < (_TERMINAL if self._terminal else _QUIET):
            return
        self._last, self._shown = now, True
        line = f"edgespec: {self._title}: {_plain(text)}, {self.elapsed()}"
        if self._terminal:
            width = max(20, shutil.get_terminal_size().columns - 1)
            sys.stderr.write(f"\r\x1b[K{line[:width]}")
        else:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def end(self, text: str) -> None:
        sys.stderr.write(("\r\x1b[K" if self._terminal else "") + f"edgespec: {self._title}: {text}\n")
        sys.stderr.flush()

    def elapsed(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._start), 60)
        return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def main(title: str, log: Path, command: list[str]) -> int:
    """Run `command` and return its exit status, 1 if it cannot be run, 128 plus the number of a signal."""

    def stop(number: int, _frame: object) -> None:
        for one in signals:
            signal.signal(one, signal.SIG_IGN)  # the first signal is being handled
        raise KeyboardInterrupt(number)

    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    line, tail = Line(title), deque[str](maxlen=_TAIL)
    process = None
    try:
        for one in signals:
            if signal.getsignal(one) != signal.SIG_IGN:
                signal.signal(one, stop)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb", buffering=0) as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            _follow(process, file, line, tail)
        code = process.wait()
    except KeyboardInterrupt as signaled:
        if process is not None:
            _end(process)
        line.end("canceled")
        return 128 + int(signaled.args[0])
    except OSError as error:
        line.end(f"failed: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        return 1
    finally:
        if process is not None:
            _end(process)
    if code == 0:
        line.end(f"done in {line.elapsed()}")
        return 0
    line.end(f"failed after {line.elapsed()}; the log is {log} and ends with")
    for text in tail:
        sys.stderr.write(f"  {_plain(text)[:200]}\n")
    return code if code > 0 else 128 - code


def _follow(process: subprocess.Popen[bytes], log: BinaryIO, line: Line, tail: deque[str]) -> None:
    """Copy the output of the process to `log`, its last lines to `tail`, and show its progress."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    status, rest = Status(), b""
    while (data := process.stdout.read(65536)) != b"":
        if data is None:  # nothing to read yet
            time.sleep(0.05)
        else:
            log.write(data)
            *lines, rest = (rest + data).replace(b"\r", b"\n").split(b"\n")
            for one in lines:
                status.read(one.decode(errors="replace"))
            tail.extend(text for one in lines if (text := one.decode(errors="replace")).strip())
        line.show(status.text)
    if rest.strip():
        tail.append(rest.decode(errors="replace"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process group, if it runs: with SIGINT first, on which pip removes its files."""
    if process.poll() is not None:
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE)


def _plain(text: str) -> str:
    """Return `text` without control characters."""
    return text.encode("ascii", "backslashreplace").decode().translate(dict.fromkeys((*range(32), 127)))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
