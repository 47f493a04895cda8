"""The end of an answer at a line, for editors that wait for a suggestion."""

from __future__ import annotations

from collections.abc import Iterable
from time import monotonic

from edgespec.models.prompting.output_events import OutputEvent, TextPiece


class EarlyEnd:
    """Watches one answer: after `seconds` it ends with its next complete line; what follows is dropped."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._begun: float | None = None
        self.over = False

    def feed(self, events: Iterable[OutputEvent]) -> list[OutputEvent]:
        """Return what is left of `events`."""
        self._begun = self._begun or monotonic()
        late = self._seconds is not None and monotonic() - self._begun > self._seconds
        kept: list[OutputEvent] = []
        for event in events:
            if self.over:
                break
            if late and isinstance(event, TextPiece) and "\n" in event.text:
                event, self.over = TextPiece(event.text[: event.text.index("\n")]), True
            if not isinstance(event, TextPiece) or event.text:
                kept.append(event)
        return kept
