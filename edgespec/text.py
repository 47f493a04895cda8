"""Decoding of tokens' bytes to text: characters that span tokens, and stop strings that span both.

A stream does not escape control characters: the code that prints its text does.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


def printable(value: object, limit: int | None = 300) -> str:
    """Return `value`, text or bytes, in at most `limit` characters.

    Control characters, and bytes that are not UTF-8, are escaped.
    """
    if isinstance(value, bytes):
        value = value[: limit and 4 * limit].decode("utf-8", "backslashreplace")
    text = str(value)[: limit and limit + 1]
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return safe if limit is None or len(safe) <= limit else safe[: limit - 1] + "…"


class TextStream:
    """Takes the bytes of each token and returns text that can no longer change.

    A character is returned when its last byte has arrived; bytes that are not UTF-8 become U+FFFD. Text that
    may be the beginning of a stop string is held back until that is decided; a stop string is never returned.
    Once `stopped` is the stop string found, further bytes are ignored.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if any(not stop for stop in stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._ready: list[str] = []
        self.stopped: str | None = None

    def push(self, piece: bytes, final: bool = False) -> None:
        """Add one token's bytes. With `final`, nothing follows and nothing is held back any longer."""
        if self.stopped is not None:
            return
        self._held += self._decoder.decode(piece, final)
        found = [(at, -len(stop), stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        certain = len(self._held) - (0 if final else self._undecided())
        if found and min(found)[0] <= certain:
            # The stop string that begins first ends the text; of two at one position the longer is reported.
            at, _, self.stopped = min(found)
            self._give(at)
            self._held = ""
        else:  # a stop string that begins before the one found may still be completed
            self._give(certain)

    def take(self) -> str:
        """Return the text that became final since the last call."""
        text = "".join(self._ready)
        self._ready.clear()
        return text

    def _give(self, length: int) -> None:
        if length:
            self._ready.append(self._held[:length])
            self._held = self._held[length:]

    def _undecided(self) -> int:
        """Return the length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
