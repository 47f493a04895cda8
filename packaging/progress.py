"""Runs a slow command and shows how far it is on one line: progress.py TITLE LOG COMMAND...

All that the command prints goes to LOG. What is shown is read from it: the steps that ninja or make count,
and the packages that pip fetches. Written for a bare Python: nothing is installed when it runs.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

_NINJA = re.compile(r"^\s*\[(\d+)/(\d+)\] ")
_MAKE = re.compile(r"^\s*\[ *(\d+)%\] ")
_COLLECTING = re.compile(r"^\s*Collecting ([A-Za-z0-9_.-]+)")
_DOWNLOADING = re.compile(r"^\s*Downloading .*?([^/\s]+\.(?:whl|tar\.gz)\S*) \(([\d.]+ [kMG]?B)\)")
_BYTES = re.compile(r"^Progress (\d+) of (\d+)$")
_BUILDING = re.compile(r"^\s*Building wheel for ([A-Za-z0-9_.-]+)")
_INSTALLING = re.compile(r"^\s*Installing collected packages: (.*)")
_QUIET = 15.0  # seconds between two lines where there is no terminal to write over
_TERMINAL = 0.1  # and where there is one
_TAIL = 12  # lines of the log that a failure shows


class Status:
    """What the command is doing, from the lines it prints."""

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
        elif found := _INSTALLING.match(line):
            self.text = f"installing {len(found[1].split(','))} packages"


class Line:
    """One line on standard error, written over on a terminal and repeated from time to time elsewhere."""

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
        line = f"edgespec: {self._title}: {text}, {self.elapsed()}"
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
    """The command's exit status."""
    line, status, tail = Line(title), Status(), deque[str](maxlen=_TAIL)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        rest = b""
        try:
            while True:
                data = process.stdout.read(65536)
                if data is None:  # nothing to read yet
                    time.sleep(0.05)
                elif not data:
                    break
                else:
                    file.write(data)
                    *lines, rest = (rest + data).replace(b"\r", b"\n").split(b"\n")
                    for one in lines:
                        text = one.decode(errors="replace")
                        status.read(text)
                        if text.strip():
                            tail.append(text)
                line.show(status.text)
            code = process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            line.end("cancelled")
            return 130
    if code == 0:
        line.end(f"done in {line.elapsed()}")
        return 0
    line.end(f"failed after {line.elapsed()}; the log is {log}; it ends with")
    for text in tail:
        sys.stderr.write(f"  {text.encode('ascii', 'backslashreplace').decode()[:200]}\n")
    return code if code > 0 else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
