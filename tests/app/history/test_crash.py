"""A writer is killed at random moments: everything that it acknowledged is stored, and the file is intact."""

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
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgespec.app.history.store import History

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

# Imports once, and forks a writer for every line on standard input. A writer acknowledges what it has stored.
_WRITERS = """
import json, os, random, sys
from pathlib import Path
from edgespec.app.history.store import History

def acknowledge(*what):
    os.write(1, (json.dumps(what) + "\\n").encode())

def write(path, seed):
    rng = random.Random(seed)
    words = lambda: " ".join(str(rng.random()) for _ in range(rng.choice((3, 30, 1000))))
    history = History(path)
    doomed = history.new()
    while True:
        about = history.new()
        for _ in range(4):
            text = words()
            question = history.append(about.id, "user", text)
            acknowledge("message", question.id, text)
            answer, text = history.append(about.id, "assistant", state="partial"), ""
            for _ in range(5):
                more = words()
                history.append_text(answer.id, more)
                text += more
                acknowledge("begins", answer.id, text)
            history.finish(answer.id, rng.choice(("complete", "stopped")))
            acknowledge("message", answer.id, text)
            other = history.append(about.id, "assistant", text, parent=question.id)
            history.switch(answer.id)
            acknowledge("head", about.id, answer.id)
        history.rename(about.id, str(seed))
        acknowledge("title", about.id, str(seed))
        history.append(doomed.id, "user", words())
        history.purge(doomed.id)
        acknowledge("gone", doomed.id)
        doomed = history.new()

for line in sys.stdin:
    path, seed = json.loads(line)
    child = os.fork()
    if not child:
        write(Path(path), seed)
    acknowledge("started", child)
    acknowledge("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


class Writers:
    """Runs one writer after another, and kills each."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WRITERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._rest = b""

    def run(self, path: Path, seed: int, seconds: float, busy: bool = True) -> list[list[object]]:
        """Return everything that a writer acknowledged before it was killed.

        That is `seconds` after its first acknowledgement, or after it was started if not `busy`.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(path), seed]).encode() + b"\n")
        acknowledged: list[list[object]] = []
        until, victim = float("inf"), 0
        while True:
            for what in self._read(min(until - time.monotonic(), 1.0) if victim else 1.0):
                if what[0] == "started":
                    victim = int(str(what[1]))
                elif what[0] == "ended":
                    assert what[1] == -signal.SIGKILL
                    return acknowledged
                else:
                    acknowledged.append(what)
                if (acknowledged or not busy) and until == float("inf"):
                    until = time.monotonic() + seconds
            if victim and time.monotonic() >= until:
                os.kill(victim, signal.SIGKILL)
                victim = 0

    def _read(self, seconds: float) -> Iterator[list[object]]:
        assert self._process.stdout is not None
        if select.select([self._process.stdout], [], [], max(seconds, 0.0))[0]:
            *lines, self._rest = (self._rest + self._process.stdout.read(1 << 20)).split(b"\n")
            yield from map(json.loads, lines)
        assert self._process.poll() is None

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


@pytest.fixture
def writers() -> Iterator[Writers]:
    writers = Writers()
    yield writers
    writers.close()


def test_what_was_acknowledged_survives_fifty_kills(writers: Writers, tmp_path: Path) -> None:
    rng, path = random.Random(6), tmp_path / "history.db"
    texts: dict[int, str] = {}
    for seed in range(50):
        acknowledged = writers.run(path, seed, rng.uniform(0.0, 0.1), busy=seed % 5 > 0)
        started: dict[int, str] = {}
        for kind, number, *value in acknowledged:
            assert isinstance(number, int)
            if kind == "message":
                texts[number] = str(value[0])
                started.pop(number, None)
            elif kind == "begins":
                started[number] = str(value[0])
        heads = {number: value for kind, number, *value in acknowledged if kind == "head"}
        with sqlite3.connect(path) as db:
            assert db.execute("PRAGMA quick_check").fetchall() == [("ok",)]
        db.close()
        with History(path) as history:
            assert history.note == ""
            for number, text in started.items():
                message = history.message(number)
                assert message.text.startswith(text)
                assert message.state != "partial"
            for number, (head,) in heads.items():
                shown = history.branch(int(str(number)))
                place = [message.id for message in shown].index(int(str(head)))
                assert shown[place].places == 2
            for kind, number, *value in acknowledged:
                if kind == "title":
                    assert history.conversation(int(str(number))).title == value[0]
                elif kind == "gone":
                    assert history.messages(int(str(number))) == []
            recent = [number for kind, number, *_ in acknowledged if kind == "message"]
            assert all(history.message(int(str(number))).text == texts[int(str(number))] for number in recent)
    assert len(texts) > 100
    with History(path) as history:
        assert {number: history.message(number).text for number in texts} == texts
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    assert db.execute("SELECT count(*) FROM pieces").fetchone() == (0,)
    for index in ("messages_words", "conversations_words"):  # raises where the index differs from the texts
        db.execute(f"INSERT INTO {index}({index}, rank) VALUES ('integrity-check', 1)")
    db.rollback()
    db.close()


def test_a_chat_that_is_killed_does_not_stop_another(writers: Writers, tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    with History(path) as history:
        about = history.new("mine")
        answer = history.append(about.id, "assistant", state="partial")
        for seed in range(5):
            history.append_text(answer.id, f"{seed} ")
            assert writers.run(path, seed, 0.2)
            assert history.message(answer.id).state == "partial"  # its writer is running
        history.finish(answer.id)
        assert history.message(answer.id).text == "0 1 2 3 4 "
