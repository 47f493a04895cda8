"""Answers on the screen: sections of long ones, code blocks while they are generated."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from chats import SIZE, FakeModel, answered, app_of, send, shown, until
from hypothesis import given
from hypothesis import strategies as st
from textual.widgets.markdown import MarkdownFence

from edgespec.app.chat.markup import code_blocks, is_complete, open_fence, parser, split_sections
from edgespec.app.chat.widgets.markdown import Section
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
def test_sections_contain_what_the_whole_contains(text: str) -> None:
    parts = split_sections(text)
    assert [line for part in parts for line in flat(part)] == flat(text)
    assert all(part.count("\n") <= 200 for part in parts)


def test_an_open_code_block_continues_in_the_next_section() -> None:
    parts = split_sections("~~~~py\n" + "y\n" * 500)
    assert len(parts) > 5
    assert all(part.startswith("~~~~py\n") for part in parts)
    assert all(part.endswith("\n~~~~\n") for part in parts[:-1])
    assert "".join(code for part in parts for code in code_blocks(part)) == "y\n" * 500


async def test_a_long_answer_keeps_few_widgets_on_the_screen_and_all_its_text(tmp_path: Path) -> None:
    engine = FakeModel([f"paragraph {n} of many\n\n" for n in range(400)], pause=0.002)
    app = app_of(engine, tmp_path / "h.db")
    async with app.run_test(size=SIZE) as pilot:
        await send(pilot, "Go")
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
    app = app_of(FakeModel(), tmp_path / "h.db", reopen=number)
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
    engine = FakeModel(["Some **bo", "ld** words", "\n\nand", " more"], pause=0.7)
    app = app_of(engine, tmp_path / "h.db")
    async with app.run_test(size=SIZE) as pilot:
        await send(pilot, "Go")
        await until(pilot, lambda: "Some **bo" in shown(app))
        await until(pilot, lambda: "Some **bold** words" in shown(app))  # unparsed: the line may continue
        await until(pilot, lambda: "Some bold words" in shown(app))
        assert app.session.generating is not None
        await answered(pilot)
        await until(pilot, lambda: "and more" in shown(app))
        assert shown(app).count("Some bold words") == 1
        (section,) = app.view.query(Section)
        assert section.markdown.source == "".join(map(str, engine.pieces))


async def test_a_line_without_end_is_drawn_in_time(tmp_path: Path) -> None:
    engine = FakeModel(["word " * 100] * 60, pause=0.06)
    app = app_of(engine, tmp_path / "h.db")
    async with app.run_test(size=SIZE) as pilot:
        await send(pilot, "Go")
        await until(pilot, lambda: sum(len(s.markdown.source) for s in app.view.query(Section)) > 2000)
        assert app.session.generating is not None
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
    assert is_complete(text) is complete


def column(screen: str, word: str) -> int:
    (line,) = [line for line in screen.splitlines() if word in line]
    return line.index(word)


@pytest.mark.parametrize("before", ["", "Text.\n\n", "1. one\n\n   "])
@pytest.mark.parametrize("size", [SIZE, (140, 40)])
async def test_the_newest_lines_of_code_are_inside_their_block(
    tmp_path: Path, before: str, size: tuple[int, int]
) -> None:
    indent = " " * (len(before.rpartition("\n")[2]))
    pieces = [f"{before}```python\n", f"{indent}def first():\n", f"{indent}    if second:\n", "\n"]
    pieces += [
        f"{indent}        third",
        f"()\n{indent}            fourth",
        f"\n{indent}```\n\n",
        "After the code.",
    ]
    shown_up_to, gates = [0], [threading.Event() for _ in pieces]

    def wait(number: int) -> None:
        shown_up_to[0] = number
        assert gates[number].wait(30)

    engine = FakeModel(pieces, before_piece=wait)
    app = app_of(engine, tmp_path / "h.db")
    async with app.run_test(size=size) as pilot:
        await send(pilot, "Go")
        for number, word in ((1, "def first"), (2, "if second"), (4, "third"), (5, "fourth")):
            for gate in gates[: number + 1]:
                gate.set()
            await until(pilot, lambda word=word: word in shown(app))
            await pilot.pause(0.3)
            line = next(y for y, text in enumerate(shown(app).splitlines()) if word in text)
            block = app.view.query(MarkdownFence).last()
            assert block.region.y < line < block.region.bottom - 1
            assert column(shown(app), word) == column(shown(app), "def first") + 4 * (number > 1) + 4 * (
                number > 2
            ) + 4 * (number > 4)
            assert shown(app).count("def first") == 1
        assert app.session.generating is not None
        assert "```" not in shown(app)
        for gate in gates:
            gate.set()
        await answered(pilot)
        await until(pilot, lambda: "After the code." in shown(app))
        block = app.view.query(MarkdownFence).last()
        assert block.region.height == 7  # five lines, and one free above and below
        assert block.code == "def first():\n    if second:\n\n        third()\n            fourth"


async def test_a_block_of_code_over_several_sections_keeps_its_lines(tmp_path: Path) -> None:
    lines = [f"    line_{n} = {n}\n" for n in range(150)]
    engine = FakeModel(["```python\n", *lines, "```\n"], pause=0.03)
    app = app_of(engine, tmp_path / "h.db")
    async with app.run_test(size=SIZE) as pilot:
        await send(pilot, "Go")
        await answered(pilot)
        codes = [block.code for block in app.view.query(MarkdownFence)]
        assert len(codes) > 1
        assert "\n".join(codes).split("\n") == [line.rstrip() for line in lines]


async def test_a_stopped_block_of_code_goes_on_inside(tmp_path: Path) -> None:
    with History(tmp_path / "h.db") as history:
        number = history.new(title="Code").id
        history.append(number, "user", "Go")
        history.append(number, "assistant", "```python\ndef first():\n    ret", state="partial")
    gate = threading.Event()
    engine = FakeModel(["urn", " 1\n", "```\n"], before_piece=lambda number: number < 2 or gate.wait(30))
    app = app_of(engine, tmp_path / "h.db", reopen=number)
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, lambda: "def first" in shown(app))
        await answered(pilot)
        await pilot.press("ctrl+t")
        await until(pilot, lambda: "return 1" in shown(app))
        assert column(shown(app), "return 1") == column(shown(app), "def first") + 4
        gate.set()
        await answered(pilot)
        assert app.view.query(MarkdownFence).last().region.height == 4


@pytest.mark.parametrize(
    ("text", "more", "code", "rest"),
    [
        ("```py\n", "x\n  y", "x\n  y", ""),
        ("```py\nx\n", "``` z\n```\nText", "``` z", "Text"),
        ("~~~~\nx\n", "~~~\n~~~~", "~~~", ""),
        ("- ```\n  x\n", "    y\n  ```\n- z", "  y", "- z"),
        ("> ```\n> x\n", "> y\n>   z", "y\n  z", ""),
    ],
)
def test_an_open_fence_takes_the_lines_up_to_its_end(text: str, more: str, code: str, rest: str) -> None:
    fence = open_fence(text)
    assert fence is not None
    assert fence.split(more) == (code, rest)


@pytest.mark.parametrize(
    "text",
    ["", "Text\n", "```py\nx\n```\n", "```py\nx\n```\nText\n", "- ```\n  x\n- y\n", "    ```\n    x\n"],
)
def test_no_fence_is_open(text: str) -> None:
    assert open_fence(text) is None


@given(FENCE, st.integers(0, 1000))
def test_code_is_the_same_wherever_it_is_cut(text: str, at: int) -> None:
    at = text.index("\n") + 1 + at % (len(text) - 20)
    before, after = text[:at].rpartition("\n")[0] + "\n", text[:at].rpartition("\n")[2] + text[at:]
    fence = open_fence(before)
    (whole,) = code_blocks(text)
    if fence is not None:
        code, _ = fence.split(after)
        assert "".join(code_blocks(before)).rstrip() + fence.gap + code == whole.removesuffix("\n")
