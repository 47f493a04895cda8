"""Long answers in sections: the same text, drawn where it is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
from chats import SIZE, FakeEngine, answered, app_of, say, shown, until
from hypothesis import given
from hypothesis import strategies as st

from edgespec.app.chat.widgets.markdown import Section, _complete, _parts, code_blocks, parser
from edgespec.app.history.store import History

BLOCK = st.sampled_from(
    [
        "A paragraph.\n\n",
        "# Head\n\n",
        "- item\n",
        "1. one\n",
        "> quote\n\n",
        "| a | b |\n|---|---|\n| 1 | 2 |\n\n",
    ]
)
FENCE = st.integers(1, 200).map(lambda n: "```python\n" + "x = 1\n" * n + "```\n\n")


def flat(text: str) -> list[str]:
    """The words and code lines of a text, in order."""
    tokens = parser().parse(text)
    return [line for t in tokens if t.content for line in t.content.split("\n") if line]


@given(st.lists(st.one_of(BLOCK, FENCE), max_size=80).map("".join))
def test_parts_say_what_the_whole_says(text: str) -> None:
    parts = _parts(text)
    assert [line for part in parts for line in flat(part)] == flat(text)
    assert all(part.count("\n") <= 200 for part in parts)


def test_an_open_block_of_code_goes_on_in_the_next_part() -> None:
    parts = _parts("~~~~py\n" + "y\n" * 500)
    assert len(parts) > 5
    assert all(part.startswith("~~~~py\n") for part in parts)
    assert all(part.endswith("\n~~~~\n") for part in parts[:-1])
    assert "".join(code for part in parts for code in code_blocks(part)) == "y\n" * 500


async def test_a_long_answer_keeps_few_widgets_on_the_screen_and_all_its_text(tmp_path: Path) -> None:
    engine = FakeEngine([f"paragraph {n} of many\n\n" for n in range(400)], pause=0.002)
    app = app_of(engine, tmp_path / "h.db")
    async with app.run_test(size=SIZE) as pilot:
        await say(pilot, "Go")
        await answered(pilot)
        await until(pilot, lambda: "paragraph 399" in shown(app))
        sections = list(app.view.query(Section))
        assert len(sections) > 10
        await until(pilot, lambda: sum(section.shown for section in sections) < 6)
        assert sections[-1].shown
        assert "".join(section.markdown.source for section in sections) == "".join(map(str, engine.pieces))
        app.view.scroll_home(animate=False)
        await until(pilot, lambda: "paragraph 1 " in shown(app))
        assert sections[0].shown


@pytest.mark.parametrize("size", [SIZE, (140, 40)])
async def test_a_long_answer_opened_again_scrolls_without_gaps(tmp_path: Path, size: tuple[int, int]) -> None:
    with History(tmp_path / "h.db") as history:
        number = history.new(title="Long").id
        history.append(number, "user", "Go")
        text = "\n\n".join(f"start {n} " + "long " * 40 + f"stop {n}" for n in range(80))
        history.append(number, "assistant", text)
    app = app_of(FakeEngine(), tmp_path / "h.db", reopen=number)
    seen: set[int] = set()

    def all_drawn() -> bool:
        looked_at = [one for one in app.view.query(Section) if one.region.overlaps(app.view.region)]
        return all(section.shown for section in looked_at)

    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: "stop 79" in shown(app))
        await until(pilot, lambda: all(section.measured for section in app.view.query(Section)))
        await until(pilot, lambda: sum(section.shown for section in app.view.query(Section)) < 8)
        for _ in range(60):
            await pilot.pause(0.05)
            await until(pilot, all_drawn)
            await pilot.pause(0.05)
            seen |= {n for n in range(80) if f"stop {n} " in shown(app) or f"start {n} " in shown(app)}
            if app.view.scroll_y <= 0:
                break
            await pilot.press("pageup")
    assert sorted(set(range(80)) - seen) == []


async def test_words_are_on_the_screen_before_their_line_ends(tmp_path: Path) -> None:
    engine = FakeEngine(["Some **bo", "ld** words", "\n\nand", " more"], pause=0.7)
    app = app_of(engine, tmp_path / "h.db")
    async with app.run_test(size=SIZE) as pilot:
        await say(pilot, "Go")
        await until(pilot, lambda: "Some **bo" in shown(app))
        await until(pilot, lambda: "Some **bold** words" in shown(app))  # as it is: the line may go on
        await until(pilot, lambda: "Some bold words" in shown(app))
        assert app.session.writing is not None
        await answered(pilot)
        await until(pilot, lambda: "and more" in shown(app))
        assert shown(app).count("Some bold words") == 1
        (section,) = app.view.query(Section)
        assert section.markdown.source == "".join(map(str, engine.pieces))


async def test_a_line_without_end_is_drawn_in_time(tmp_path: Path) -> None:
    engine = FakeEngine(["word " * 100] * 60, pause=0.06)
    app = app_of(engine, tmp_path / "h.db")
    async with app.run_test(size=SIZE) as pilot:
        await say(pilot, "Go")
        await until(pilot, lambda: sum(len(s.markdown.source) for s in app.view.query(Section)) > 2000)
        assert app.session.writing is not None
        await answered(pilot)
        await until(
            pilot, lambda: "".join(s.markdown.source for s in app.view.query(Section)) == "word " * 6000
        )


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("A paragraph.\n\n", True),
        ("A paragraph.\n", False),
        ("# Head\n\n", True),
        ("- item\n\n", False),  # the next may belong to the same list
        ("1. one\n\n", False),
        ("> quote\n\n", False),
        ("```py\nx = 1\n```\n\n", True),
        ("```py\nx = 1\n\n", False),
        ("~~~~\n~~~\n\n", False),
        ("| a |\n|---|\n| 1 |\n\n", True),
        ("---\n\n", True),
        ("", False),
    ],
)
def test_a_block_is_complete_when_nothing_can_join_it(text: str, complete: bool) -> None:
    assert _complete(text) is complete
