"""`make chat` as a newcomer runs it: a fresh clone, a fresh home, a terminal. Compiles and downloads.

What pip fetched before may be used again; nothing else of this user is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from terminals import Terminal

ROOT = Path(__file__).parent.parent.parent
SILENCE = 10.0
"""Seconds in which a newcomer must have seen something change, on a busy machine."""
FIRST_SCREEN = "Enter sends"


class Newcomer(Terminal):
    """Notes the longest time in which nothing was written."""

    silence = 0.0
    _heard = 0

    def until(self, seen: Callable[[str], bool], seconds: float = 1800.0) -> str:
        start = last = time.monotonic()
        while not seen(self.text()):
            assert time.monotonic() - start < seconds, self.text()
            assert self.pump(0.1), self.text()
            if len(self.raw) > self._heard:
                self.silence = max(self.silence, time.monotonic() - last)
                last, self._heard = time.monotonic(), len(self.raw)
        return self.text()


@pytest.fixture
def make_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Newcomer]]:
    """Starts `make chat` in the clone; whatever of it runs at the end is killed."""
    clone, home = tmp_path / "edgespec", tmp_path / "home"
    home.mkdir()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    listed = subprocess.run(["pip", "cache", "dir"], capture_output=True, text=True)
    monkeypatch.setenv("PIP_CACHE_DIR", listed.stdout.strip() or str(Path.home() / ".cache" / "pip"))
    monkeypatch.setenv("HOME", str(home))
    for name in os.environ:
        if name.startswith(("EDGESPEC_", "XDG_", "PYTEST_", "VIRTUAL_ENV")):
            monkeypatch.delenv(name)
    began: list[Newcomer] = []

    def start() -> Newcomer:
        began.append(Newcomer(["/usr/bin/env", "make", "-C", str(clone), "chat"]))
        return began[-1]

    yield start
    for one in began:
        if not one.ended:
            os.killpg(one.pid, signal.SIGHUP)
            os.waitpid(one.pid, 0)


def answered(text: str) -> bool:
    """Completely, and right."""
    return "ready" in text and "tokens/s" in text and "capital of France is Paris" in " ".join(text.split())


@pytest.mark.timeout(2400)
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*forkpty:DeprecationWarning")
def test_the_first_answer_is_right(
    make_chat: Callable[[], Newcomer], capsys: pytest.CaptureFixture[str]
) -> None:
    times = {"start": time.monotonic()}
    chat = make_chat()
    for name, text in (
        ("environment", "creating the environment"),
        ("compiling", "compiling llama.cpp"),
        ("installing", "installing packages"),
        ("fetching", "fetching qwen2.5-coder-0.5b, 491 MB: the smallest that answers"),
        ("first screen", FIRST_SCREEN),
    ):
        chat.until(lambda shown, text=text: text in " ".join(shown.split()))
        times[name] = time.monotonic()
    chat.write(b"What is the capital of France?\r")
    chat.until(answered, 120.0)
    times["answer"] = time.monotonic()
    chat.write(b"\x11")
    assert chat.wait() == 0
    again = make_chat()
    begun = time.monotonic()
    screen = again.until(lambda text: FIRST_SCREEN in text)
    times["second start"] = time.monotonic() - begun + times["start"]
    assert "qwen2.5-coder-0.5b" in screen
    again.write(b"\x11")
    assert again.wait() == 0
    with capsys.disabled():
        for name, at in times.items():
            print(f"\n{name}: {at - times['start']:.1f} s", end="")
        print(f"\nlongest silence: {chat.silence:.1f} s")
    assert chat.silence < SILENCE
