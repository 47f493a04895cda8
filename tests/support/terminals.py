"""A process on a pseudo-terminal, read through a terminal emulator."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import termios
import time
from collections.abc import Callable

import pyte

PATIENCE = 60.0


class Terminal:
    """A child process on a pseudo-terminal of 80 by 24, and what its screen shows."""

    def __init__(self, arguments: list[str]) -> None:
        self._screen = pyte.Screen(80, 24)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""
        self.ended = False
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "xterm-256color", "COLORTERM": ""}
            os.execv(arguments[0], arguments)
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def write(self, data: bytes) -> None:
        os.write(self._fd, data)

    def pump(self, seconds: float) -> bool:
        """Read for that long; False at the end of the stream."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if select.select([self._fd], [], [], 0.02)[0]:
                try:
                    data = os.read(self._fd, 65536)
                except OSError:
                    return False
                self.raw += data
                # pyte prints the kitty keyboard protocol's switches instead of ignoring them
                self._stream.feed(data.replace(b"\x1b[>1u", b"").replace(b"\x1b[<u", b""))
        return True

    def text(self) -> str:
        return "\n".join(self._screen.display)

    def until(self, seen: Callable[[str], bool]) -> str:
        end = time.monotonic() + PATIENCE
        while not seen(self.text()):
            assert time.monotonic() < end, self.text()
            assert self.pump(0.05), self.text()
        return self.text()

    def wait(self) -> int:
        """The exit code, once the child has ended."""
        end = time.monotonic() + PATIENCE
        while self.pump(0.1):
            assert time.monotonic() < end, self.text()
        _, status = os.waitpid(self.pid, 0)
        os.close(self._fd)
        self.ended = True
        return os.waitstatus_to_exitcode(status)
