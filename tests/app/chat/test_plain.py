"""The chat line by line: same conversations, no control sequence ever."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from chats import FakeEngine

from edgespec.app.chat.history_worker import HistoryWorker
from edgespec.app.chat.plain import PlainChat
from edgespec.app.chat.session import Session
from edgespec.app.history.store import History
from edgespec.core import EdgespecError


def talk(path: Path, engine: FakeEngine, *lines: str, reopen: int | None = None) -> str:
    """What is written when `lines` are typed."""
    typed: Iterator[str] = iter(lines)
    written: list[str] = []

    def read(prompt: str) -> str:
        try:
            line = next(typed)
        except StopIteration:
            raise EOFError from None
        written.append(f"{prompt}{line}\n")
        return line

    session = Session(lambda progress: engine, "fake", system="Be kind.", store=HistoryWorker(path))
    assert PlainChat(session, read, written.append).run(reopen) == 0
    assert engine.closed
    return "".join(written)


def test_questions_are_answered_and_kept(tmp_path: Path) -> None:
    engine = FakeEngine(["Hel", "lo.\x1b[31m"], notes=["A\x9b note."])
    said = talk(tmp_path / "h.db", engine, "First \\", "line two", "", "Second")
    assert said.count("Hello.[31m\n") == 2
    assert "- A note." in said
    assert [m["content"] for m in engine.asked[1]] == [
        "Be kind.",
        "First \nline two",
        "Hello.\x1b[31m",
        "Second",
    ]
    again = talk(tmp_path / "h.db", FakeEngine(), reopen=0)
    assert "You: First \nline two\nHello.[31m\nYou: Second\nHello.[31m\n" in again
    assert not set(map(ord, said + again)) & ({*range(0x20)} - {10} | {*range(0x7F, 0xA0)})


def test_every_command(tmp_path: Path) -> None:
    path, engine = tmp_path / "h.db", FakeEngine(["One."])
    markdown, data = tmp_path / "o.md", tmp_path / "o.json"
    said = talk(
        path, engine, "Alpha heron", "/again", "/branch", "/edit", "/edit Beta", "/rename New title", "/pin",
        f"/export {markdown}", f"/export {data}", "/new", "Gamma", "/search heron", "/list", "/delete",
        "/undo", f"/import {data}", "/import nowhere", "/open 1", "/open 99", "/continue", "/help",
        "/nonsense", "//slash", "/quit", "never",
    )  # fmt: skip
    assert "branch 2 of 2" in said
    assert "branch 1 of 2" in said
    assert "- the last question: Alpha heron" in said
    assert "- 1: New title: Alpha heron" in said
    assert "- 1 pinned: New title" in said
    assert "- 2: Gamma" in said
    assert "deleted; /undo" in said
    assert "- conversation 2: Gamma" in said
    assert "- imported: 1" in said
    assert "nowhere" in said
    assert "not in the history any more" in said
    assert "- nothing to do for /nonsense" in said
    assert engine.asked[-1][-1]["content"] == "/slash"
    assert "never" not in said
    assert json.loads(data.read_text())
    assert "Beta" in markdown.read_text()
    with History(path) as history:
        assert len(history.conversations()) == 3


def test_outgrown_and_dropped(tmp_path: Path) -> None:
    engine = FakeEngine(context_length=80)
    said = talk(tmp_path / "h.db", engine, "a", "b", "c", "d", "/drop 1")
    assert "the context holds 80" in said
    assert "- /drop 1 leaves out the first 1 questions and answers" in said
    assert [m["content"] for m in engine.asked[3] if m["role"] == "user"] == ["b", "c", "d"]


def test_a_model_that_does_not_load_ends_it(tmp_path: Path) -> None:
    def load(progress: object) -> FakeEngine:
        raise EdgespecError("No such model.")

    written: list[str] = []
    session = Session(load, store=HistoryWorker(tmp_path / "h.db"))
    assert PlainChat(session, lambda prompt: pytest.fail("asked"), written.append).run() == 1
    assert "- No such model.\n" in written
