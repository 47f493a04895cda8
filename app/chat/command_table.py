"""The chat's commands in one table: declared once, run by the screen and by `--plain`."""

from __future__ import annotations

import textwrap
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from edgespec.app.chat.actions import ChatActions, ScreenActions
from edgespec.core import EdgespecError

_WIDTH = 66  # columns of the help text, which fits into a window of 80
# Former names of `--plain`, kept for one release: each is another name of a command with its argument.
_PLAIN_ALIASES = {"again": "regenerate", "branch": "next", "list": "search", "last": "open last"}
_TYPING = """\
Enter sends, Ctrl+J inserts a new line, Up recalls what was sent. @path attaches a text file, Tab \
completes its name. Page up and Page down scroll. Ctrl+Up goes to the messages: there e edits, r \
regenerates, c copies, Left and Right switch branches. A message that begins with a slash is typed \
with two."""
_TYPING_PLAIN = """\
Enter sends a line; a backslash at its end continues it on the next. @path attaches a text file. Ctrl+C \
stops the answer, Ctrl+D leaves. A message that begins with a slash is typed with two."""


@dataclass(frozen=True, slots=True)
class Command:
    """`key` is Textual's name of a key, `argument` describes what may follow the name in the help text."""

    name: str
    help: str
    run: Callable[[Any, str], Awaitable[None]]
    key: str = ""
    argument: str = ""
    screen_only: bool = False

    @property
    def usage(self) -> str:
        return f"/{self.name} {self.argument}".rstrip()


COMMANDS: dict[str, Command] = {}

CommandFunction = Callable[[ChatActions, str], Awaitable[None]]
ScreenFunction = Callable[[ScreenActions, str], Awaitable[None]]


def command(
    name: str, help: str, *, key: str = "", argument: str = ""
) -> Callable[[CommandFunction], CommandFunction]:
    """Add a command of both front ends. Its function gets the chat and the text after the name."""

    def add(run: CommandFunction) -> CommandFunction:
        COMMANDS[name] = Command(name, help, run, key, argument)
        return run

    return add


def screen_command(
    name: str, help: str, *, key: str = "", argument: str = ""
) -> Callable[[ScreenFunction], ScreenFunction]:
    """Add a command that only makes sense on the screen, and is not offered by `--plain`."""

    def add(run: ScreenFunction) -> ScreenFunction:
        COMMANDS[name] = Command(name, help, run, key, argument, screen_only=True)
        return run

    return add


def is_command(text: str) -> bool:
    """Whether a line is a command. A message that begins with a slash is typed with two."""
    return text.startswith("/") and not text.startswith("//")


def parse(text: str, *, plain: bool = False) -> tuple[Command, str]:
    """The command that a line names, and its argument. Raises EdgespecError if there is no such command."""
    name, _, argument = text.removeprefix("/").partition(" ")
    if plain and name in _PLAIN_ALIASES:
        name, _, fixed = _PLAIN_ALIASES[name].partition(" ")
        argument = fixed or argument
    found = COMMANDS.get(name)
    if found is None or (plain and found.screen_only):
        raise EdgespecError(f"unknown command /{name}: /help lists the commands, // sends a slash")
    return found, argument.strip()


def help_text(*, plain: bool = False) -> str:
    """How to type a message, and every command in columns; with the keys of the screen unless `plain`."""
    shown = [one for one in COMMANDS.values() if not (plain and one.screen_only)]
    usage = max(len(one.usage) for one in shown) + 2
    key = 0 if plain else max(len(_key_name(one)) for one in shown) + 2
    lines = [*textwrap.wrap(_TYPING_PLAIN if plain else _TYPING, _WIDTH), ""]
    for one in shown:
        head = f"{'' if plain else _key_name(one):{key}}{one.usage:{usage}}"
        first, *rest = textwrap.wrap(one.help, _WIDTH - len(head))
        lines += [head + first, *(" " * len(head) + line for line in rest)]
    if not plain:
        lines.append(f"{'Ctrl+P':{key}}all commands as a palette")
    return "\n".join(lines)


def _key_name(one: Command) -> str:
    return one.key.title().replace("Escape", "Esc")
