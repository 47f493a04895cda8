"""Storing, finding, exporting conversations in the chat: driven by keys, read back from the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chats import SIZE, FakeModel, answered, app_of, send, shown, until
from textual.widgets import Input, OptionList

from edgespec.app.chat.widgets.input import MessageInput
from edgespec.app.history.store import History


def kept(path: Path) -> list[tuple[str, str, str]]:
    """Every message of every conversation: role, state, text."""
    with History(path) as history:
        return [(m.role, m.state, m.text) for c in history.conversations() for m in history.messages(c.id)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.db"


async def test_a_question_is_stored_before_its_answer_starts(path: Path) -> None:
    seen = []
    engine = FakeModel()
    engine.before_answer = lambda: seen.append(kept(path))
    app = app_of(engine, path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await send(pilot, "What?")
        await answered(pilot)
    assert seen == [[("user", "complete", "What?"), ("assistant", "partial", "")]]
    assert kept(path) == [("user", "complete", "What?"), ("assistant", "complete", "Hello there.")]


async def test_an_answer_is_stored_while_it_streams(path: Path) -> None:
    engine = FakeModel(["word "] * 500, pause=0.02)
    app = app_of(engine, path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await send(pilot, "Go")
        await until(pilot, lambda: engine.given > 40)
        (_, state, text) = kept(path)[1]
        assert state == "partial"
        assert 40 <= len(text) <= 5 * engine.given
        await pilot.press("escape")
        await answered(pilot)
        assert kept(path)[1] == ("assistant", "stopped", "word " * engine.given)


async def test_quitting_keeps_the_answer_so_far(path: Path) -> None:
    engine = FakeModel(["word "] * 500, pause=0.02)
    app = app_of(engine, path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await send(pilot, "Go")
        await until(pilot, lambda: engine.given > 5)
        await pilot.press("ctrl+q")
    assert kept(path)[1] == ("assistant", "stopped", "word " * engine.given)


async def test_the_last_or_a_chosen_conversation_is_opened_again(path: Path) -> None:
    app = app_of(FakeModel(["First answer."]), path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await send(pilot, "First question")
        await answered(pilot)
        await pilot.press("ctrl+l")
        await send(pilot, "Second question")
        await answered(pilot)
        number = app.session.chat.number
    engine = FakeModel()
    app = app_of(engine, path, reopen=0)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await until(pilot, lambda: "Second question" in shown(app) and "First answer." in shown(app))
        assert app.session.chat.number == number
        await send(pilot, "More")
        await answered(pilot)
        assert [m["content"] for m in engine.asked[0]] == [
            "Be kind.",
            "Second question",
            "First answer.",
            "More",
        ]
    app = app_of(FakeModel(), path, reopen=number - 1)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await until(pilot, lambda: "First question" in shown(app))
        await pilot.press("up")
        assert app.query_one(MessageInput).text == "First question"


async def test_search_jumps_to_the_message(path: Path) -> None:
    with History(path) as history:
        number = history.new(title="Old").id
        for i in range(80):
            history.append(number, "user", f"question {i}")
            history.append(number, "assistant", f"answer {i}" + " with a heron" * (i == 7))
        history.new(title="Newer")
    app = app_of(FakeModel(), path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await answered(pilot)
        await pilot.press("ctrl+b")
        await until(pilot, lambda: "Newer" in shown(app) and "Old" in shown(app))
        await pilot.press(*"heron")
        await until(pilot, lambda: "with a heron" in shown(app) and "Newer" not in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: app.view.focused_item is not None)
        assert app.view.focused_item is not None
        assert app.view.focused_item.text == "answer 7 with a heron"
        assert "answer 79" not in shown(app)
        await pilot.press("ctrl+b")
        await until(pilot, lambda: not app.sidebar.display)
        assert app.focused is app.query_one(MessageInput)


async def test_a_long_conversation_shows_its_end_and_pages_back(path: Path) -> None:
    with History(path) as history:
        number = history.new(title="Long").id
        for i in range(100):
            history.append(number, "user", f"question {i}")
    app = app_of(FakeModel(), path, reopen=number)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await until(pilot, lambda: "question 99" in shown(app))
        assert len(app.view.query("MessageView")) == 30
        for _ in range(60):
            await pilot.press("pageup")
            await pilot.pause(0.02)
            if "question 0 " in shown(app):
                break
        assert "question 0 " in shown(app)
        assert len(app.view.query("MessageView")) == 100


async def test_rename_pin_delete_and_undo_in_the_list(path: Path) -> None:
    with History(path) as history:
        old, new = history.new(title="Older").id, history.new(title="Newer").id
    app = app_of(FakeModel(), path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await answered(pilot)
        await pilot.press("ctrl+b")
        await until(pilot, lambda: app.query_one("#found", OptionList).option_count == 2)
        await pilot.press("down", "down", "ctrl+s")
        await until(pilot, lambda: "* Older" in shown(app))
        with History(path) as history:
            assert [(c.id, c.pinned) for c in history.conversations()] == [(old, True), (new, False)]
        await pilot.press("f2")
        await until(pilot, lambda: "Title of the conversation" in shown(app))
        app.screen.query_one(Input).value = "Ren\x1b[1mamed"
        await pilot.press("enter")
        await until(pilot, lambda: "* Ren[1mamed" in shown(app))
        await pilot.press("ctrl+d")
        await until(pilot, lambda: "* Ren" not in shown(app))
        with History(path) as history:
            assert [c.id for c in history.conversations()] == [new]
        await pilot.press("ctrl+z")
        await until(pilot, lambda: "* Ren" in shown(app))
        with History(path) as history:
            assert len(history.conversations()) == 2


async def test_deleting_the_conversation_shown_starts_another(path: Path) -> None:
    engine = FakeModel()
    app = app_of(engine, path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await send(pilot, "Away with it")
        await answered(pilot)
        await send(pilot, "/delete")
        await until(pilot, lambda: "New conversation" in shown(app))
        await answered(pilot)
        assert kept(path) == []
        await until(pilot, lambda: bool(engine.forgotten))
        assert "Away with it" in [message["content"] for message in engine.forgotten[0]]
        await send(pilot, "/undo")
        await until(pilot, lambda: "Away with it" in shown(app).splitlines()[0])
        assert len(kept(path)) == 2


async def test_export_and_import(path: Path, tmp_path: Path) -> None:
    app = app_of(FakeModel(), path)
    markdown, data = tmp_path / "out.md", tmp_path / "out put.json"
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await send(pilot, "Keep\x1b this")
        await answered(pilot)
        await send(pilot, f"/export {markdown}")
        await until(pilot, markdown.exists)
        await send(pilot, f'/export "{data}"')
        await until(pilot, data.exists)
        await send(pilot, f"/import {data}")
        await until(pilot, lambda: len(kept(path)) == 4)
        await send(pilot, "/import nowhere.json")
        await until(pilot, lambda: "nowhere.json" in shown(app))
    assert "Hello there." in markdown.read_text()
    assert "\x1b" not in markdown.read_text() + data.read_text()
    assert json.loads(data.read_text())


async def test_a_history_that_cannot_be_opened_is_reported_and_the_chat_works(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    app = app_of(FakeModel(), tmp_path / "file" / "history.db")
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await until(pilot, lambda: "this chat is not saved" in " ".join(shown(app).split()))
        await send(pilot, "Still there?")
        await until(pilot, lambda: "Hello there." in shown(app))


async def test_a_damaged_history_is_set_aside_and_reported(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    app = app_of(FakeModel(), path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await until(pilot, lambda: "damaged" in shown(app))
        await send(pilot, "Fresh")
        await answered(pilot)
    assert kept(path)[0][2] == "Fresh"
    assert len(list(path.parent.glob("history*"))) >= 2


async def test_a_message_that_cannot_be_stored_is_returned(path: Path) -> None:
    app = app_of(FakeModel(), path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await send(pilot, "One")
        await answered(pilot)
        with History(path) as history:
            history.purge(app.session.chat.number or 0)
        await send(pilot, "Two")
        await until(pilot, lambda: app.query_one(MessageInput).text == "Two")
        assert "Two" not in [item.text for item in app.session.items]


async def test_a_jump_within_the_conversation_does_not_stop_its_answer(path: Path) -> None:
    with History(path) as history:
        number = history.new(title="Long").id
        for i in range(60):
            history.append(number, "user", f"question {i}")
        first = history.messages(number)[0].id
    engine = FakeModel(["word "] * 500, pause=0.02)
    app = app_of(engine, path, reopen=number)
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, lambda: "question 59" in shown(app))
        await send(pilot, "Go")
        await until(pilot, lambda: engine.given > 3)
        app.session.open(number, first)
        await until(pilot, lambda: app.view.focused_item is not None and "question 0" in shown(app))
        assert app.session.state == "generating"
        await pilot.press("escape", "escape")
        await answered(pilot)
        assert app.session.items[-1].text == "word " * engine.given
        assert app.session.state == "stopped"
