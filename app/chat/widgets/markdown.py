"""Answers as Markdown without control sequences, drawn at a rate that the machine can afford."""

from __future__ import annotations

import asyncio
import gc
from time import monotonic, thread_time

from rich.cells import cell_len
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widget import MountError
from textual.widgets import Label, Markdown, Static
from textual.widgets.markdown import MarkdownFence

from edgespec.app.chat.markup import (
    SECTION_LINES,
    OpenFence,
    has_fence,
    is_complete,
    open_fence,
    parser,
    split_sections,
)
from edgespec.app.terminal import clean

_SHARE = 0.03  # of a core that parsing an answer may take
_SHORTEST, _LONGEST = 0.2, 2.0  # seconds between two updates, and at most until lines are parsed
_SETTLES = 0.05  # seconds until lists have mounted their items: else each causes a layout of the screen
_LONGEST_LINE = 2000  # characters after which a line is parsed before it ends
_FREE = 3  # lines, so that not every new line causes a layout


class Section(Vertical):
    """A part of an answer, which displays nothing but its height while it is out of view.

    Every layout visits every displayed widget, and Markdown has one for each paragraph: a long answer would
    take a processor core for itself.
    """

    def __init__(self, text: str, shown: bool = True) -> None:
        super().__init__()
        self.markdown = Markdown("", parser_factory=parser, open_links=False)
        self.shown = shown
        self._later = text
        self._changes = 0  # that are not laid out yet

    def compose(self) -> ComposeResult:
        if self.shown:
            yield self.markdown
        else:
            self.styles.height = self._later.count("\n") + 1  # until it is measured

    @property
    def measured(self) -> bool:
        """Whether its height is known, not only estimated."""
        return not self._later

    async def reveal(self, shown: bool) -> None:
        """Display the text, or only its height."""
        if shown == self.shown or (not shown and self._changes):
            return
        self.shown = shown
        if not shown:
            self.styles.height = max(1, self.region.height)
            self.markdown.display = False
            return
        self.markdown.display = True
        if self._later:
            await self.mount(self.markdown)
            await self._parse()
        self.styles.height = "auto"
        self.changed()

    async def on_mount(self) -> None:
        if self.shown:
            await self._parse()
        self.changed()

    async def _parse(self) -> None:
        # Not `update`, after which Textual's Markdown does not know where its last block begins.
        text, self._later = self._later, ""
        await self.markdown.append(text)

    def changed(self) -> None:
        """Note that its height changes with the next layout."""

        def laid_out() -> None:
            self._changes -= 1

        self._changes += 1
        self.call_after_refresh(laid_out)


class OpenCode:
    """The code block at the end of an answer, and its newest lines, which are not highlighted yet."""

    def __init__(self, fence: OpenFence, label: Label) -> None:
        self.fence, self.label = fence, label
        self._shown = label.content
        self._highlighted = label.content if isinstance(label.content, Content) else Content()

    def show(self, more: str, spare: int) -> str:
        """Show the lines of `more` that belong to the block, up to `spare` free lines below them.

        Returns the text after the block.
        """
        label = self.label
        code, rest = self.fence.split(more)
        if label.content is not self._shown:  # the block was parsed again
            self._highlighted = label.content if isinstance(label.content, Content) else Content()
        self._shown = self._highlighted + self.fence.gap + code
        lines = self._shown.plain.split("\n")
        needed, size = len(lines), label.content_size
        if not needed <= size.height <= needed + spare:
            label.styles.height = needed + _FREE + label.gutter.height
        label.update(self._shown, layout=max(map(cell_len, lines)) > size.width)
        return rest

    def close(self) -> None:
        """Remove the free lines."""
        self.label.styles.height = "auto"


