"""The table of commands: complete, and open to a command of one's own in both front ends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from chats import SIZE, FakeModel, answered, app_of, send, shown, talk_plainly, until

from edgespec.app.chat import commands
from edgespec.app.chat.command_table import COMMANDS, help_text, is_command, parse
from edgespec.core import EdgespecError

PAGE = Path(__file__).parents[3] / "docs" / "add-a-chat-command.md"


@pytest.fixture
def _words_command() -> Iterator[None]:
    """The command of the page, as long as a test lasts."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    before = dict(COMMANDS)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})
    yield
    for name in COMMANDS.keys() - before.keys():
        del COMMANDS[name]


@pytest.mark.usefixtures("_words_command")
def test_the_command_of_the_page_runs_line_by_line(tmp_path: Path) -> None:
    written = talk_plainly(
        tmp_path / "h.db",
        FakeModel(["one three fourteen"]),
        "/words",
        "Hi",
        "/words 4",
        "/words",
        "9",
        "/help",
    )
    assert "- no answer to count: send a message first" in written
    assert "- 2 words" in written
    assert "- Shortest word to count, in letters, now '1': an empty line changes nothing" in written
    assert "- 0 words" in written
    assert re.search(r"^/words LETTERS +Count the words of the last answer$", written, re.MULTILINE)


@pytest.mark.usefixtures("_words_command")
async def test_the_command_of_the_page_runs_on_the_screen(tmp_path: Path) -> None:
    app = app_of(FakeModel(["one three fourteen"]), tmp_path / "h.db")
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await send(pilot, "Hi")
        await answered(pilot)
        await send(pilot, "/words 4")
        await until(pilot, lambda: "2 words" in shown(app))
        await send(pilot, "/words")
        await until(pilot, lambda: "Shortest word to count" in shown(app))
        await pilot.press("backspace", "9", "enter")
        await until(pilot, lambda: "0 words" in shown(app))


def test_names_and_keys_are_taken_once() -> None:
    keys = [one.key for one in COMMANDS.values() if one.key]
    assert len(keys) == len(set(keys)) > 10
    assert all(one.name == name for name, one in COMMANDS.items())
    assert set(commands.CONVERSATION_COMMANDS) < COMMANDS.keys()


@pytest.mark.parametrize("plain", [True, False])
def test_help_lists_every_command_in_a_narrow_window(plain: bool) -> None:
    text = help_text(plain=plain)
    assert max(map(len, text.splitlines())) <= 66
    for one in COMMANDS.values():
        assert (one.usage in text) is not (plain and one.screen_only)
        assert plain or not one.key or one.key.title().replace("Escape", "Esc") in text


def test_lines_are_parsed_into_commands() -> None:
    assert parse("/code  2 ") == (COMMANDS["code"], "2")
    assert parse("/again", plain=True) == (COMMANDS["regenerate"], "")
    assert parse("/last", plain=True) == (COMMANDS["open"], "last")
    assert is_command("/x")
    assert not is_command("//x")
    for text, plain in (("/again", False), ("/code", True), ("/", False), ("/ new", True)):
        with pytest.raises(EdgespecError, match="unknown command"):
            parse(text, plain=plain)
