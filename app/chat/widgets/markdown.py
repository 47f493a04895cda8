"""Markdown that cannot steer the terminal, and that is drawn no faster than it can be."""

from __future__ import annotations

import asyncio
import gc
from time import monotonic, thread_time

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.token import Token
from rich.cells import cell_len
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widget import MountError
from textual.widgets import Markdown, Static

from edgespec.app.terminal import clean, one_line

_SHARE = 0.03  # of the time that may go into making Markdown of an answer
_SHORTEST, _LONGEST = 0.2, 2.0  # seconds between two drawings, and at most until lines become Markdown
_SETTLES = 0.05  # seconds in which lists have made their items: else each has the screen laid out again
_LONGEST_LINE = 2000  # characters that need not wait for the end of their line
_FREE = 3  # lines
_BLOCKS, _LINES = 20, 60  # of a section; lines from which on it may be parted


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


class Section(Vertical):
    """A part of an answer. Away from what is looked at only its height is kept.

    Every layout visits every widget that is displayed, and Markdown has one for each paragraph: a long
    answer would take a processor core to itself.
    """

    def __init__(self, text: str, shown: bool = True) -> None:
        super().__init__()
        self.markdown = Markdown(text if shown else "", parser_factory=parser, open_links=False)
        self.shown = shown
        self._later = "" if shown else text
        self._changes = 0  # that no layout has seen yet

    def compose(self) -> ComposeResult:
        if self.shown:
            yield self.markdown
        else:
            self.styles.height = self._later.count("\n") + 1  # until it is known better

    @property
    def measured(self) -> bool:
        """Its height is known, and not only guessed."""
        return not self._later

    async def reveal(self, shown: bool) -> None:
        """Display it, or keep its room."""
        if shown == self.shown or (not shown and self._changes):
            return
        self.shown = shown
        if not shown:
            self.styles.height = max(1, self.region.height)
            self.markdown.display = False
            return
        self.markdown.display = True
        if self._later:
            text, self._later = self._later, ""
            await self.mount(self.markdown)
            await self.markdown.update(text)
        self.styles.height = "auto"
        self.changed()

    def on_mount(self) -> None:
        self.changed()

    def changed(self) -> None:
        """Its height is another once it is laid out."""

        def laid_out() -> None:
            self._changes -= 1

        self._changes += 1
        self.call_after_refresh(laid_out)


