"""Cleaning of text before it is written to a terminal.

Model output, file names and errors may contain control sequences that write to the clipboard, move the cursor
over earlier text, or reverse the reading order.
"""

from __future__ import annotations

import logging
import sys

_DROPPED = (
    range(0x00, 0x20),  # C0, of which \n, \t and \r are handled below
    range(0x7F, 0xA0),  # DEL and C1, which some terminals read as ESC and a letter
    range(0x202A, 0x202F),  # bidirectional embeddings and overrides (CVE-2021-42574)
    range(0x2066, 0x206A),  # bidirectional isolates
)
_TABLE: dict[int, str | None] = {
    **{code: None for codes in _DROPPED for code in codes},
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),  # a lone surrogate cannot be encoded
    **dict.fromkeys(map(ord, "\n\r\u2028\u2029"), "\n"),
    ord("\t"): "\t",
}


def clean(text: str) -> str:
    """Remove control characters from `text`; \\n and \\t stay, every other end of a line becomes \\n.

    Works by code point, so that a stream can be cleaned piece by piece: a sequence split over two pieces
    loses its first byte in any case. Only "\\r\\n" is one newline in a piece, and two if it is split. A lone
    \\r, which would let the cursor overwrite the line, becomes \\n.
    """
    return text.replace("\r\n", "\n").translate(_TABLE)


def one_line(text: str) -> str:
    """Clean `text` and replace every run of white space by one space: for errors, names and titles."""
    return " ".join(clean(text).split())


class CleanHandler(logging.Handler):
    """Writes log records to stderr, cleaned: a traceback quotes model output and files."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(clean(self.format(record)) + "\n")
        except Exception:  # noqa: BLE001 - logging must not end the program
            self.handleError(record)
