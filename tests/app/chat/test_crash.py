"""A chat is killed at random moments: everything that it had shown is stored, and the file is intact."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgespec.app.history.store import History

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

# The whole chat except the model. Imports once, and forks a chat for every line it reads. A chat that
# asks for the next line has shown everything before as finished; a question with an answer was shown as sent.
_CHATS = """
import json, os, random, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from chats import FakeModel
from edgespec.app.chat.plain import PlainChat
from edgespec.app.chat.session import Session
from edgespec.app.chat.history_worker import HistoryWorker
import edgespec.app.chat.chat_model, edgespec.app.history.store, edgespec.sampling

def acknowledge(*what):
    os.write(1, (json.dumps(what) + "\\n").encode())

def chat(path, seed):
    rng = random.Random(seed)
    engine = FakeModel(context_length=1 << 30)  # a context overflow would wait for the user
    session = Session(lambda progress: engine, history=HistoryWorker(path))
    asked = 0

    def words():
        return " ".join(str(rng.random()) for _ in range(rng.choice((1, 10, 200))))

    def read(prompt):
        nonlocal asked
        for item in session.items:
            acknowledge(item.role, item.id, item.text, item.state)
        asked += 1
        engine.pieces = [words() + " " for _ in range(rng.choice((1, 20)))]
        engine.pause = rng.choice((0, 0.002))
        choice = rng.random()
        if choice < 0.1:
            return "/new"
        if choice < 0.2 and session.items:
            return "/regenerate"
        if choice < 0.3 and session.items:
            return "/edit " + words()
        return words()

    def write(text):
        if session.generating is not None and session.generating.parent is not None:
            question = session.generating.parent
            acknowledge("user", question.id, question.text, "complete")

    PlainChat(session, read, write).run(reopen=0)

for line in sys.stdin:
    path, seed = json.loads(line)
    child = os.fork()
    if not child:
        try:
            chat(Path(path), seed)
        finally:
            os._exit(3)
    acknowledge("started", child)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(1, b"\\n")  # its last line may be incomplete
    acknowledge("ended", status)
"""


def killed(chats: subprocess.Popen[bytes], path: Path, seed: int, seconds: float) -> list[list[str]]:
    """Return what a chat acknowledged before it was killed, `seconds` after its first line."""
    assert chats.stdin is not None
    assert chats.stdout is not None
    chats.stdin.write(json.dumps([str(path), seed]).encode() + b"\n")
    heard: list[list[str]] = []
    victim, until, rest, torn = 0, float("inf"), b"", False
    while True:
        if select.select([chats.stdout], [], [], 0.005)[0]:
            *lines, rest = (rest + os.read(chats.stdout.fileno(), 1 << 20)).split(b"\n")
            for line in filter(None, lines):
                try:
                    what = json.loads(line)
                except ValueError:  # not acknowledged completely
                    torn = True
                    continue
                assert what[0] == "ended" or not torn
                if what[0] == "started":
                    victim, until = what[1], time.monotonic() + seconds + 30 * (seed % 5 > 0)
                elif what[0] == "ended":
                    assert what[1] == -signal.SIGKILL
                    return heard
                else:
                    heard.append(what)
                    until = min(until, time.monotonic() + seconds)
        assert chats.poll() is None
        if victim and time.monotonic() >= until:
            os.kill(victim, signal.SIGKILL)
            victim, until = 0, float("inf")


def test_what_the_chat_acknowledged_survives_fifty_kills(tmp_path: Path) -> None:
    rng, path = random.Random(9), tmp_path / "history.db"
    shown: dict[int, tuple[str, str]] = {}
    command = [sys.executable, "-c", _CHATS, str(Path(__file__).parents[2] / "support")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as chats:
        for seed in range(50):
            for role, number, text, state in killed(chats, path, seed, rng.uniform(0.0, 0.4)):
                assert state in ("complete", "stopped")
                shown[int(number)] = (role, text)
            with sqlite3.connect(path) as db:
                assert db.execute("PRAGMA quick_check").fetchall() == [("ok",)]
            db.close()
            with History(path) as history:
                assert history.note == ""
                kept = {
                    message.id: (message.role, message.text)
                    for about in history.conversations(limit=-1)
                    for message in history.messages(about.id)
                }
            assert {number: kept.get(number) for number in shown} == shown
        assert chats.stdin is not None
        chats.stdin.close()
    assert len(shown) > 100
    assert {role for role, _ in shown.values()} == {"user", "assistant"}