class MarkdownAnswer(Vertical):
    """An answer as it grows. `write` never waits.

    Whole lines are parsed as Markdown, as often as `_SHARE` allows. The text since then is shown unparsed,
    inside the code block that it belongs to or below the rest, which costs little.
    """

    def __init__(self, text: str = "") -> None:
        super().__init__(classes="answer")
        parts = split_sections(clean(text))
        self.sections = [Section(part, shown=part is parts[-1]) for part in parts]
        self._check = SECTION_LINES  # lines of the last section from which on to split it
        self._more = ""  # text that is not parsed yet
        self._tail = Static("", classes="tail", markup=False)
        self._fence: OpenFence | None = None  # at the end of the parsed text
        self._code: OpenCode | None = None
        self._written = asyncio.Event()
        self._order = asyncio.Lock()  # a canceled append is completed
        self._drawing: asyncio.Task[None] | None = None

    def compose(self) -> ComposeResult:
        yield from self.sections
        yield self._tail

    def on_mount(self) -> None:
        self._tail.display = False

    def write(self, text: str) -> None:
        self._more += clean(text)
        self._written.set()
        if self._drawing is None:
            self._drawing = asyncio.create_task(self._draw())

    async def end(self) -> None:
        """Parse the rest at once."""
        if self._drawing is not None:
            self._drawing.cancel()
            await asyncio.wait([self._drawing])
            self._drawing = None
        text, self._more = self._more, ""
        with self.app.batch_update():
            self._tail.display = False
            await self._append(text)
            self._set_fence(None)

    def on_unmount(self) -> None:
        if self._drawing is not None:
            self._drawing.cancel()

    async def _draw(self) -> None:
        """Draw new text until canceled."""
        gc.freeze()
        try:
            await self._draw_updates()
        finally:
            gc.unfreeze()

    async def _draw_updates(self) -> None:
        due = 0.0
        self._set_fence(open_fence(self.sections[-1].markdown.source))
        while True:
            await self._written.wait()
            self._written.clear()
            lines = self._more.rfind("\n") + 1 or len(self._more) // _LONGEST_LINE * _LONGEST_LINE
            if self._full:
                lines = self._more.rfind("\n\n") + 2 if "\n\n" in self._more else lines
            # At once if a code block starts: unparsed, it would be shown as prose.
            if lines and (monotonic() >= due or has_fence(self._after_code.rpartition("\n")[0])):
                start, drawn, sections = thread_time(), asyncio.Event(), len(self.sections)
                text, self._more = self._more[:lines], self._more[lines:]
                with self.app.batch_update():
                    await asyncio.shield(self._append(text))
                    self._show_tail()
                    await asyncio.sleep(_SETTLES)
                self.call_after_refresh(drawn.set)  # includes the layout
                await drawn.wait()
                if len(self.sections) > sections:
                    gc.freeze()  # the garbage collector need not visit what stays
                due = monotonic() + min(_LONGEST, (thread_time() - start) / _SHARE)
            else:
                self._show_tail()
            await asyncio.sleep(_SHORTEST)

    def _show_tail(self) -> None:
        """Show the text that is not parsed yet."""
        if not self.is_attached:
            return
        tail, text = self._tail, self._more
        if (code := self._open_code()) is not None:
            text = code.show(text, self.app.size.height // 3)
            tail.display = bool(text)
            if not text:
                return
        width = max(1, self.size.width - 2)  # that of Markdown
        needed = sum(max(1, -(-cell_len(line) // width)) for line in text.split("\n"))
        height = tail.size.height if tail.display else 0
        if not needed <= height <= needed + self.app.size.height // 3:
            tail.styles.height = needed + _FREE
        tail.display = True
        tail.update(text, layout=False)

    async def _append(self, text: str) -> None:
        async with self._order:
            if not text or not self.is_attached:
                return
            last = self.sections[-1].markdown
            try:
                if self._full and is_complete(last.source):
                    more = [Section(part) for part in split_sections(text)]
                    await self.mount_all(more, before=self._tail)
                    self.sections += more
                else:
                    await last.append(text)
                    if last.source.count("\n") > self._check:
                        await self._split(last)
                self._set_fence(open_fence(self.sections[-1].markdown.source))
            except MountError:
                if self.is_attached:
                    raise  # else it was removed from the screen

    @property
    def _after_code(self) -> str:
        """The unparsed text after the open code block, or all of it without one."""
        return self._more if self._fence is None else self._fence.split(self._more)[1]

    def _set_fence(self, fence: OpenFence | None) -> None:
        """Set the code block that the parsed text ends in."""
        self._fence = fence
        label = self._code_label()
        if self._code is not None and label is not self._code.label:
            self._code.close()
            self._code = None
        elif self._code is not None and fence is not None:
            self._code.fence = fence

    def _open_code(self) -> OpenCode | None:
        """The code block that the parsed text ends in, once it is mounted."""
        label = self._code_label() if self._code is None else None
        if label is not None and self._fence is not None:
            self._code = OpenCode(self._fence, label)
        return self._code

    def _code_label(self) -> Label | None:
        blocks = self.sections[-1].markdown.query(MarkdownFence) if self._fence is not None else ()
        labels = list(blocks)[-1].query(Label) if blocks else ()
        return labels.first() if labels else None

    @property
    def _full(self) -> bool:
        """Whether the next block starts another section."""
        return self.sections[-1].markdown.source.count("\n") >= SECTION_LINES // 2

    async def _split(self, last: Markdown) -> None:
        """Move the last blocks into new sections, so that the finished ones are not parsed again."""
        source = last.source
        *finished, last_part = split_sections(source)
        if not finished:
            self._check = 2 * source.count("\n")  # one long block cannot be split
            return
        self._check = SECTION_LINES
        more = [Section(part) for part in (*finished[1:], last_part)]
        with self.app.batch_update():
            await last.update(finished[0])
            self.sections[-1].changed()
            await self.mount_all(more, before=self._tail)
        self.sections += more
