"""The line under the input: what a command does, what a path may become, what attached files cost."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol

from textual import work
from textual.widgets import Static

from edgespec.app.chat.attachments import Attached, complete, find
from edgespec.app.chat.session import Session
from edgespec.app.terminal import one_line

_MOST = 12  # completions shown
_LONGEST = 20_000  # characters of a message that are looked through at each key


class Described(Protocol):
    """A command as the hint shows it."""

    @property
    def name(self) -> str: ...
    @property
    def argument(self) -> str: ...
    @property
    def about(self) -> str: ...


Commands = Mapping[str, Described]


class Hint(Static):
    """Hidden while there is nothing to say."""

    def __init__(self, session: Session, commands: Commands) -> None:
        super().__init__("", id="hint", markup=False)
        self._session, self._commands = session, commands
        self.display = False

    @work(exclusive=True)
    async def look_at(self, text: str) -> None:
        """Say what helps with `text`, which is being written."""
        hint = ""
        if text.startswith("/") and "\n" not in text:
            hint = _of_command(self._commands, text[1:].partition(" ")[0])
        elif "@" in text and len(text) < _LONGEST:
            await asyncio.sleep(0.15)  # until typing pauses
            files = await asyncio.to_thread(find, text)
            parts = [await self._cost(one) for one in files]
            word = text.rsplit(maxsplit=1)[-1]
            if not text[-1].isspace() and word.startswith("@") and len(word) > 1:
                paths = [path for path in await asyncio.to_thread(complete, word[1:]) if path != word[1:]]
                parts += ["Tab: " + "  ".join(paths[:_MOST])] if paths else []
            hint = " · ".join(parts)
        if hint or self.display:
            self.update(one_line(hint))
            self.display = bool(hint)

    async def _cost(self, file: Attached) -> str:
        if file.error:
            return f"@{file.name} {file.error}"
        if self._session.state in ("ready", "stopped"):  # else the engine has no time to count
            tokens = await asyncio.wrap_future(self._session.count(file.text))
            return f"@{file.name}: {tokens:,} tokens"
        return f"@{file.name}: about {len(file.text) // 4:,} tokens"


def completions(commands: Commands, word: str) -> list[str]:
    """What `word` may become: a path after @, a command after a slash."""
    if word.startswith("@"):
        return ["@" + path for path in complete(word[1:])]
    if word.startswith("/"):
        return [f"/{name}" for name in commands if name.startswith(word[1:])]
    return []


def _of_command(commands: Commands, name: str) -> str:
    found = [one for one in commands.values() if one.name.startswith(name)]
    if len(found) == 1:
        return f"/{found[0].name} {found[0].argument}: {found[0].about}"
    return " · ".join(f"/{one.name}" for one in found)
