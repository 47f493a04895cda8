"""`edgespec chat` in a pseudo-terminal with the starter model, read through a terminal emulator."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from terminals import Terminal


@pytest.fixture
def chat(starter_path: Path) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "edgespec.app.cli.main", "chat", "-m", "smollm2-135m"]
    terminal = Terminal([*command, "--temperature", "0", "--max-tokens", "200"])
    yield terminal
    if not terminal.ended:
        os.kill(terminal.pid, signal.SIGKILL)
        os.waitpid(terminal.pid, 0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*forkpty:DeprecationWarning")  # the child execs at once
def test_a_question_is_answered_an_answer_stopped_and_the_terminal_restored(chat):
    chat.until(lambda text: "Enter sends" in text)
    chat.write(b"What is the capital of France? One sentence.\r")  # before the model is loaded
    chat.until(lambda text: "ready" in text and "tokens/s" in text and "Paris" in text)
    chat.write(b"Write a very long story about a lighthouse and its keeper.\r")
    chat.until(lambda text: "generating" in text)
    chat.pump(0.5)
    chat.write(b"\x1b")
    chat.until(lambda text: "stopped" in text)
    chat.write(b"Write another very long story.\r")
    chat.until(lambda text: "generating" in text)
    chat.write(b"\x11")
    assert chat.wait() == 0
    assert b"\x1b[?1049l" in chat.raw  # back on the main screen
    assert b"Traceback" not in chat.raw
