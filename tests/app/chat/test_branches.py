"""Regenerating, editing, switching branches, stopping, continuing, trimming: driven by keys."""

from __future__ import annotations

from pathlib import Path

import pytest
from chats import SIZE, FakeModel, answered, app_of, send, shown, until
from textual.widgets import OptionList

from edgespec.app.chat.widgets.input import MessageInput
from edgespec.app.history.store import History


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.db"


async def test_a_regenerated_answer_is_a_sibling_of_the_first(path: Path) -> None:
    engine = FakeModel(["First answer."])
    app = app_of(engine, path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await send(pilot, "Question")
        await answered(pilot)
        engine.pieces = ["Second answer."]
        await pilot.press("ctrl+r")
        await answered(pilot)
        assert "First answer." not in shown(app)
        assert "Second answer." in shown(app)
        assert "branch 2 of 2" in shown(app)
        assert shown(app).count("Question") == 2  # in the title, too
        assert engine.asked[1] == engine.asked[0]
        await pilot.press("alt+left")
        await until(pilot, lambda: "First answer." in shown(app))
        assert "branch 1 of 2" in shown(app)
        await send(pilot, "And then?")
        await answered(pilot)
        assert [m["content"] for m in engine.asked[2]] == [
            "Be kind.",
            "Question",
            "First answer.",
            "And then?",
        ]
        await pilot.press("alt+right")
        await until(pilot, lambda: "And then?" not in shown(app))
        await pilot.press("alt+right")
        await until(pilot, lambda: "And then?" in shown(app))
    with History(path) as history:
        (about,) = history.conversations()
        assert len(history.messages(about.id)) == 5


async def test_an_edited_question_is_a_new_branch_and_loses_nothing(path: Path) -> None:
    engine = FakeModel(["One."])
    app = app_of(engine, path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        for text in ("Alpha", "Beta"):
            await send(pilot, text)
            await answered(pilot)
        await pilot.press("ctrl+up", "ctrl+up", "ctrl+up", "ctrl+up")  # to the first question
        await until(pilot, lambda: app.view.focused_item is app.session.items[0])
        await pilot.press("e")
        await pilot.pause(0.1)
        assert app.query_one(MessageInput).text == "Alpha"
        app.query_one(MessageInput).put("Gamma")
        await pilot.press("enter")
        await answered(pilot)
        assert [item.text for item in app.session.items] == ["Gamma", "One."]
        assert [m["content"] for m in engine.asked[2]] == ["Be kind.", "Gamma"]
        assert "Beta" not in shown(app)
        await pilot.press("alt+left")
        await until(pilot, lambda: [i.text for i in app.session.items] == ["Alpha", "One.", "Beta", "One."])
        await until(pilot, lambda: "Beta" in shown(app))


async def test_leaving_an_edit_asks_nothing(path: Path) -> None:
    engine = FakeModel()
    app = app_of(engine, path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await send(pilot, "Alpha")
        await answered(pilot)
        await pilot.press("f2")
        await until(pilot, lambda: app.query_one(MessageInput).text == "Alpha")
        await pilot.press("escape")
        await until(pilot, lambda: app.query_one(MessageInput).text == "")
        await send(pilot, "Beta")
        await answered(pilot)
        assert [item.text for item in app.session.items if item.role == "user"] == ["Alpha", "Beta"]


async def test_a_stopped_answer_continues_where_it_was(path: Path) -> None:
    engine = FakeModel(["word "] * 500, pause=0.02)
    app = app_of(engine, path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await send(pilot, "Go")
        await until(pilot, lambda: engine.given > 3)
        await pilot.press("escape")
        await answered(pilot)
        assert "Ctrl+T continues" in shown(app)
        before = app.session.items[-1].text
        engine.pieces = ["and the end."]
        await pilot.press("ctrl+t")
        await answered(pilot)
        assert engine.asked[1][-1] == {"role": "assistant", "content": before}
        assert app.session.items[-1].text == before + "and the end."
        assert "and the end." in shown(app)
        assert "Ctrl+T continues" not in shown(app)
    with History(path) as history:
        last = history.branch(history.conversations()[0].id)[-1]
        assert (last.text, last.state) == (before + "and the end.", "complete")
        assert sum(n for _, lengths in last.sources for n in lengths) == len(last.text)


async def test_another_conversation_stops_the_answer_and_keeps_it(path: Path) -> None:
    with History(path) as history:
        other = history.new(title="Other").id
        history.append(other, "user", "Something else")
    engine = FakeModel(["word "] * 500, pause=0.02)
    app = app_of(engine, path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await send(pilot, "Go")
        await until(pilot, lambda: engine.given > 3)
        app.session.open(other)
        await until(pilot, lambda: "Something else" in shown(app))
        await answered(pilot)
        assert "word" not in shown(app)
    with History(path) as history:
        texts = {m.text for c in history.conversations() for m in history.messages(c.id)}
        assert "word " * engine.given in texts


async def test_a_conversation_that_is_too_long_offers_what_to_leave_out(path: Path) -> None:
    engine = FakeModel(context_length=80)  # a message takes ten tokens, the system prompt too
    app = app_of(engine, path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        for n in range(4):
            await send(pilot, f"Question {n}")
            await answered(pilot)
            if n == 3:
                await until(pilot, lambda: "tokens remain" in shown(app))
        assert len(engine.asked) == 3
        assert "80 tokens" in shown(app)
        assert app.screen.query_one(OptionList).option_count == 2
        await pilot.press("enter")
        await until(pilot, lambda: len(engine.asked) == 4)
        await answered(pilot)
        output = [m["content"] for m in engine.asked[3] if m["role"] == "user"]
        assert output == ["Question 1", "Question 2", "Question 3"]
        assert len(app.session.items) == 8  # nothing is lost
        await send(pilot, "/drop none")
        await answered(pilot)
        assert app.session.chat.since == 0


async def test_nothing_is_left_out_unless_chosen(path: Path) -> None:
    engine = FakeModel(context_length=80)
    app = app_of(engine, path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        for n in range(4):
            await send(pilot, f"Question {n}")
            await answered(pilot)
        await until(pilot, lambda: "tokens remain" in shown(app))
        await pilot.press("escape")
        await pilot.pause(0.1)
        assert len(engine.asked) == 3
        await send(pilot, "/drop")
        await until(pilot, lambda: "tokens remain" in shown(app))
        await pilot.press("escape")
    with History(path) as history:
        states = [m.state for m in history.messages(1) if m.role == "assistant"]
    assert states == ["complete"] * 3 + ["stopped"]


async def test_a_finished_answer_stays_finished_when_drop_asks(path: Path) -> None:
    app = app_of(FakeModel(), path)
    async with app.run_test(size=SIZE) as pilot:
        for text in ("One", "Two"):
            await send(pilot, text)
            await answered(pilot)
        await send(pilot, "/drop")
        await until(pilot, lambda: "tokens remain" in shown(app))
        await pilot.press("escape")
        await answered(pilot)
    with History(path) as history:
        assert [m.state for m in history.messages(1)] == ["complete"] * 4


async def test_keys_on_a_message(path: Path) -> None:
    engine = FakeModel(["One."])
    app = app_of(engine, path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        for text in ("Alpha", "Beta"):
            await send(pilot, text)
            await answered(pilot)
        await pilot.press("ctrl+up", "ctrl+up", "ctrl+up")  # the first answer
        await until(pilot, lambda: app.view.focused_item is app.session.items[1])
        await pilot.press("c")
        await until(pilot, lambda: app.clipboard == "One.")
        engine.pieces = ["Two."]
        await pilot.press("r")
        await answered(pilot)
        assert [item.text for item in app.session.items] == ["Alpha", "Two."]
        await until(pilot, lambda: app.view.focused_item is app.session.items[1])
        await pilot.press("left")
        await until(pilot, lambda: [i.text for i in app.session.items] == ["Alpha", "One.", "Beta", "One."])
        await until(pilot, lambda: app.view.focused_item is app.session.items[1])
        await pilot.press("escape")
        await until(pilot, lambda: app.query_one(MessageInput).has_focus)


async def test_a_long_question_unfolds(path: Path) -> None:
    app = app_of(FakeModel(), path)
    async with app.run_test(size=(80, 60)) as pilot:
        app.query_one(MessageInput).put("\n".join(f"line {n}" for n in range(30)))
        await pilot.press("enter")
        await answered(pilot)
        assert "10 more lines" in shown(app)
        await pilot.press("ctrl+up", "ctrl+up")
        await until(pilot, lambda: app.view.focused_item is app.session.items[0])
        await pilot.press("enter")
        await until(pilot, lambda: "line 29" in shown(app))


async def test_ctrl_q_leaves_from_anywhere(path: Path) -> None:
    app = app_of(FakeModel(), path)
    async with app.run_test(size=SIZE) as pilot:
        await pilot.press("f1")
        await until(pilot, lambda: len(app.screen_stack) == 2)
        await pilot.press("ctrl+q")
    assert app.return_value == 0
