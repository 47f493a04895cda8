"""`edgespec chat` in a real pseudo-terminal on the real starter model, read through a terminal emulator."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyte
import pytest

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


@pytest.fixture
def chat(starter_path: Path) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "edgespec.app.cli", "chat", "-m", "smollm2-135m"]
    terminal = Terminal([*command, "--temperature", "0", "--max-tokens", "200"])
    yield terminal
    if not terminal.ended:
        os.kill(terminal.pid, signal.SIGKILL)
        os.waitpid(terminal.pid, 0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*forkpty:DeprecationWarning")  # the child execs at once
def test_a_question_is_answered_an_answer_stopped_and_the_terminal_given_back(chat):
    chat.until(lambda text: "Enter sends" in text)
    chat.write(b"What is the capital of France? One sentence.\r")  # before the model is there
    chat.until(lambda text: "ready" in text and "tokens/s" in text and "Paris" in text)
    chat.write(b"Write a very long story about a lighthouse and its keeper.\r")
    chat.until(lambda text: "writing" in text)
    chat.pump(0.5)
    chat.write(b"\x1b")
    chat.until(lambda text: "stopped" in text)
    chat.write(b"Write another very long story.\r")
    chat.until(lambda text: "writing" in text)
    chat.write(b"\x11")
    assert chat.wait() == 0
    assert b"\x1b[?1049l" in chat.raw  # back on the ordinary screen
    assert b"Traceback" not in chat.raw
