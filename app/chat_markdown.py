"""Markdown that cannot steer the terminal, and that is drawn no faster than it can be."""

from __future__ import annotations

import asyncio
from time import perf_counter

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.token import Token
from textual.widgets import Markdown

from edgespec.app.terminal import clean, one_line

_SHARE = 0.1  # of the time that may go into drawing an answer
_SHORTEST, _LONGEST = 0.04, 1.0  # seconds between two drawings


def parser() -> MarkdownIt:
    """A parser whose output is clean too: Markdown's own `&#x202e;` writes what was not in the source."""

    def scrub(state: StateCore) -> None:
        def walk(tokens: list[Token]) -> None:
            for token in tokens:
                token.content = clean(token.content)
                token.attrs = {k: one_line(v) if isinstance(v, str) else v for k, v in token.attrs.items()}
                walk(token.children or [])
                if token.type in ("fence", "code_block"):
                    # Guessing the language at every new piece is far too slow.
                    token.info = one_line(token.info) or "text"

        walk(state.tokens)

    # Without html, since `<int>` and `<think>` would vanish from the screen with it.
    made = MarkdownIt("gfm-like", {"html": False})
    made.core.ruler.push("scrub", scrub)
    return made


class Answer(Markdown):
    """An answer as it grows. `write` never waits; what it was given is drawn in pieces.

    The time between two drawings grows with what a drawing takes: a long block of code is highlighted anew
    each time.
    """

    def __init__(self, text: str = "") -> None:
        super().__init__(clean(text), parser_factory=parser, open_links=False)
        self._more: list[str] = []
        self._news = asyncio.Event()
        self._drawing: asyncio.Task[None] | None = None

    def write(self, text: str) -> None:
        self._more.append(clean(text))
        self._news.set()
        if self._drawing is None:
            self._drawing = asyncio.create_task(self._draw())

    async def end(self) -> None:
        """Draw the rest at once."""
        if self._drawing is not None:
            self._drawing.cancel()
            await asyncio.wait([self._drawing])
            self._drawing = None
        await self._append()

    def on_unmount(self) -> None:
        if self._drawing is not None:
            self._drawing.cancel()

    async def _draw(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            start = perf_counter()
            await asyncio.shield(self._append())
            took = perf_counter() - start
            await asyncio.sleep(min(_LONGEST, max(_SHORTEST, took / _SHARE)))

    async def _append(self) -> None:
        text = "".join(self._more)
        self._more.clear()
        if text and self.is_attached:
            await self.append(text)


def code_blocks(text: str) -> list[str]:
    """The code blocks of a Markdown text, in order."""
    return [token.content for token in parser().parse(text) if token.type in ("fence", "code_block")]
