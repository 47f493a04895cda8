"""Text that tries to drive a terminal."""

from __future__ import annotations

EVIL = [
    "\x1b]52;c;AAAA\x07", "\x1b[2J",
    "\x9b2J", "\x9d52;c;AAAA\x9c", "\x1bP0;0|0\x1b\\", "\x1b[?1049l", "\x1bc",
    "\r", "\x08", "\x7f", "\u202e", "\u2066", "\x00", "\x0e", "\x1b[6n", "\x1b]0;title\x07", "\x85", "\udc9b",
]  # fmt: skip