class MarkdownAnswer(Vertical):
    """An answer as it grows. `write` never waits.

    Whole lines become Markdown, as often as that may cost: parsing and a layout of the screen take long. What
    came since stands below as it is, where new words cost little.
    """

    def __init__(self, text: str = "") -> None:
        super().__init__(classes="answer")
        parts = _parts(clean(text))
        self.sections = [Section(part, shown=part is parts[-1]) for part in parts]
        self._check = _LINES  # length of the last section at which to look for its parts
        self._more = ""  # that is no Markdown yet
        self._tail = Static("", classes="tail", markup=False)
        self._news = asyncio.Event()
        self._order = asyncio.Lock()  # what is given up goes on to its end
        self._drawing: asyncio.Task[None] | None = None

    def compose(self) -> ComposeResult:
        yield from self.sections
        yield self._tail

    def on_mount(self) -> None:
        self._tail.display = False

    def write(self, text: str) -> None:
        self._more += clean(text)
        self._news.set()
        if self._drawing is None:
            self._drawing = asyncio.create_task(self._draw())

    async def end(self) -> None:
        """Draw the rest at once."""
        if self._drawing is not None:
            self._drawing.cancel()
            await asyncio.wait([self._drawing])
            self._drawing = None
        text, self._more = self._more, ""
        with self.app.batch_update():
            self._tail.display = False
            await self._append(text)

    def on_unmount(self) -> None:
        if self._drawing is not None:
            self._drawing.cancel()

    async def _draw(self) -> None:
        """Draw what is written, until cancelled."""
        gc.freeze()
        try:
            await self._draw_news()
        finally:
            gc.unfreeze()

    async def _draw_news(self) -> None:
        due = 0.0
        while True:
            await self._news.wait()
            self._news.clear()
            lines = self._more.rfind("\n") + 1 or len(self._more) // _LONGEST_LINE * _LONGEST_LINE
            if self._full:
                lines = self._more.rfind("\n\n") + 2 if "\n\n" in self._more else lines
            if lines and monotonic() >= due:
                start, drawn, sections = thread_time(), asyncio.Event(), len(self.sections)
                text, self._more = self._more[:lines], self._more[lines:]
                with self.app.batch_update():
                    await asyncio.shield(self._append(text))
                    self._show_tail()
                    await asyncio.sleep(_SETTLES)
                self.call_after_refresh(drawn.set)  # the layout counts, too
                await drawn.wait()
                if len(self.sections) > sections:
                    gc.freeze()  # what stays as long as the answer need not be looked through time and again
                due = monotonic() + min(_LONGEST, (thread_time() - start) / _SHARE)
            else:
                self._show_tail()
            await asyncio.sleep(_SHORTEST)

    def _show_tail(self) -> None:
        """Show what is no Markdown yet. A few lines stay free: a layout for every new one would be dear."""
        if not self.is_attached:
            return
        tail = self._tail
        width = max(1, self.size.width - 2)  # that of Markdown
        needed = sum(max(1, -(-cell_len(line) // width)) for line in self._more.split("\n"))
        height = tail.size.height if tail.display else 0
        if not needed <= height <= needed + self.app.size.height // 3:
            tail.styles.height = needed + _FREE
        tail.display = True
        tail.update(self._more, layout=False)

    async def _append(self, text: str) -> None:
        async with self._order:
            if not text or not self.is_attached:
                return
            last = self.sections[-1].markdown
            try:
                if self._full and _complete(last.source):
                    more = [Section(part) for part in _parts(text)]
                    await self.mount_all(more, before=self._tail)
                    self.sections += more
                    return
                await last.append(text)
                if last.source.count("\n") > self._check:
                    await self._split(last)
            except MountError:
                if self.is_attached:
                    raise  # else it was taken off the screen meanwhile

    @property
    def _full(self) -> bool:
        """The last section is long enough: another begins with the next block."""
        return self.sections[-1].markdown.source.count("\n") >= _LINES // 2

    async def _split(self, last: Markdown) -> None:
        """Go on in a new section where the last block begins, so that what is finished is left alone."""
        source = last.source
        *finished, begun = _parts(source)
        if not finished:
            self._check = 2 * source.count("\n")  # one long block
            return
        self._check = _LINES
        more = [Section(part) for part in (*finished[1:], begun)]
        with self.app.batch_update():
            await last.update(finished[0])
            self.sections[-1].changed()
            await self.mount_all(more, before=self._tail)
        self.sections += more


def _complete(text: str) -> bool:
    """Whether what comes after `text` begins a block of its own, whatever it is."""
    tokens = parser().parse(text) if text.endswith("\n\n") else []
    if not tokens or tokens[-1].type not in (
        "paragraph_close",
        "heading_close",
        "table_close",
        "hr",
        "fence",
    ):
        return False
    last = tokens[-1]
    if last.type == "fence" and last.map is not None:
        lines = text.split("\n")[slice(*last.map)]
        return len(lines) > 1 and lines[-1].strip().startswith(last.markup)
    return True


def _parts(text: str) -> list[str]:
    """`text` in parts of some twenty blocks or list items, parted where these begin.

    A long block of code is parted, too: all of it would be highlighted again for each new line.
    """
    if text.count("\n") <= _LINES:
        return [text]
    lines = text.split("\n")
    cuts: list[tuple[int, str, str]] = []  # the line, what ends the part before it, what begins the next
    blocks = last = 0
    for token in parser().parse(text):
        item = token.level == 1 and token.type == "list_item_open"
        if token.map is None or not (token.level == 0 or item):
            continue
        start, end = token.map
        blocks += 1
        if blocks > _BLOCKS or start - last > _LINES:
            blocks, last = 1, start
            cuts.append((start, "", ""))
        if token.type == "fence":
            inside = range(start + 1 + _LINES, end - 1, _LINES)
            last = max((last, *inside))
            cuts += [(at, f"{token.markup}\n", f"{lines[start]}\n") for at in inside]
    parts, begin, opening = [], 0, ""
    for at, closing, reopening in cuts:
        parts.append(opening + "".join(f"{line}\n" for line in lines[begin:at]) + closing)
        begin, opening = at, reopening
    return [*parts, opening + "\n".join(lines[begin:])]


def code_blocks(text: str) -> list[str]:
    """The code blocks of a Markdown text, in order."""
    return [token.content for token in parser().parse(text) if token.type in ("fence", "code_block")]
