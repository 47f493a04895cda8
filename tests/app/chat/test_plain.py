"""The chat line by line: the same conversations, without control sequences."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chats import FakeModel, talk_plainly

from edgespec.app.chat.history_worker import HistoryWorker
from edgespec.app.chat.plain import PlainChat
from edgespec.app.chat.session import Session
from edgespec.app.history.store import History
from edgespec.app.settings import Settings
from edgespec.core import EdgespecError


def test_questions_are_answered_and_stored(tmp_path: Path) -> None:
    engine = FakeModel(["Hel", "lo.\x1b[31m"], notes=["A\x9b note."])
    output = talk_plainly(tmp_path / "h.db", engine, "First \\", "line two", "", "Second")
    assert output.count("Hello.[31m\n") == 2
    assert "- A note." in output
    assert [m["content"] for m in engine.asked[1]] == [
        "Be kind.",
        "First \nline two",
        "Hello.\x1b[31m",
        "Second",
    ]
    again = talk_plainly(tmp_path / "h.db", FakeModel(), reopen=0)
    assert "You: First \nline two\nHello.[31m\nYou: Second\nHello.[31m\n" in again
    assert not set(map(ord, output + again)) & ({*range(0x20)} - {10} | {*range(0x7F, 0xA0)})


def test_every_command(tmp_path: Path) -> None:
    path, engine = tmp_path / "h.db", FakeModel(["One."])
    markdown, data = tmp_path / "o.md", tmp_path / "o.json"
    output = talk_plainly(
        path, engine, "Alpha heron", "/again", "/branch", "/edit", "/edit Beta", "/rename New title", "/pin",
        f"/export {markdown}", f"/export {data}", "/new", "Gamma", "/search heron", "/list", "/delete",
        "/undo", f"/import {data}", "/import nowhere", "/open 1", "/open 99", "/continue", "/help",
        "/nonsense", "//slash", "/quit", "never",
    )  # fmt: skip
    assert "branch 2 of 2" in output
    assert "branch 1 of 2" in output
    assert "- the last question: Alpha heron" in output
    assert "- 1: New title: Alpha heron" in output
    assert "- 1 pinned: New title" in output
    assert "- 2: Gamma" in output
    assert "- deleted: /undo restores it" in output
    assert "- conversation 2: Gamma" in output
    assert "- imported 1 conversation\n" in output
    assert "nowhere" in output
    assert "no such conversation in the history" in output
    assert "- unknown command /nonsense: /help lists the commands" in output
    assert engine.asked[-1][-1]["content"] == "/slash"
    assert "never" not in output
    assert json.loads(data.read_text())
    assert "Beta" in markdown.read_text()
    with History(path) as history:
        assert len(history.conversations()) == 3


def test_a_conversation_that_is_too_long_is_trimmed(tmp_path: Path) -> None:
    engine = FakeModel(context_length=80)
    output = talk_plainly(tmp_path / "h.db", engine, "a", "b", "c", "d", "/drop 1")
    assert "- the conversation has 80 tokens, the context 80" in output
    assert "- /drop 1 leaves out the first question and its answer" in output
    assert [m["content"] for m in engine.asked[3] if m["role"] == "user"] == ["b", "c", "d"]


def test_commands_ask_for_what_is_missing(tmp_path: Path) -> None:
    settings = Settings(personas={"brief": "Be brief.", "long": "Be long."})
    engine = FakeModel()
    written = talk_plainly(
        tmp_path / "h.db", engine, "/rename", "/persona", "2", "Hi", "/rename", "Better title", "/rename", "",
        "/persona", "9", "/list", settings=settings,
    )  # fmt: skip
    assert "- this conversation is empty: send a message first" in written
    assert "- 2: brief: Be brief." in written
    assert "- persona: brief" in written
    assert engine.asked[0][0]["content"] == "Be brief."
    assert "- Title of the conversation, now 'Hi': an empty line changes nothing" in written
    assert "- no such choice '9': nothing is changed" in written
    assert "- 1: Better title" in written


def test_another_model_is_loaded(tmp_path: Path) -> None:
    second = FakeModel(["Second."])
    written = talk_plainly(
        tmp_path / "h.db", FakeModel(), "Hi", "/model other", "Again", "/mode",
        opener=lambda name: lambda progress: second,
    )  # fmt: skip
    assert "- loading other" in written
    assert [m["content"] for m in second.asked[0]] == ["Be kind.", "Hi", "Hello there.", "Again"]
    assert "- mode: performance" in written
    assert "- the server chooses the model" in talk_plainly(tmp_path / "h.db", FakeModel(), "/model")


@pytest.mark.parametrize("name", ["sidebar", "theme", "engine", "copy", "settings", "stop"])
def test_commands_of_the_screen_are_not_offered(tmp_path: Path, name: str) -> None:
    written = talk_plainly(tmp_path / "h.db", FakeModel(), "/help", f"/{name}")
    assert f"- unknown command /{name}:" in written
    assert f"\n/{name}" not in written
    assert "/regenerate" in written
    assert "Ctrl+P" not in written


@pytest.mark.parametrize("name", ["again", "branch", "list", "last"])
def test_old_names_still_work_and_are_hidden(tmp_path: Path, name: str) -> None:
    written = talk_plainly(tmp_path / "h.db", FakeModel(), "Hi", f"/{name}", "/help")
    assert "unknown command" not in written
    assert f"\n/{name}" not in written


def test_a_line_interrupted_while_a_command_asks_changes_nothing(tmp_path: Path) -> None:
    lines: Iterator[Any] = iter(
        ["Hi", "/rename", KeyboardInterrupt(), KeyboardInterrupt(), "/list", EOFError()]
    )
    written: list[str] = []

    def read(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return str(line)

    session = Session(lambda progress: FakeModel(), history=HistoryWorker(tmp_path / "h.db"))
    assert PlainChat(session, read, written.append).run() == 0
    assert "- 1: Hi\n" in written


def test_lines_need_no_textual() -> None:
    code = "import sys, edgespec.app.chat.plain; print([m for m in sys.modules if m.startswith('textual')])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_a_model_that_does_not_load_ends_it(tmp_path: Path) -> None:
    def load(progress: object) -> FakeModel:
        raise EdgespecError("no such model")

    written: list[str] = []
    session = Session(load, history=HistoryWorker(tmp_path / "h.db"))
    assert PlainChat(session, lambda prompt: pytest.fail("asked"), written.append).run() == 1
    assert "- no such model\n" in written
