"""Reasoning in the chat: one line that opens, stored with the answer, and not read again."""

from __future__ import annotations

from pathlib import Path

from chats import SIZE, FakeModel, answered, app_of, send, shown, talk_plainly, until
from hypothesis import given
from hypothesis import strategies as st

from edgespec.app.chat.thoughts import JoinedAnswer, parts

PIECES = ("<think>\nTwo and", " two.\n</think>\n\nIt is ", "**4**.")


def test_reasoning_and_text_are_joined_to_one_text() -> None:
    joined = JoinedAnswer()
    text = joined.reasoning("a") + joined.reasoning("b\nc") + joined.text("d") + joined.text("e")
    assert parts(text) == ("ab\nc", "de")
    assert parts(JoinedAnswer().text("no <think>")) == ("", "no <think>")
    assert parts(JoinedAnswer().reasoning("cut")) == ("cut", "")


@given(st.text().filter(lambda text: "</think>" not in text), st.text())
def test_what_is_joined_is_found_again(thought: str, answer: str) -> None:
    joined = JoinedAnswer()
    text = joined.reasoning(thought) + joined.text(answer)
    assert parts(text) == (thought.strip(), answer.lstrip("\n"))


async def test_reasoning_is_a_line_that_opens(tmp_path: Path) -> None:
    engine = FakeModel(PIECES)
    app = app_of(engine, tmp_path / "h.db")
    async with app.run_test(size=SIZE) as pilot:
        await send(pilot, "Add.")
        await answered(pilot)
        await until(pilot, lambda: "reasoning: 3 words" in shown(app))
        assert "It is 4" in shown(app)
        assert "Two and" not in shown(app)
        assert "think>" not in shown(app)
        app.view.pick(0)
        await pilot.press("enter")
        await until(pilot, lambda: "Two and two." in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: "Two and two." not in shown(app))
        await pilot.press("escape")
        await send(pilot, "Again.")
        await answered(pilot)
    assert {"role": "assistant", "content": "It is **4**."} in engine.asked[1]


def test_reasoning_without_a_screen_is_a_line(tmp_path: Path) -> None:
    written = talk_plainly(tmp_path / "h.db", FakeModel(PIECES), "Add.")
    assert "reasoning: 3 words" in written
    assert "It is **4**." in written
    assert "Two and" not in written
