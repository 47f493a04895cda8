"""The input: recall of sent messages, large pastes, attached files, commands, copying."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import pytest
from chats import SIZE, FakeModel, answered, app_of, send, shown, until
from hypothesis import given
from hypothesis import strategies as st
from textual.events import Paste

from edgespec.app.chat.attachments import (
    Attached,
    complete,
    find,
    folded,
    unfolded_question,
    with_files,
)
from edgespec.app.chat.markup import code_blocks
from edgespec.app.chat.widgets.input import MessageInput


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.db"


async def test_up_and_down_go_through_what_was_sent(path: Path) -> None:
    app = app_of(FakeModel(), path)
    async with app.run_test(size=SIZE) as pilot:
        box = app.query_one(MessageInput)
        for text in ("one", "two\nlines"):
            await send(pilot, text)
        await answered(pilot)
        await pilot.press("n", "e", "w", "up")
        assert box.text == "two\nlines"
        await pilot.press("up", "up")  # the first only moves the cursor to the first line
        assert box.text == "one"
        await pilot.press("up")
        assert box.text == "one"
        await pilot.press("down")
        assert box.text == "two\nlines"
        await pilot.press("down")
        assert box.text == "new"


async def test_a_large_paste_is_one_mark_and_arrives_whole(path: Path) -> None:
    engine = FakeModel()
    app = app_of(engine, path)
    text = "".join(f"line {n} of a long text\n" for n in range(5000))
    assert len(text) > 100_000
    async with app.run_test(size=SIZE) as pilot:
        box = app.query_one(MessageInput)
        await pilot.press("a", " ")
        start = perf_counter()
        app.post_message(Paste(text))
        await until(pilot, lambda: "pasted 1" in box.text)
        await pilot.press(" ", "b")
        assert perf_counter() - start < 3.0
        assert len(box.text) < 100
        await pilot.press("enter")
        await answered(pilot)
        assert engine.asked[0][-1]["content"] == f"a {text} b"
        assert "more lines" in shown(app)


async def test_tab_completes_paths_and_commands(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes-a.txt").write_text("one two three")
    (tmp_path / "notes-b.txt").write_text("four")
    app = app_of(FakeModel(), path)
    async with app.run_test(size=SIZE) as pilot:
        await answered(pilot)
        box = app.query_one(MessageInput)
        await pilot.press(*"see @no", "tab")
        assert box.text == "see @notes-"
        await until(pilot, lambda: "notes-a.txt" in shown(app) and "notes-b.txt" in shown(app))
        await pilot.press("a", "tab")
        assert box.text == "see @notes-a.txt"
        await until(pilot, lambda: "@notes-a.txt: 3 tokens" in shown(app))
        box.clear()
        await pilot.press(*"/reg", "tab")
        assert box.text == "/regenerate"
        await until(pilot, lambda: "Regenerate the last answer" in shown(app))


async def test_an_attached_file_is_sent_and_folded(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my notes.txt").write_text("secret ```` fence\nsecond\n")
    (tmp_path / "data.bin").write_bytes(b"\xff\0\x01")
    engine = FakeModel()
    app = app_of(engine, path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await send(pilot, "Look at @data.bin")
        await until(pilot, lambda: "is not UTF-8 text" in " ".join(shown(app).split()))
        assert app.query_one(MessageInput).text == "Look at @data.bin"
        app.query_one(MessageInput).clear()
        await send(pilot, 'Sum up @"my notes.txt" for @bob')
        await answered(pilot)
        sent = engine.asked[0][-1]["content"]
        assert sent.startswith('Sum up @"my notes.txt" for @bob\n\nFile my notes.txt:\n`````\n')
        assert "secret ```` fence\nsecond\n`````" in sent
        assert "2 lines" in shown(app)
        assert "secret" not in shown(app)
        await pilot.press("f2")
        await pilot.pause(0.1)
        assert app.query_one(MessageInput).text == 'Sum up @"my notes.txt" for @bob'


@given(st.lists(st.text(alphabet="`ab\n \\u202e", max_size=30), max_size=3), st.text("ab `\n", max_size=20))
def test_attached_files_are_removed_again(contents: list[str], typed: str) -> None:
    files = [Attached(f"f{n}", text) for n, text in enumerate(contents)]
    whole = with_files("x" + typed, files)
    assert unfolded_question(whole) == "x" + typed
    assert folded(whole).count("@f") == len(files)


def test_files_that_cannot_be_attached_have_a_reason(tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_bytes(b"a" * 1_000_001)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("x")
    (big,) = find("@big.txt @a @nothing @\0", tmp_path)
    assert "1,000,001 bytes" in big.error
    assert complete("a", tmp_path) == ["a/"]
    assert complete("a/", tmp_path) == ["a/x.txt"]
    assert complete("nowhere/", tmp_path) == []


async def test_unknown_commands_stay_and_two_slashes_send_one(path: Path) -> None:
    engine = FakeModel()
    app = app_of(engine, path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await send(pilot, "/nonsense now")
        await until(pilot, lambda: "unknown command /nonsense" in shown(app))
        assert app.query_one(MessageInput).text == "/nonsense now"
        app.query_one(MessageInput).clear()
        await send(pilot, "//usr/bin")
        await answered(pilot)
        assert engine.asked[0][-1]["content"] == "/usr/bin"


async def test_answers_and_code_blocks_are_copied_clean(path: Path) -> None:
    engine = FakeModel(["Text\n```py\none\x1b\n```\n", "and\n```\ntwo\n```\n"])
    app = app_of(engine, path)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await pilot.press("ctrl+y")
        await until(pilot, lambda: "no answer to copy" in shown(app))
        await send(pilot, "Code")
        await answered(pilot)
        await pilot.press("ctrl+y")
        await until(pilot, lambda: app.clipboard.endswith("two\n```\n"))
        assert "\x1b" not in app.clipboard
        await pilot.press("f5")
        await until(pilot, lambda: app.clipboard == "two\n")
        await send(pilot, "/code 1")
        await until(pilot, lambda: app.clipboard == "one\n")
        await send(pilot, "/code 9")
        await until(pilot, lambda: "no such code block" in shown(app))


def test_code_blocks_are_found_in_lists_and_indented() -> None:
    text = "1. a\n\n   ```c\n   int x;\n   ```\n\n    indented\n\n~~~\nopen"
    assert code_blocks(text)[0] == "int x;\n"
    assert code_blocks(text)[-1] == "open"


async def test_the_palette_and_help_know_every_command(path: Path) -> None:
    engine = FakeModel()
    app = app_of(engine, path)
    async with app.run_test(size=SIZE) as pilot:
        await pilot.press("f1")
        await until(pilot, lambda: "Enter sends, Ctrl+J inserts a new line" in shown(app))
        await pilot.press("escape", "ctrl+p")
        await until(pilot, lambda: "Start a new conversation" in shown(app))
        await pilot.press(*"sidebar")
        await until(pilot, lambda: "Show or hide the conversations" in shown(app))
        await pilot.pause(0.3)
        await pilot.press("enter")
        await until(pilot, lambda: app.sidebar.display is True)
