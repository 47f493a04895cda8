"""The list of conversations: search, open, rename, pin, delete and restore."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, TypeVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import Input, Label, OptionList
from textual.widgets.option_list import Option

from edgespec.app.chat.history_worker import HistoryWorker
from edgespec.app.chat.widgets.input import LineInput
from edgespec.app.terminal import clean, one_line

if TYPE_CHECKING:  # imports numpy
    from edgespec.app.history.search import Hit
    from edgespec.app.history.store import History

T = TypeVar("T")
_MOST = 200
_WIDTH = 32  # of a title, in cells


class Sidebar(Vertical):
    """A search field and the conversations it finds."""

    class Opened(Message):
        def __init__(self, conversation: int, message: int | None) -> None:
            super().__init__()
            self.conversation, self.message = conversation, message

    class Wanted(Message):
        """A command for a conversation, see `commands.CONVERSATION_COMMANDS`."""

        def __init__(self, what: str, conversation: int) -> None:
            super().__init__()
            self.what, self.conversation = what, conversation

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f2", "want('rename')", "Rename", priority=True),
        Binding("ctrl+s", "want('pin')", "Pin", priority=True),
        Binding("delete,ctrl+d", "want('delete')", "Delete", priority=True),
        Binding("ctrl+z", "want('undo')", "Undo", priority=True),
        Binding("down", "down", show=False),
    ]

    def __init__(self, history: HistoryWorker) -> None:
        super().__init__(id="sidebar")
        self._history = history
        self._found: list[tuple[int, int | None]] = []

    def compose(self) -> ComposeResult:
        yield LineInput(placeholder="Search", id="search")
        yield OptionList(id="found", markup=False)
        yield Label("Enter open · F2 rename · ^S pin · ^D delete · ^Z undo", id="keys", markup=False)

    @property
    def chosen(self) -> tuple[int, int | None] | None:
        """The selected conversation, and the message if the search found one."""
        at = self.query_one(OptionList).highlighted
        return self._found[at] if at is not None and at < len(self._found) else None

    def begin(self, query: str | None = None) -> None:
        """Focus the search field, with `query` in it unless None."""
        search = self.query_one(Input)
        if query is not None:
            search.value = query
        search.focus()
        self._fill(search.value)

    def refill(self) -> None:
        """Update the list."""
        if self.display:
            self._fill(self.query_one(Input).value)

    def on_input_changed(self, event: Input.Changed) -> None:
        self._fill(event.value)

    def on_input_submitted(self) -> None:
        self._open()

    def on_option_list_option_selected(self) -> None:
        self._open()

    def action_down(self) -> None:
        self.query_one(OptionList).focus()

    def action_want(self, what: str) -> None:
        if what == "undo" or self.chosen is not None:
            self.post_message(self.Wanted(what, self.chosen[0] if self.chosen else 0))

    def _open(self) -> None:
        if self.chosen is not None:
            self.post_message(self.Opened(*self.chosen))

    @work(exclusive=True)
    async def _fill(self, query: str) -> None:
        from edgespec.core import EdgespecError

        if query.strip():
            await asyncio.sleep(0.1)  # until typing pauses
        try:
            if query.strip():
                hits = await _query(self._history, lambda history: history.search(query, _MOST))
                rows = [((hit.conversation, hit.message), _hit(hit)) for hit in hits]
            else:
                listed = await _query(self._history, lambda history: history.conversations(_MOST))
                rows = [((one.id, None), _title(one.title, one.pinned)) for one in listed]
        except EdgespecError as error:
            self.app.notify(one_line(str(error)), severity="error", markup=False)
            return
        options = self.query_one(OptionList)
        before = self.chosen
        self._found = [found for found, _ in rows]
        options.clear_options().add_options([Option(text) for _, text in rows])
        if rows:
            options.highlighted = self._found.index(before) if before in self._found else 0


async def _query(history: HistoryWorker, job: Callable[[History], T]) -> T:
    return await asyncio.wrap_future(history.do(job))


def _title(title: str, pinned: bool) -> Text:
    mark = "* " if pinned else ""
    return _cut(Text(mark + (one_line(title) or "(untitled)")))


def _hit(hit: Hit) -> Text:
    """The title, and below it the snippet, cleaned in the parts between its matches."""
    text = _cut(Text(one_line(hit.title) or "(untitled)", style="bold"))
    if hit.message is None:
        return text
    text.append("\n")
    at = 0
    for start, end in hit.matches:
        text.append(_piece(hit.snippet[at:start]), "not bold")
        text.append(_piece(hit.snippet[start:end]), "bold underline")
        at = end
    return text.append(_piece(hit.snippet[at:]), "not bold")


def _cut(text: Text) -> Text:
    text.truncate(_WIDTH, overflow="ellipsis")
    return text


def _piece(text: str) -> str:
    return re.sub(r"\s+", " ", clean(text))
