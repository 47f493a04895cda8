"""Text that arrives in parts, and readers of it: generators that stop wherever they need more.

A reader asks for characters with `yield from` and reads each once, so parsing is linear however the text is
cut.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A reader: yields where it needs more text, and returns what it has read."""


class AnswerText:
    """Text that was fed and not yet read. What is read between `hold` and `release` is recorded."""

    def __init__(self) -> None:
        self.ended = self.cut = False
        self._text, self._at = "", 0
        self._held: list[str] | None = None

    @property
    def empty(self) -> bool:
        """Whether everything that has arrived is read."""
        return self._at == len(self._text)

    def end(self, cut: bool) -> None:
        """Nothing follows. `cut`: a limit ended the answer, not the model."""
        self.ended, self.cut = True, cut

    @property
    def unread(self) -> str:
        return self._text[self._at :]

    def feed(self, text: str) -> None:
        self._text, self._at = self._text[self._at :] + text, 0

    def hold(self, text: str = "") -> None:
        """Begin to record, with `text`, which was read before."""
        self._held = [text]

    def release(self) -> str:
        """Stop recording; return what was read."""
        held, self._held = self._held or [], None
        return "".join(held)

    def rewind(self) -> None:
        """Stop recording; what was read is to be read again."""
        self._text, self._at = self.release() + self._text[self._at :], 0

    def skip(self, count: int = 1) -> str:
        """Read the next `count` characters, which have arrived."""
        text = self._text[self._at : self._at + count]
        self._at += count
        if self._held is not None:
            self._held.append(text)
        return text

    def peek(self, offset: int = 0) -> Steps[str]:
        """Return a character without reading it, "" after the end."""
        while self._at + offset >= len(self._text):
            if self.ended:
                return ""
            yield
        return self._text[self._at + offset]

    def spaces(self) -> Steps[None]:
        """Read space."""
        while (yield from self.peek()).isspace():
            self.skip()

    def one_of(self, texts: Iterable[str]) -> Steps[str]:
        """Read the longest of `texts` that follows and return it; read nothing and return "" if none does."""
        candidates, best, length = [text for text in texts if text], "", 0
        while candidates:
            character = yield from self.peek(length)
            candidates = [text for text in candidates if text[length] == character]
            length += 1
            best = next((text for text in candidates if len(text) == length), best)
            candidates = [text for text in candidates if len(text) > length]
        self.skip(len(best))
        return best

    def until(self, text: str, limit: int) -> Steps[str | None]:
        """Read up to and including `text`; return what is before it, None if that is over `limit` long."""
        read: list[str] = []
        while not (yield from self.one_of([text])):
            if not (yield from self.peek()) or len(read) == limit:
                return None
            read.append(self.skip())
        return "".join(read)

    def before(self, pattern: re.Pattern[str], marks: Iterable[str]) -> Steps[str]:
        """Read and return what certainly precedes the next of `marks`, which `pattern` matches.

        "" if a mark is next, or at the end; the start of a mark is not read if the answer was cut in it.
        """
        while (yield from self.peek()):
            found = pattern.search(self._text, self._at)
            if found is not None:
                return self.skip(found.start() - self._at)
            undecided = (
                0 if self.ended and not self.cut else max((self._begun(mark) for mark in marks), default=0)
            )
            if count := len(self._text) - self._at - undecided:
                return self.skip(count)
            if self.ended:
                return ""
            yield
        return ""

    def _begun(self, mark: str) -> int:
        """Return the length of the longest end of what has arrived that begins `mark`."""
        longest = min(len(mark) - 1, len(self._text) - self._at)
        return next((n for n in range(longest, 0, -1) if self._text.endswith(mark[:n])), 0)
