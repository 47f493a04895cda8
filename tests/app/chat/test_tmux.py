"""`edgespec chat` inside tmux, with the starter model: from the first question to reopening."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
CHAT = [sys.executable, "-m", "edgespec.app.cli.main", "chat", "-m", "smollm2-135m", "--temperature", "0"]
PATIENCE = 120.0


class Tmux:
    """A separate server with one window."""

    def __init__(self, folder: Path, columns: int, rows: int) -> None:
        self._socket = str(folder / "tmux")
        self._run("-f", os.devnull, "new-session", "-d", "-x", str(columns), "-y", str(rows), "sh")

    def _run(self, *arguments: str) -> str:
        command = ["tmux", "-S", self._socket, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout

    def start(self, command: list[str]) -> None:
        # tmux sometimes misses the exit code of a program.
        self._run("respawn-window", "-k", f"{shlex.join(command)}; echo exit code $?; cat")

    def keys(self, *names: str) -> None:
        self._run("send-keys", *names)

    def text(self, text: str) -> None:
        self._run("send-keys", "-l", text)

    def screen(self) -> str:
        return self._run("capture-pane", "-p")

    def until(self, ready: Callable[[str], bool]) -> str:
        end = monotonic() + PATIENCE
        while not ready(screen := self.screen()):
            assert monotonic() < end, screen
            sleep(0.1)
        return screen

    def leave(self) -> None:
        self.keys("C-q")
        assert "exit code 0" in self.until(lambda screen: "exit code" in screen)

    def close(self) -> None:
        self._run("kill-server")


@pytest.fixture
def tmux(tmp_path: Path, starter_path: Path, request: pytest.FixtureRequest) -> Iterator[Tmux]:
    opened = Tmux(tmp_path, *request.param)
    yield opened
    opened.close()


def status(screen: str) -> str:
    return screen.rstrip().rpartition("\n")[2]


@pytest.mark.parametrize("tmux", [(80, 24), (140, 40)], ids=["80x24", "140x40"], indirect=True)
def test_a_day_on_the_real_model(tmux: Tmux, tmp_path: Path) -> None:
    folders = [f"{name}={tmp_path / name}" for name in ("EDGESPEC_DATA", "EDGESPEC_CONFIG")]
    chat = ["env", *folders, *CHAT]
    tmux.start(chat)
    tmux.until(lambda screen: "Enter sends" in screen)
    tmux.text("What is the capital of France? One sentence.")
    tmux.keys("Enter")
    screen = tmux.until(lambda screen: "ready" in status(screen) and "tokens/s" in status(screen))
    assert "Paris" in screen

    tmux.text("Write a very long story about a lighthouse and its keeper.")
    tmux.keys("Enter")
    tmux.until(lambda screen: "generating" in status(screen) and len(screen.split()) > 60)
    tmux.keys("Escape")
    tmux.until(lambda screen: "stopped" in status(screen) and "Ctrl+T continues" in screen)

    tmux.keys("C-r")
    tmux.until(lambda screen: "generating" in status(screen))
    tmux.keys("Escape")
    tmux.until(lambda screen: "stopped" in status(screen))
    tmux.keys("C-Up")
    tmux.until(lambda screen: "branch 2 of 2" in screen)

    tmux.keys("C-f")
    tmux.text("lighthouse")
    tmux.until(lambda screen: "Enter open" in screen and "and its keeper" in " ".join(screen.split()))
    tmux.keys("C-b")
    tmux.leave()

    tmux.start([*chat, "-c"])
    tmux.until(lambda screen: "ready" in status(screen) and "Ctrl+T continues" in screen)
    tmux.keys("C-Up")
    tmux.until(lambda screen: "branch 2 of 2" in screen)
    tmux.leave()
