"""The line below the input: help for a command, completions of a path, tokens of attached files."""

from __future__ import annotations

import asyncio

from textual import work
from textual.widgets import Static

from edgespec.app.chat.attachments import Attached, complete, find
from edgespec.app.chat.command_table import COMMANDS
from edgespec.app.chat.session import Session
from edgespec.app.terminal import one_line

_MOST = 12  # completions shown
_LONGEST = 20_000  # characters of a message that is searched for paths at each key


class Hint(Static):
    """A line of help, hidden if there is none."""

    def __init__(self, session: Session) -> None:
        super().__init__("", id="hint", markup=False)
        self._session = session
        self.display = False

    @work(exclusive=True)
    async def look_at(self, text: str) -> None:
        """Show help for the text in the input."""
        hint = ""
        if text.startswith("/") and "\n" not in text:
            hint = _of_command(text[1:].partition(" ")[0])
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
        if self._session.state in ("ready", "stopped"):  # else the model is busy
            tokens = await asyncio.wrap_future(self._session.count(file.text))
            return f"@{file.name}: {tokens:,} tokens"
        return f"@{file.name}: about {len(file.text) // 4:,} tokens"


def completions(word: str) -> list[str]:
    """The completions of `word`: paths after @, commands after a slash."""
    if word.startswith("@"):
        return ["@" + path for path in complete(word[1:])]
    if word.startswith("/"):
        return [f"/{name}" for name in COMMANDS if name.startswith(word[1:])]
    return []


def _of_command(name: str) -> str:
    found = [one for one in COMMANDS.values() if one.name.startswith(name)]
    if len(found) == 1:
        return f"{found[0].usage}: {found[0].help}"
    return " · ".join(f"/{one.name}" for one in found)
