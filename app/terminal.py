"""Text made safe to show in a terminal. Knows nothing of who wrote it or where on the screen it goes.

A terminal obeys what it is sent: model output, a file name or an error may carry a sequence that writes to
the clipboard, moves the cursor over earlier text, or turns the reading order around.
"""

from __future__ import annotations

import logging
import sys

_DROPPED = (
    range(0x00, 0x20),  # C0, of which \n, \t and \r are handled below
    range(0x7F, 0xA0),  # DEL and C1, which some terminals take for ESC and a letter
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
    """`text` without what could drive a terminal; \\n and \\t stay, all other ends of lines become \\n.

    Works by single code points, so a stream can be cleaned piece by piece: a sequence split over two pieces
    lost its first byte in any case. Only "\\r\\n" is one newline in a piece, and two if the pieces part
    inside. A lone \\r, which would return the cursor to overwrite the line, becomes \\n.
    """
    return text.replace("\r\n", "\n").translate(_TABLE)


def one_line(text: str) -> str:
    """`clean`, with every run of white space made one space: for errors, names and titles."""
    return " ".join(clean(text).split())


class CleanHandler(logging.Handler):
    """Writes log records to stderr, cleaned: a traceback quotes what a model or a file said."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(clean(self.format(record)) + "\n")
        except Exception:  # noqa: BLE001 - the logging of an error is no reason to end
            self.handleError(record)
