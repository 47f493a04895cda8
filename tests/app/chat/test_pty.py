"""`edgespec chat` as a process, on a terminal and on pipes, with a scripted server instead of a model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_servers import Script, serving, words
from hostile import EVIL
from terminals import Terminal

COMMAND = [sys.executable, "-m", "edgespec.app.cli.main", "chat"]
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*forkpty:DeprecationWarning")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    monkeypatch.setenv("EDGESPEC_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("EDGESPEC_CONFIG", str(tmp_path / "config"))
    with serving() as script:
        yield script


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        if not terminal.ended:
            os.kill(terminal.pid, signal.SIGKILL)
            os.waitpid(terminal.pid, 0)


def test_a_day_in_a_terminal(script: Script, terminals: list[Terminal]) -> None:
    """Ask, search, quit; then continue, with a kill in the middle of an answer."""
    script.answer = words("The capital ", "is Par", "is.")
    chat = Terminal([*COMMAND, "--server", script.url])
    terminals.append(chat)
    chat.until(lambda text: "Enter sends" in text)
    chat.write(b"Which capital?\r")
    chat.until(lambda text: "The capital is Paris." in text and "ready" in text)
    chat.write(b"\x02")  # Ctrl+B
    chat.until(lambda text: "Search" in text)
    chat.write(b"capital")
    chat.until(lambda text: "Enter open" in text and text.count("Which capital?") >= 3)
    chat.write(b"\x02\x11")
    assert chat.wait() == 0
    assert b"\x1b[?1049l" in chat.raw

    script.answer = words(*["more "] * 1000, pause=0.02)
    chat = Terminal([*COMMAND, "--server", script.url, "-c"])
    terminals.append(chat)
    chat.until(lambda text: "The capital is Paris." in text)
    chat.write(b"Again?\r")
    chat.until(lambda text: text.count("more") > 40)
    os.kill(chat.pid, signal.SIGKILL)
    os.waitpid(chat.pid, 0)
    chat.ended = True

    script.answer = words("Back.")
    chat = Terminal([*COMMAND, "--server", script.url, "--open", "1"])
    terminals.append(chat)
    text = chat.until(lambda text: "more more" in text and "stopped: Ctrl+T" in text)
    assert text.count("more") > 20
    chat.write(b"And now?\r")
    chat.until(lambda text: "Back." in text and "ready" in text)
    sent = [message["content"] for message in script.asked[-1]["messages"]]
    assert sent[:3] == ["Which capital?", "The capital is Paris.", "Again?"]
    assert sent[3].startswith("more more")
    chat.write(b"\x11")
    assert chat.wait() == 0


def test_no_hostile_byte_reaches_the_terminal(script: Script, terminals: list[Terminal]) -> None:
    marked = [evil.encode("utf-8", "replace").decode() for evil in EVIL]
    script.answer = words(*"".join(f"<{evil}>" for evil in marked), "\n\nDONE ", pause=0.001)
    chat = Terminal([*COMMAND, "--server", script.url])
    terminals.append(chat)
    chat.until(lambda text: "Enter sends" in text)
    chat.write(b"Steer!\r")
    chat.until(lambda text: "DONE" in text and "ready" in text)
    chat.write(b"\x07")  # the engine panel
    chat.pump(0.6)
    chat.write(b"\x11")
    assert chat.wait() == 0
    for sequence in ("\x1b]52", "\x1b[6n", "\x1b]0;title", "\x1bP0;0", "\x9b", "\u202e"):
        assert sequence.encode() not in chat.raw


def test_without_color_there_is_none(
    script: Script, terminals: list[Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    script.answer = words("```python\nimport os\n```\n")
    chat = Terminal([*COMMAND, "--server", script.url])
    terminals.append(chat)
    chat.until(lambda text: "Enter sends" in text)
    chat.write(b"Colors?\r")
    chat.until(lambda text: "import os" in text and "ready" in text)
    colors = {cell.fg for row in chat._screen.buffer.values() for cell in row.values()}
    hexes = [color for color in colors if len(color) == 6 and set(color) <= set("0123456789abcdef")]
    assert all(max(bytes.fromhex(c)) - min(bytes.fromhex(c)) < 24 for c in hexes)  # shades of gray
    chat.write(b"\x11")
    assert chat.wait() == 0


def test_plain_on_pipes(script: Script) -> None:
    script.answer = words("A \x1b[31mred", " word.")
    run = subprocess.run(
        [*COMMAND, "--plain", "--server", script.url], input="Hi\n/rename Red\n/list\n", capture_output=True,
        text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "A [31mred word.\n" in run.stdout
    assert "- 1: Red\n" in run.stdout
    assert "\x1b" not in run.stdout
    assert run.stderr == ""


def test_a_screen_needs_a_terminal(script: Script) -> None:
    run = subprocess.run(COMMAND, input="", capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "edgespec chat --plain" in run.stderr
