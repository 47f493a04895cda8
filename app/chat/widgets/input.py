"""The input of a message: several lines, recall of sent messages, large pastes, completion."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

from textual import events
from textual.message import Message
from textual.widgets import Input, TextArea

from edgespec.app.terminal import clean, one_line

_LARGE = 8000  # characters of a paste; longer ones are replaced by a mark, since each key lays out the text
_MOST_SENT = 200


class LineInput(Input):
    """An input of one line, cleaned whatever is pasted into it."""

    def validate_value(self, value: str) -> str:
        return value if value.isprintable() else one_line(value)

    def _on_paste(self, event: events.Paste) -> None:
        event.text = one_line(event.text)  # Input's own handler runs next


class MessageInput(TextArea):
    """Enter sends, Enter with a modifier inserts a new line, Tab completes, Up recalls what was sent.

    A large paste is shown as a short mark, which is replaced by the text when the message is sent.
    """

    class Sent(Message):
        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    def __init__(self, complete: Callable[[str], Sequence[str]], **settings: object) -> None:
        super().__init__(id="input", highlight_cursor_line=False, **settings)  # type: ignore[arg-type]
        self._complete = complete
        self._pasted: dict[str, str] = {}
        self._sent: list[str] = []
        self._back = 0  # position in `_sent` from its end; 0: the message being typed
        self._draft = ""

    def whole(self) -> str:
        """The message with the text of large pastes."""
        if not self._pasted:
            return self.text
        marks = "|".join(map(re.escape, self._pasted))
        return re.sub(marks, lambda match: self._pasted[match[0]], self.text)

    def put(self, text: str) -> None:
        """Replace the text, with the cursor at its end."""
        self._pasted = {}
        self.text = ""
        self._insert(clean(text))
        self.move_cursor(self.document.end)

    def remember(self, sent: Sequence[str]) -> None:
        """Set the messages that Up recalls, oldest first."""
        self._sent, self._back = list(sent)[-_MOST_SENT:], 0

    async def _on_key(self, event: events.Key) -> None:
        taken = True
        if event.key == "enter":
            if self.text.strip():
                text = self.whole().strip("\n")
                self._sent = [*self._sent[-_MOST_SENT:], text]
                self._back = 0
                self.post_message(self.Sent(text))
                self.clear()
                self._pasted = {}
        elif event.key in ("ctrl+j", "shift+enter", "alt+enter", "ctrl+enter"):
            self.insert("\n")
        elif event.key == "tab":
            self._tab()
        elif event.key == "up" and self.cursor_at_first_line:
            self._recall(1)
        elif event.key == "down" and self.cursor_at_last_line and self._back:
            self._recall(-1)
        else:
            taken = False
        if taken:
            event.prevent_default().stop()

    async def _on_paste(self, event: events.Paste) -> None:
        event.prevent_default().stop()
        self._insert(clean(event.text))

    def _insert(self, text: str) -> None:
        if len(text) > _LARGE:
            mark = f"[pasted {len(self._pasted) + 1}: {len(text):,} characters]"
            self._pasted[mark] = text
            text = mark
        self.insert(text)

    def _recall(self, step: int) -> None:
        back = self._back + step
        if 0 <= back <= len(self._sent):
            if not self._back:
                self._draft = self.whole()
            self._back = back
            self.put(self._sent[-back] if back else self._draft)

    def _tab(self) -> None:
        """Insert the common prefix of all completions of the word before the cursor."""
        row, column = self.cursor_location
        word = self.document.get_line(row)[:column].rpartition(" ")[2]
        found = self._complete(word)
        common = os.path.commonprefix(list(found))  # noqa: RUF071 - of command names, too
        if len(common) > len(word):
            self.replace(common, (row, column - len(word)), (row, column))
