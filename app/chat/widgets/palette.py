"""The chat's commands in Textual's palette (Ctrl+P)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from textual.command import DiscoveryHit, Hit, Hits, Provider

from edgespec.app.chat.command_table import COMMANDS, Command


class CommandPalette(Provider):
    """Lists every command, and runs the one chosen as its key does."""

    async def discover(self) -> Hits:
        for one in COMMANDS.values():
            yield DiscoveryHit(one.name, self._run(one), help=one.help)

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for one in COMMANDS.values():
            if (score := matcher.match(f"{one.name} {one.help}")) > 0:
                yield Hit(score, matcher.highlight(one.name), self._run(one), help=one.help)

    def _run(self, one: Command) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            await self.app.run_action(f"command({one.name!r})")

        return run
